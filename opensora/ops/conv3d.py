"""Causal space-time convolution and resampling, with a temporal cache for streaming.

Tensors are channels-last, (B, T, H, W, C), which lets norms and linear layers work in place and
convolutions see torch's channels_last memory format without a copy. A layer sees the present and
the past only. Given a `Cache`, a clip may come in chunks and the result equals the whole clip's.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

Cache = dict[nn.Module, Tensor]
"""What streaming layers remember between chunks: the last input frames of each."""


class CausalConv3d(nn.Module):
    """3-D convolution that pads space with zeros and time with the first frame, on the past side.

    A temporal stride of 2 maps 1 + 2k frames to 1 + k: the first output sees the first frame
    alone. A spatial stride of 2 pads on the right and bottom, so even sizes are halved.

    Args:
        kernel: (time, height, width); height and width odd.
        stride: (time, height, width), each 1 or 2 and no wider than the kernel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: tuple[int, int, int] = (3, 3, 3),
        stride: tuple[int, int, int] = (1, 1, 1),
    ):
        super().__init__()
        if any(s > k for k, s in zip(kernel, stride, strict=True)):
            raise ValueError(f"stride {stride} skips inputs of kernel {kernel}: widen the kernel")
        self.kernel, self.stride = kernel, stride
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, T, H, W, C) -> (B, T', H', W', C'); `cache` is read and updated when given."""
        x = self._with_past(x, cache)
        if x.device.type == "cpu":
            return conv_by_stacking(x, self.weight, self.bias, self.stride)
        return conv_direct(x, self.weight, self.bias, self.stride)

    def _with_past(self, x: Tensor, cache: Cache | None) -> Tensor:
        missing = self.kernel[0] - 1
        if not missing:
            return x
        kept = self.kernel[0] - self.stride[0]
        past = None if cache is None else cache.get(self)
        if past is None:
            past = x[:, :1].expand(-1, missing, -1, -1, -1)
        x = torch.cat([past, x], dim=1)
        if cache is not None:
            # A copy, because a view would keep the whole chunk alive until the next one.
            cache[self] = x[:, x.shape[1] - kept :].detach().clone()
        return x


def _spatial_padding(kernel: int, stride: int) -> tuple[int, int]:
    total = kernel - 1 if stride == 1 else kernel - stride
    return total // 2, total - total // 2


def conv_direct(x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """The convolution through torch's conv3d; time is not padded here.

    Args:
        x: (B, T, H, W, C), the past already in front.
        weight: (C', C, t, h, w).
    """
    top, bottom = _spatial_padding(weight.shape[3], stride[1])
    left, right = _spatial_padding(weight.shape[4], stride[2])
    x = functional.pad(x, (0, 0, left, right, top, bottom))
    x = functional.conv3d(rearrange(x, "b t h w c -> b c t h w"), weight, bias, stride)
    return rearrange(x, "b c t h w -> b t h w c")


def conv_by_stacking(
    x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int, int]
) -> Tensor:
    """The same convolution as one conv2d over frames whose channels hold their temporal taps.

    On CPUs conv2d is far better optimised than conv3d; the copies of the taps cost less.
    """
    batch, taps = x.shape[0], weight.shape[2]
    frames = (x.shape[1] - taps) // stride[0] + 1
    window = [x[:, k : k + stride[0] * (frames - 1) + 1 : stride[0]] for k in range(taps)]
    x = torch.cat(window, dim=-1) if taps > 1 else window[0]
    top, bottom = _spatial_padding(weight.shape[3], stride[1])
    left, right = _spatial_padding(weight.shape[4], stride[2])
    padding: tuple[int, int] = (top, left)
    if (top, left) != (bottom, right):
        x = functional.pad(x, (0, 0, left, right, top, bottom))
        padding = (0, 0)
    flat = rearrange(x, "b t h w c -> (b t) c h w")
    kernel = rearrange(weight, "o c t h w -> o (t c) h w")
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    out = functional.conv2d(flat, kernel, bias, stride[1:], padding)
    return rearrange(out, "(b t) c h w -> b t h w c", b=batch)


class RepeatFrames(nn.Module):
    """Doubles the frames after the first: 1 + k -> 1 + 2k, causally."""

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        repeated = x.repeat_interleave(2, dim=1)
        if cache is not None and self in cache:
            return repeated
        if cache is not None:
            cache[self] = x.new_empty(0)
        return repeated[:, 1:]


def space_to_depth(x: Tensor, factor: int) -> Tensor:
    """(B, T, H, W, C) -> (B, T, H / f, W / f, C * f * f)."""
    return rearrange(x, "b t (h q) (w r) c -> b t h w (q r c)", q=factor, r=factor)


def depth_to_space(x: Tensor, factor: int) -> Tensor:
    """The inverse of `space_to_depth`."""
    return rearrange(x, "b t h w (q r c) -> b t (h q) (w r) c", q=factor, r=factor)
