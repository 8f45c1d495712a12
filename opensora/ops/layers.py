"""Blocks that transformers share: embedders, MLP, adaptive modulation, patches."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from opensora.ops.positions import sinusoid


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear: (..., D) -> (..., D_out)."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int | None = None):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim or dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class ScalarEmbedder(nn.Module):
    """Embeds scalars (noise levels, frame rates, sizes): sinusoid, Linear, SiLU, Linear.

    Args:
        dim: output width.
        scale: the scalars are multiplied by this first, so that their useful range spans the
            sinusoid's wavelengths (1000 for noise levels in [0, 1], as in DiT).
    """

    def __init__(self, dim: int, *, scale: float = 1.0, frequency_dim: int = 256):
        super().__init__()
        self.scale = scale
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, values: Tensor) -> Tensor:
        code = sinusoid(values.float() * self.scale, self.frequency_dim)
        dtype = self.mlp[0].weight.dtype
        return self.mlp(code.to(dtype))  # pyright: ignore[reportArgumentType, reportCallIssue]


def linears(module: nn.Module) -> list[nn.Linear]:
    """The linear layers in a module, in the order in which it holds them."""
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def normalise(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Root-mean-square norm over the last dim (Zhang & Sennrich 2019), times a weight.

    As torch's rms_norm, but the weight may differ along the dims before the last, so that several
    norms are one pass.

    Args:
        x: float (..., d).
        weight: broadcastable to x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)


class RMSNorm(nn.Module):
    """`normalise` over the last dim with a weight; torch's warns of bfloat16 x."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return normalise(x, self.weight)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm's affine part (Peebles & Xie 2023): x * (1 + scale) + shift.

    In the dtype of x, so that tokens stay as narrow as they are.
    """
    return torch.addcmul(shift.to(x.dtype), x, (1 + scale).to(x.dtype))


def patchify(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Cut latents into patches: (B, C, T, H, W) -> (B, T/p, H/q * W/r, C * p * q * r)."""
    p, q, r = patch
    return rearrange(x, "b c (t p) (h q) (w r) -> b t (h w) (c p q r)", p=p, q=q, r=r)


def unpatchify(x: Tensor, patch: tuple[int, int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`; `grid` is the number of patches down and across."""
    p, q, r = patch
    h, w = grid
    return rearrange(x, "b t (h w) (c p q r) -> b c (t p) (h q) (w r)", h=h, w=w, p=p, q=q, r=r)
