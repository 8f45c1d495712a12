"""Classifier-free guidance: a conditional data predictor and two conditions -> one `denoise`.

Guidance is linear and x_t is shared, so guiding data, noise or velocity gives the same result; it
is done on data, where rescaling also means what it should: it restores the contrast of the video
and never scales the noise that a velocity contains.
"""

from __future__ import annotations

from collections.abc import Callable

import pydantic
import torch
from pydantic import Field
from torch import Tensor

from opensora.config import Config
from opensora.diffusion.process import per_frame
from opensora.types import Condition, concatenate

PredictData = Callable[[Tensor, Tensor, Condition], Tensor]


class GuidanceConfig(Config):
    """The keyword arguments of `classifier_free`."""

    scale: float = Field(
        default=4.0, ge=0.0, description="1 follows the condition, more exaggerates it"
    )
    rescale: float = Field(
        default=0.0, ge=0.0, le=1.0, description="how far each frame's contrast is restored"
    )
    interval: tuple[float, float] = Field(
        default=(0.0, 1.0), description="levels (above, up to) at which guidance acts"
    )
    batched: bool = Field(default=True, description="one call on 2 B samples rather than two on B")

    @pydantic.field_validator("interval")
    @classmethod
    def _ordered(cls, interval: tuple[float, float]) -> tuple[float, float]:
        low, high = interval
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(f"interval is {interval}; it needs 0 <= low < high <= 1")
        return interval


def classifier_free(
    predict: PredictData,
    cond: Condition,
    uncond: Condition,
    scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
    batched: bool = True,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A `denoise(x, t)` for samplers: uncond + scale (cond - uncond), Ho and Salimans 2022.

    Args:
        predict: (x, t, condition) -> data estimate, as `process.denoiser(model)` makes it.
        cond: B conditions.
        uncond: B conditions, or one for all: the null or a negative prompt.
        scale: guidance scale; at 1 `predict` is called once, with `cond`.
        rescale: phi in [0, 1] of Lin et al. 2023, "Common Diffusion Noise Schedules and Sample
            Steps are Flawed", equations 14 to 16; standard deviations are taken frame by frame,
            because frames may be at different levels. 1 restores the conditional ones.
        interval: frames at levels in (low, high] are guided, the others follow `cond`
            (Kynkäänniemi et al. 2024). Given frames, at level 0, are never guided.
        batched: False halves the memory of activations and calls `predict` twice.

    Returns:
        (x, t) -> data estimate, with x (B, C, T, H, W) and t (B, T).

    Raises:
        ValueError: when `uncond` has neither 1 nor B rows.
    """
    if scale == 1:
        return lambda x, t: predict(x, t, cond)
    if len(uncond) == 1:
        uncond = uncond[[0] * len(cond)]
    if len(uncond) != len(cond):
        raise ValueError(f"uncond has {len(uncond)} rows; it needs 1 or {len(cond)} as cond has")
    both = concatenate([cond, uncond]) if batched else None
    low, high = interval

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        guided = (t > low) & (t <= high)
        # The test costs a wait for the device, so it is made only where it can spare a call.
        if (low > 0 or high < 1) and not guided.any():
            return predict(x, t, cond)
        if both is not None:
            with_cond, without = predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        else:
            with_cond, without = predict(x, t, cond), predict(x, t, uncond)
        data = torch.lerp(without, with_cond, scale)
        if rescale > 0:
            data = data * _contrast(with_cond, data, rescale)
        return torch.where(per_frame(guided), data, with_cond)

    return denoise


def _contrast(reference: Tensor, data: Tensor, rescale: float) -> Tensor:
    """The factor that takes each frame's standard deviation towards that of `reference`."""
    dims = (1, 3, 4)
    wanted = reference.std(dim=dims, keepdim=True, correction=0)  # (B, 1, T, 1, 1)
    found = data.std(dim=dims, keepdim=True, correction=0)
    smallest = torch.finfo(found.dtype).tiny
    return rescale * (wanted / found.clamp(min=smallest)) + (1 - rescale)
