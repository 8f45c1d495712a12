"""Noise levels for training: a pure function of uniform numbers that the caller addresses.

The level of a sample depends on its own uniforms and on its shape only. Levels are not stratified
across the batch, because then a sample's level would depend on its neighbours, and the same sample
would train differently on another number of ranks.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import pydantic
import torch
from pydantic import Field
from torch import Tensor

from opensora.config import Config


class ConstantShiftConfig(Config):
    """The same shift for every shape; 1 leaves levels as drawn, 3 favours noise."""

    kind: Literal["constant"] = "constant"
    value: float = Field(default=1.0, gt=0.0, description="shift towards noise (> 1) or data (< 1)")


class SquareRootShiftConfig(Config):
    """Shift sqrt(tokens / base_tokens) sqrt(T): Open-Sora 1.2, Esser et al. 2024 equation 23.

    The default base is 512x512 pixels behind an 8x VAE and 2x2 patches.
    """

    kind: Literal["square_root"] = "square_root"
    base_tokens: int = Field(
        default=1024, ge=1, description="tokens of a frame at which the shift is 1"
    )


class LinearShiftConfig(Config):
    """Shift linear in a frame's tokens, times sqrt(T): Open-Sora 2.0. The line is extended."""

    kind: Literal["linear"] = "linear"
    low_tokens: int = Field(
        default=256, ge=1, description="tokens of a frame at which the shift is `low`"
    )
    low: float = Field(
        default=1.0, gt=0.0, description="shift of an image with `low_tokens` tokens"
    )
    high_tokens: int = Field(default=4096, ge=1, description="tokens at which the shift is `high`")
    high: float = Field(
        default=3.0, gt=0.0, description="shift of an image with `high_tokens` tokens"
    )

    @pydantic.model_validator(mode="after")
    def _rising_and_positive(self) -> LinearShiftConfig:
        if self.high_tokens <= self.low_tokens:
            raise ValueError(
                f"high_tokens ({self.high_tokens}) must exceed low_tokens ({self.low_tokens})"
            )
        slope = (self.high - self.low) / (self.high_tokens - self.low_tokens)
        if self.high < self.low or self.low - slope * self.low_tokens <= 0:
            raise ValueError(
                f"the line through ({self.low_tokens}, {self.low}) and ({self.high_tokens}, "
                f"{self.high}) must rise and stay above 0 down to 0 tokens; raise `low`"
            )
        return self


ShiftConfig = Annotated[
    ConstantShiftConfig | SquareRootShiftConfig | LinearShiftConfig, Field(discriminator="kind")
]


class LevelsConfig(Config):
    """What every distribution of levels can be asked to do besides."""

    shift: ShiftConfig = Field(
        default=ConstantShiftConfig(), description="t -> s t / (1 + (s - 1) t)"
    )
    levels: Literal["shared", "independent"] = Field(
        default="shared",
        description="one level a sample, or one a frame (diffusion forcing, Chen et al. 2024)",
    )


class UniformConfig(LevelsConfig):
    """Levels uniform in (0, 1)."""

    kind: Literal["uniform"] = "uniform"


class LogitNormalConfig(LevelsConfig):
    """Levels whose logit is normal (Esser et al. 2024, equation 19); a higher mean is noisier.

    Papers whose t = 1 is data state the opposite sign: JiT's mean of -0.8 is 0.8 here.
    """

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = Field(default=0.0, description="mean of log(t / (1 - t))")
    std: float = Field(default=1.0, gt=0.0, description="standard deviation of log(t / (1 - t))")


class LogNormalConfig(LevelsConfig):
    """EDM's log-normal noise over data ratio, as levels of the `edm` process (Karras et al. 2022).

    The ratio is sigma / sigma_data: with the paper's sigma_data of 0.5 its mean of -1.2 is
    -1.2 - log(0.5) = -0.51 here, where data has unit variance.
    """

    kind: Literal["log_normal"] = "log_normal"
    mean: float = Field(default=-0.51, description="mean of log(sigma / sigma_data)")
    std: float = Field(
        default=1.2, gt=0.0, description="standard deviation of log(sigma / sigma_data)"
    )


TimestepConfig = Annotated[
    UniformConfig | LogitNormalConfig | LogNormalConfig, Field(discriminator="kind")
]


def num_uniforms(config: LevelsConfig, num_frames: int) -> int:
    """How many uniform numbers a sample of `num_frames` latent frames needs."""
    return num_frames if config.levels == "independent" else 1


def draw(u: Tensor, config: LevelsConfig, *, num_frames: int, tokens_per_frame: int) -> Tensor:
    """Training levels from uniform numbers.

    Args:
        u: float (B, num_uniforms) in [0, 1), on the CPU, addressed by sample and step.
        num_frames: T latent frames.
        tokens_per_frame: tokens of one latent frame after patching; decides the shift.

    Returns:
        float32 (B, T) in (0, 1]. Given frames are set to 0 by the caller:
        `t.masked_fill(given, 0.0)`.

    Raises:
        ValueError: when `u` does not have one number for each level.
    """
    count = num_uniforms(config, num_frames)
    if u.ndim != 2 or u.shape[1] != count:
        raise ValueError(
            f"{config.levels} levels of {num_frames} frames need uniforms of shape (B, {count}), "
            f"found {tuple(u.shape)}"
        )
    # float32 uniforms lie on multiples of 2^-24 from 0; half a step moves them inside (0, 1).
    t = _distribution((u.double() + 2.0**-25).clamp(max=1 - 2.0**-25), config)
    shift = shift_for(config.shift, num_frames=num_frames, tokens_per_frame=tokens_per_frame)
    return shift_levels(t, shift).float().expand(-1, num_frames).contiguous()


def _distribution(u: Tensor, config: LevelsConfig) -> Tensor:
    if isinstance(config, UniformConfig):
        return u
    if isinstance(config, LogitNormalConfig):
        return torch.sigmoid(config.mean + config.std * torch.special.ndtri(u))
    if isinstance(config, LogNormalConfig):
        ratio = torch.exp(config.mean + config.std * torch.special.ndtri(u))
        return torch.atan(ratio) * (2 / math.pi)
    raise TypeError(f"{type(config).__name__} is no distribution of levels")


def shift_levels(t: Tensor, shift: float | Tensor) -> Tensor:
    """Levels with the noise to data ratio t / (1 - t) multiplied by `shift`; fixes 0 and 1."""
    return shift * t / (1 + (shift - 1) * t)


def shift_for(config: ShiftConfig, *, num_frames: int, tokens_per_frame: int) -> float:
    """The shift for clips of T latent frames with `tokens_per_frame` tokens each.

    Longer and larger clips carry more redundant signal, so the same t destroys less of it.
    """
    if isinstance(config, ConstantShiftConfig):
        return config.value
    if isinstance(config, SquareRootShiftConfig):
        return math.sqrt(tokens_per_frame / config.base_tokens) * math.sqrt(num_frames)
    slope = (config.high - config.low) / (config.high_tokens - config.low_tokens)
    return (config.low + slope * (tokens_per_frame - config.low_tokens)) * math.sqrt(num_frames)
