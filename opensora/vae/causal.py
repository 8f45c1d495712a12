"""A causal space-time VAE: 1 + 4k frames become 1 + k latent frames at an eighth of the size.

The first frame alone is an image. All layers look at the present and the past only, and norms act
on single positions, so a clip coded in chunks equals the clip coded whole. Latents leave here
normalised per channel; nobody else knows their statistics, stride or channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from opensora.config import Config
from opensora.errors import UsageError
from opensora.ops.conv3d import (
    Cache,
    CausalConv3d,
    RepeatFrames,
    depth_to_space,
    space_to_depth,
)


class CausalVAEConfig(Config):
    """Architecture of `CausalVAE`. Stages go from fine to coarse, each halving the picture."""

    kind: Literal["causal"] = "causal"
    patch: int = Field(
        default=2, ge=1, description="side of the pixel squares folded into channels first"
    )
    widths: tuple[int, ...] = Field(default=(64, 128, 256), description="channels of each stage")
    blocks: tuple[int, ...] = Field(
        default=(1, 1, 2), description="encoder residual blocks of each stage"
    )
    decoder_blocks: tuple[int, ...] = Field(
        default=(1, 1, 2), description="the same for the decoder"
    )
    temporal_kernel: tuple[int, ...] = Field(
        default=(1, 3, 3), description="frames that each stage's convolutions span"
    )
    spatial_down: tuple[bool, ...] = Field(
        default=(True, True),
        description="whether the step after each stage but the last halves the size",
    )
    temporal_down: tuple[bool, ...] = Field(
        default=(True, True),
        description="whether the step after each stage but the last halves time",
    )
    latent_channels: int = Field(default=8, ge=1)

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels per latent position in (time, height, width)."""
        side = self.patch * 2 ** sum(self.spatial_down)
        return 2 ** sum(self.temporal_down), side, side

    @model_validator(mode="after")
    def _stages_agree(self) -> CausalVAEConfig:
        n = len(self.widths)
        for name in ("blocks", "decoder_blocks", "temporal_kernel"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"{name} needs one entry for each of the {n} widths")
        for name in ("spatial_down", "temporal_down"):
            if len(getattr(self, name)) != n - 1:
                raise ValueError(f"{name} needs {n - 1} entries, one between each two stages")
        if any(k % 2 == 0 for k in self.temporal_kernel):
            raise ValueError("temporal_kernel entries must be odd")
        for fine, coarse, halved in zip(
            self.widths, self.widths[1:], self.spatial_down, strict=False
        ):
            folded = fine * 4 if halved else fine
            if max(folded, coarse) % min(folded, coarse):
                raise ValueError(
                    f"widths {fine} and {coarse}: the shortcut between two stages needs {folded} "
                    f"to be a multiple of {coarse} or the reverse"
                )
        return self


class ResidualBlock(nn.Module):
    """norm, SiLU, conv in space, norm, SiLU, conv in time, plus the input.

    (B, T, H, W, C) -> same. The 3-D kernel is factorised as in the Cosmos tokenizer (NVIDIA 2025,
    section 3.2), which costs 12 taps instead of 27.
    """

    def __init__(self, channels: int, temporal_kernel: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.conv1 = CausalConv3d(channels, channels, kernel=(1, 3, 3))
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.conv2 = CausalConv3d(channels, channels, kernel=(temporal_kernel, 1, 1))
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)), cache)
        h = self.conv2(functional.silu(self.norm2(h)), cache)
        return x + h


def fit_channels(x: Tensor, channels: int) -> Tensor:
    """The last dim brought to `channels` without parameters: groups averaged, or each copied."""
    if x.shape[-1] >= channels:
        return x.unflatten(-1, (channels, -1)).mean(dim=-1)
    return x.repeat_interleave(channels // x.shape[-1], dim=-1)


class Downsample(nn.Module):
    """Halves height and width and time, each where asked, beside an averaging shortcut.

    The shortcut folds pixels into channels and averages groups of them (deep-compression
    autoencoder, Chen et al. 2024, section 3.2), so that the step starts as a pooling.
    """

    def __init__(self, in_channels: int, out_channels: int, *, spatial: bool, temporal: bool):
        super().__init__()
        self.out_channels = out_channels
        self.factor = 2 if spatial else 1
        stride = (1, self.factor, self.factor)
        self.space = CausalConv3d(in_channels, out_channels, kernel=(1, 3, 3), stride=stride)
        self.time = (
            CausalConv3d(out_channels, out_channels, kernel=(3, 1, 1), stride=(2, 1, 1))
            if temporal
            else None
        )

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        y = self.space(x, cache)
        if self.time is not None:
            y = self.time(y, cache)
            first = cache is None or self not in cache
            if cache is not None:
                cache[self] = x.new_empty(0)
            pairs = x[:, 1:] if first else x
            pairs = rearrange(pairs, "b (t p) h w c -> b t p h w c", p=2).mean(dim=2)
            x = torch.cat([x[:, :1], pairs], dim=1) if first else pairs
        return y + fit_channels(space_to_depth(x, self.factor), self.out_channels)


class Upsample(nn.Module):
    """Doubles height and width and time, each where asked, beside a duplicating shortcut."""

    def __init__(self, in_channels: int, out_channels: int, *, spatial: bool, temporal: bool):
        super().__init__()
        self.factor = 2 if spatial else 1
        self.folded = out_channels * self.factor**2
        self.repeat = RepeatFrames() if temporal else None
        self.time = CausalConv3d(in_channels, in_channels, kernel=(3, 1, 1)) if temporal else None
        self.space = CausalConv3d(in_channels, self.folded, kernel=(1, 3, 3))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        if self.repeat is not None and self.time is not None:
            x = self.repeat(x, cache)
            x = x + self.time(x, cache)
        return depth_to_space(self.space(x, cache) + fit_channels(x, self.folded), self.factor)


class Coder(nn.Module):
    """A chain of layers (B, T, H, W, C) -> (B, T', H', W', C'), optionally streamed."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, cache)
        return x


class Head(nn.Module):
    """norm, SiLU, convolution to the output channels."""

    def __init__(self, in_channels: int, out_channels: int, temporal_kernel: int):
        super().__init__()
        self.norm = nn.LayerNorm(in_channels, eps=1e-6)
        self.conv = CausalConv3d(in_channels, out_channels, kernel=(temporal_kernel, 3, 3))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        return self.conv(functional.silu(self.norm(x)), cache)


def build_encoder(config: CausalVAEConfig) -> Coder:
    """Pixels folded by `patch` -> mean and log-variance channels."""
    widths, kernels = config.widths, config.temporal_kernel
    layers: list[nn.Module] = [
        CausalConv3d(3 * config.patch**2, widths[0], kernel=(kernels[0], 3, 3))
    ]
    for stage, width in enumerate(widths):
        if stage:
            layers.append(
                Downsample(
                    widths[stage - 1],
                    width,
                    spatial=config.spatial_down[stage - 1],
                    temporal=config.temporal_down[stage - 1],
                )
            )
        layers += [ResidualBlock(width, kernels[stage]) for _ in range(config.blocks[stage])]
    layers.append(Head(widths[-1], 2 * config.latent_channels, kernels[-1]))
    return Coder(layers)


def build_decoder(config: CausalVAEConfig) -> Coder:
    """Latent channels -> pixels folded by `patch`."""
    widths, kernels = config.widths, config.temporal_kernel
    layers: list[nn.Module] = [
        CausalConv3d(config.latent_channels, widths[-1], kernel=(kernels[-1], 3, 3))
    ]
    for stage in reversed(range(len(widths))):
        count = config.decoder_blocks[stage]
        layers += [ResidualBlock(widths[stage], kernels[stage]) for _ in range(count)]
        if stage:
            layers.append(
                Upsample(
                    widths[stage],
                    widths[stage - 1],
                    spatial=config.spatial_down[stage - 1],
                    temporal=config.temporal_down[stage - 1],
                )
            )
    layers.append(Head(widths[0], 3 * config.patch**2, kernels[0]))
    return Coder(layers)


class CausalVAE(nn.Module):
    """The autoencoder.

    Attributes:
        stride: pixels per latent position in (time, height, width).
        latent_channels: C of the latents.
        latent_mean, latent_std: (C,) buffers that normalise the latents.
    """

    def __init__(self, config: CausalVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.decoder = build_decoder(config)
        self.latent_channels = config.latent_channels
        self.stride = config.stride
        self.latent_mean: Tensor
        self.latent_std: Tensor
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    @property
    def blocks(self) -> list[nn.Module]:
        """The units that an engine shards or recomputes."""
        return [*self.encoder.layers, *self.decoder.layers]

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a clip; UsageError where the clip does not divide."""
        time, down, across = self.stride
        if (num_frames - 1) % time or height % down or width % across:
            raise UsageError(
                f"a clip of {num_frames} frames of {height}x{width} does not fit the VAE: it needs "
                f"1 + {time}k frames and sides that are multiples of {down}x{across}"
            )
        return (
            self.latent_channels,
            1 + (num_frames - 1) // time,
            height // down,
            width // across,
        )

    def posterior(self, pixels: Tensor, cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of raw latents, each (B, C, T, H, W).

        Args:
            pixels: float (B, 3, F, H, W) in [-1, 1].
        """
        x = space_to_depth(rearrange(pixels, "b c f h w -> b f h w c"), self.config.patch)
        moments = rearrange(self.encoder(x, cache), "b t h w c -> b c t h w")
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def reconstruct(self, latents: Tensor, cache: Cache | None = None) -> Tensor:
        """Normalised latents (B, C, T, H, W) -> pixels (B, 3, F, H, W), unclamped."""
        x = self.decoder(rearrange(latents, "b c t h w -> b t h w c"), cache)
        return rearrange(depth_to_space(x, self.config.patch), "b f h w c -> b c f h w")

    def normalise(self, latents: Tensor) -> Tensor:
        """The encoder's latents -> zero mean and unit variance, as the decoder takes them."""
        shape = (1, -1, 1, 1, 1)
        return (latents - self.latent_mean.view(shape)) / self.latent_std.view(shape)

    def encode(self, pixels: Tensor, *, chunk: int | None = None) -> Tensor:
        """Pixels -> normalised latents (the posterior's mean).

        Args:
            pixels: float (B, 3, F, H, W) in [-1, 1]; F = 1 + k * stride.
            chunk: latent frames coded at a time; None codes the clip whole. Equal either way.

        Returns:
            float (B, C, T, H, W).
        """
        self.latent_shape(*pixels.shape[2:])
        if chunk is None:
            return self.normalise(self.posterior(pixels)[0])
        cache: Cache = {}
        parts = _chunks(pixels, first=1 + self.stride[0] * (chunk - 1), then=self.stride[0] * chunk)
        return torch.cat([self.normalise(self.posterior(p, cache)[0]) for p in parts], dim=2)

    def decode(self, latents: Tensor, *, chunk: int | None = None) -> Tensor:
        """Normalised latents -> pixels in [-1, 1], float (B, 3, F, H, W)."""
        if chunk is None:
            return self.reconstruct(latents).clamp(-1, 1)
        batch, _, frames, height, width = latents.shape
        time, down, across = self.stride
        shape = (batch, 3, 1 + (frames - 1) * time, height * down, width * across)
        pixels = None  # filled in place: a list of pieces would hold the clip twice
        start = 0
        for part in self.stream(latents, chunk=chunk):
            pixels = part.new_empty(shape) if pixels is None else pixels
            pixels[:, :, start : start + part.shape[2]] = part
            start += part.shape[2]
        assert pixels is not None, "a clip has at least one frame"
        return pixels

    def stream(self, latents: Tensor, *, chunk: int = 1) -> Iterator[Tensor]:
        """Decode piece by piece: yields pixels (B, 3, f, H, W) as soon as they are known."""
        yield from map(self.decoder_stream(), _chunks(latents, first=chunk, then=chunk))

    def decoder_stream(self) -> Callable[[Tensor], Tensor]:
        """A function that decodes the latent frames of one clip as they come, any number a call."""
        cache: Cache = {}
        return lambda part: self.reconstruct(part, cache).clamp(-1, 1)


def _chunks(x: Tensor, *, first: int, then: int) -> Iterator[Tensor]:
    if first < 1:
        raise ValueError(f"chunks of {then} latent frames: 1 is the least")
    yield x[:, :, :first]
    yield from x[:, :, first:].split(then, dim=2) if x.shape[2] > first else ()
