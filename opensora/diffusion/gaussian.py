"""Variance-preserving diffusion: DDPM and EDM as one circle walked at different paces.

    x_t = cos(angle) data + sin(angle) noise        velocity = cos(angle) noise - sin(angle) data

DDPM tabulates the angle from its betas; index n of the usual tables (n = 0 ... N-1) is t = (n+1)/N
and t = 0 is the data. EDM's preconditioned network is the same circle: with data of unit variance,
c_in (data + s noise) = x_t at tan(angle) = s, and its raw output is minus our velocity, so that
EDM's weighted loss is the plain velocity loss (Karras et al. 2022, "Elucidating the Design Space
of Diffusion-Based Generative Models", table 1 and equation 8). Data of another standard deviation
sigma_data is divided by it first, and s with it. Conversions and losses are in `process`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, final

import pydantic
import torch
from pydantic import Field
from torch import Tensor

from opensora.config import Config
from opensora.diffusion.process import Curve, Process, ProcessConfig, Quantity


class LinearBetas(Config):
    """Betas that grow linearly (Ho et al. 2020); DiT, Latte, PixArt."""

    kind: Literal["linear"] = "linear"
    start: float = Field(default=1e-4, gt=0.0, lt=1.0, description="beta of the first step")
    end: float = Field(default=0.02, gt=0.0, lt=1.0, description="beta of the last step")


class ScaledLinearBetas(Config):
    """Betas whose square roots grow linearly; Stable Diffusion, CogVideoX."""

    kind: Literal["scaled_linear"] = "scaled_linear"
    start: float = Field(default=0.00085, gt=0.0, lt=1.0, description="beta of the first step")
    end: float = Field(default=0.012, gt=0.0, lt=1.0, description="beta of the last step")


class CosineBetas(Config):
    """Squared-cosine alpha-bar (Nichol and Dhariwal 2021, equation 17), betas at most 0.999."""

    kind: Literal["cosine"] = "cosine"
    offset: float = Field(
        default=0.008, ge=0.0, lt=1.0, description="keeps the first betas from vanishing"
    )


Betas = Annotated[LinearBetas | ScaledLinearBetas | CosineBetas, Field(discriminator="kind")]


class DDPMConfig(ProcessConfig):
    """Denoising diffusion on a table of betas, read at any t in [0, 1]."""

    kind: Literal["ddpm"] = "ddpm"
    prediction: Quantity = Field(default="noise", description="what the network's output means")
    loss_space: Quantity = Field(default="noise", description="the quantity whose error is squared")
    min_divisor: float = Field(
        default=1e-3,
        gt=0.0,
        lt=1.0,
        description="sigma (data prediction) or alpha (noise prediction) is not let below this "
        "where a conversion or loss weight divides by it; velocity prediction never divides",
    )
    betas: Betas = Field(default=LinearBetas(), description="how fast noise is added")
    num_steps: int = Field(default=1000, ge=2, description="entries of the beta table")
    zero_terminal_snr: bool = Field(
        default=False, description="rescale the table so that t = 1 is pure noise (Lin et al. 2023)"
    )

    @pydantic.model_validator(mode="after")
    def _noise_says_nothing_at_zero_snr(self) -> DDPMConfig:
        if self.zero_terminal_snr and self.prediction == "noise":
            raise ValueError(
                "zero_terminal_snr makes x_1 the noise itself, from which a noise prediction "
                "recovers no data; set prediction: velocity or data"
            )
        return self


class EDMConfig(ProcessConfig):
    """EDM (Karras et al. 2022) for data of unit variance; the angle grows linearly with t.

    The rest of EDM is where levels are spent: `timesteps` kind log_normal in training and
    the karras spacing of `schedule` in sampling.
    """

    kind: Literal["edm"] = "edm"
    prediction: Literal["velocity"] = Field(
        default="velocity", description="EDM's preconditioned output, up to its sign"
    )


@final
class Gaussian(Process):
    """The circle. `velocity` is the v of Salimans and Ho 2022, alpha noise - sigma data."""

    def __init__(self, config: DDPMConfig | EDMConfig) -> None:
        super().__init__(config)
        self._angles = angles(config) if isinstance(config, DDPMConfig) else None

    def angle(self, t: Tensor) -> Tensor:
        """Radians from the data axis, non-decreasing in t, from 0 at t = 0 to at most pi / 2."""
        if self._angles is None:
            return t * (math.pi / 2)
        num_steps = self._angles.numel() - 1
        table = self._angles.to(t.dtype).to(t.device)  # in this order: MPS has no float64
        position = t * num_steps
        lower = position.floor().clamp(0, num_steps - 1).long()
        return torch.lerp(table[lower], table[lower + 1], position - lower)

    def curve(self, t: Tensor) -> Curve:
        angle = self.angle(t)
        alpha, sigma = angle.cos().clamp(min=0.0), angle.sin()
        return Curve(alpha, sigma, alpha_rate=-sigma, sigma_rate=alpha)


def betas(config: DDPMConfig) -> Tensor:
    """The variances added by each step, before any rescaling: float64 (num_steps,)."""
    choice, count = config.betas, config.num_steps
    if isinstance(choice, LinearBetas):
        return torch.linspace(choice.start, choice.end, count, dtype=torch.float64)
    if isinstance(choice, ScaledLinearBetas):
        roots = (math.sqrt(choice.start), math.sqrt(choice.end))
        return torch.linspace(*roots, count, dtype=torch.float64).square()
    time = torch.arange(count + 1, dtype=torch.float64) / count
    alpha_bar = torch.cos((time + choice.offset) / (1 + choice.offset) * math.pi / 2).square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def angles(config: DDPMConfig) -> Tensor:
    """The angle at t = n / num_steps for n = 0 ... num_steps: float64 radians (num_steps + 1,).

    Angles rather than alphas are kept because sine and cosine of them are accurate at both ends in
    any dtype, where sqrt(1 - alpha^2) is not.
    """
    log_alpha_bar = torch.log1p(-betas(config)).cumsum(0)
    alpha, sigma = (log_alpha_bar / 2).exp(), (-torch.expm1(log_alpha_bar)).sqrt()
    if config.zero_terminal_snr:  # Lin et al. 2023, algorithm 1
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        sigma = (1 - alpha.square()).sqrt()
    return torch.cat([alpha.new_zeros(1), torch.atan2(sigma, alpha)])
