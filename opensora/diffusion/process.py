"""What every diffusion process here shares: a curve from data to noise, and the algebra on it.

    x_t      = alpha(t)  data + sigma(t)  noise        t = 0 is data, t = 1 is noise
    velocity = alpha'(t) data + sigma'(t) noise

A process is its curve: the point (alpha, sigma) and the tangent (alpha', sigma'), parametrised so
that alpha sigma' - sigma alpha' = 1. Flow matching walks a straight line, variance-preserving
diffusion a circle; with that one rule data, noise, velocity and the losses on them convert by the
same formulas for both. Levels are per frame. Nothing here knows models, data or randomness.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, final

import pydantic
import torch
from pydantic import Field
from torch import Tensor

from opensora.config import Config

Quantity = Literal["velocity", "data", "noise"]
Predict = Callable[[Tensor, Tensor, Any], Tensor]


class ProcessConfig(Config):
    """What the network predicts, and in which space its error is measured."""

    prediction: Quantity = Field(default="velocity", description="what the network's output means")
    loss_space: Quantity = Field(
        default="velocity", description="the quantity whose error is squared"
    )
    min_divisor: float = Field(
        default=0.05,
        gt=0.0,
        lt=1.0,
        description="sigma (data prediction) or alpha (noise prediction) is not let below this "
        "where a conversion or loss weight divides by it; velocity prediction never divides",
    )
    min_snr_gamma: float | None = Field(
        default=None,
        gt=0.0,
        description="with loss_space noise: cap on the signal-to-noise ratio that weighs the "
        "data's error (min-SNR-gamma; 5 in the paper)",
    )

    @pydantic.model_validator(mode="after")
    def _gamma_needs_the_noise_loss(self) -> ProcessConfig:
        if self.min_snr_gamma is not None and self.loss_space != "noise":
            raise ValueError(
                f"min_snr_gamma caps the noise loss, but loss_space is '{self.loss_space}'; "
                "set loss_space: noise or remove min_snr_gamma"
            )
        return self


class Curve(NamedTuple):
    """Where a process stands at some levels, and where it is heading; each like the levels."""

    alpha: Tensor
    sigma: Tensor
    alpha_rate: Tensor
    sigma_rate: Tensor


class Process(ABC):
    """A curve from data to noise. Subclasses give `curve`; everything else follows from it.

    Shapes: latents, noise and predictions are (B, C, T, H, W); levels `t` are (B, T), or (B,) for
    one level a sample, float32 or float64 in [0, 1]. Results are at least float32.
    """

    def __init__(self, config: ProcessConfig) -> None:
        self.config = config

    @abstractmethod
    def curve(self, t: Tensor) -> Curve:
        """The curve at levels of any shape, in the dtype of `t`; exactly (1, 0) at t = 0."""

    @final
    def corrupt(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Data moved to its levels: alpha data + sigma noise. Frames at t = 0 stay the data."""
        at = self._at(t, data)
        return torch.addcmul(data * at.alpha, noise, at.sigma)

    @final
    def velocity(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The tangent: alpha' data + sigma' noise. For flow matching noise - data."""
        at = self._at(t, data)
        return torch.addcmul(data * at.alpha_rate, noise, at.sigma_rate)

    @final
    def target(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should have predicted, in `config.prediction`."""
        if self.config.prediction == "velocity":
            return self.velocity(data, noise, t)
        return data if self.config.prediction == "data" else noise

    @final
    def to_data(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The data that a prediction at (x, t) implies."""
        if self.config.prediction == "data":
            return _wide(_same_shape(prediction, x))
        at = self._at(t, _same_shape(x, prediction))
        if self.config.prediction == "velocity":
            return torch.addcmul(x * at.sigma_rate, prediction, at.sigma, value=-1)
        return torch.addcmul(x, prediction, at.sigma, value=-1) / self._divisor(at.alpha)

    @final
    def to_noise(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction at (x, t) implies."""
        if self.config.prediction == "noise":
            return _wide(_same_shape(prediction, x))
        at = self._at(t, _same_shape(x, prediction))
        if self.config.prediction == "velocity":
            return torch.addcmul(prediction * at.alpha, x, at.alpha_rate, value=-1)
        return torch.addcmul(x, prediction, at.alpha, value=-1) / self._divisor(at.sigma)

    @final
    def to_velocity(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The velocity that a prediction at (x, t) implies.

        Data prediction divides by sigma as in Li and He 2025, "Back to Basics: Let Denoising
        Generative Models Denoise" (JiT), whose floor of 0.05 is the flow's default `min_divisor`.
        """
        if self.config.prediction == "velocity":
            return _wide(_same_shape(prediction, x))
        at = self._at(t, _same_shape(x, prediction))
        if self.config.prediction == "data":
            return (x * at.sigma_rate - prediction) / self._divisor(at.sigma)
        return (x * at.alpha_rate + prediction) / self._divisor(at.alpha)

    @final
    def loss_weight(self, t: Tensor) -> Tensor:
        """What turns a squared error of the prediction into one of `config.loss_space`.

        At a fixed x_t the errors are proportional (data : noise : velocity = sigma : alpha : 1),
        so measuring in another space is a weight on each frame and needs no conversion of
        tensors. Min-SNR-gamma (Hang et al. 2023, "Efficient Diffusion Training via Min-SNR
        Weighting Strategy") is the noise loss, but at most gamma times the data loss.

        Returns:
            Weights with the shape and dtype of `t`.
        """
        at = self.curve(t)
        scale = {"velocity": torch.ones_like(t), "data": at.sigma, "noise": at.alpha}
        predicted = scale[self.config.prediction]

        def weight_of(space: Quantity) -> Tensor:
            if space == self.config.prediction:
                return torch.ones_like(t)
            return (scale[space] / self._divisor(predicted)).square()

        weight = weight_of(self.config.loss_space)
        if self.config.min_snr_gamma is not None:
            weight = torch.minimum(weight, self.config.min_snr_gamma * weight_of("data"))
        return weight

    @final
    def loss_per_frame(self, prediction: Tensor, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The weighted squared error, averaged over C, H and W: at least float32 (B, T).

        The caller sums it over the frames that count (those not given) and divides by how many
        of those there are on all ranks.
        """
        target = self.target(_same_shape(data, prediction), noise, t)
        weight = self.loss_weight(_check_levels(t, data))
        error = (_wide(prediction) - target).square().mean(dim=(1, 3, 4))  # (B, T)
        return error * (weight if t.ndim == 2 else weight[:, None]).to(error.dtype)

    @final
    def denoiser(self, model: Predict) -> Predict:
        """`model(x, t, condition)` -> prediction, as a function to the data it implies."""

        def predict_data(x: Tensor, t: Tensor, condition: Any) -> Tensor:
            return self.to_data(model(x, t, condition), x, t)

        return predict_data

    def _divisor(self, value: Tensor) -> Tensor:
        return value.clamp(min=self.config.min_divisor)

    def _at(self, t: Tensor, x: Tensor) -> Curve:
        """The curve as (B, 1, 1 or T, 1, 1) tensors that multiply `x`, at least in float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        points = self.curve(_check_levels(t, x))
        return Curve(*(per_frame(value).to(wide) for value in points))


def per_frame(values: Tensor) -> Tensor:
    """(B,) or (B, T) numbers as (B, 1, 1 or T, 1, 1), to multiply (B, C, T, H, W)."""
    return values.reshape(values.shape[0], 1, -1, 1, 1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_levels(t: Tensor, x: Tensor) -> Tensor:
    if x.ndim != 5:
        raise ValueError(f"latents are (B, C, T, H, W), found shape {tuple(x.shape)}")
    batch, frames = x.shape[0], x.shape[2]
    if tuple(t.shape) not in {(batch,), (batch, frames)}:
        raise ValueError(
            f"levels have shape {tuple(t.shape)}; latents {tuple(x.shape)} need ({batch},) "
            f"or ({batch}, {frames})"
        )
    if t.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"levels are {t.dtype}; pass float32 or float64, narrower types merge neighbouring "
            "levels"
        )
    return t


def _same_shape(tensor: Tensor, other: Tensor) -> Tensor:
    if tensor.shape != other.shape:
        raise ValueError(
            f"prediction and latents differ in shape: {tuple(tensor.shape)} and "
            f"{tuple(other.shape)}; a network that also predicts variances must drop them first"
        )
    return tensor
