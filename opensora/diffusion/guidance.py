"""Guidance: a data predictor and what it may be told or not -> one `denoise`.

A guided estimate is a line through several: told everything, not told the text, and not shown the
given frames either. It is linear and x_t is shared, so guiding data, noise or velocity gives the
same result; it is done on data, where rescaling also means what it should: it restores the contrast
of the video and never scales the noise that a velocity contains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pydantic
import torch
from pydantic import Field
from torch import Tensor

from opensora.config import Config
from opensora.diffusion.process import per_frame
from opensora.types import Condition, concatenate

PredictData = Callable[[Tensor, Tensor, Condition], Tensor]
Branch = Callable[[], Tensor]
Spread = Callable[[Sequence[Branch], Tensor], list[Tensor]]
"""(branches, x) -> the estimate of each, which is like x."""
Hide = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Oscillation = Literal["none", "text", "frames", "both"]

STEADY_STEPS = 10
"""Steps before guidance begins to oscillate, as in Open-Sora 1.3 and 2.0."""


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
    batched: bool | Literal["auto"] = Field(
        default="auto",
        description="one call on all branches rather than one for each; auto: where memory is "
        "there for it",
    )
    frames_scale: float = Field(
        default=1.0,
        ge=0.0,
        description="guidance towards given frames, 1 is off; costs one more branch",
    )
    frames_ramp: bool = Field(
        default=False,
        description="frames_scale grows from 1 at the first frame to the last, and falls to 1 "
        "over the steps",
    )
    oscillation: Oscillation = Field(
        default="none",
        description="what is guided in every other step only after the first 10: none, text, "
        "frames, both",
    )

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
    *,
    hide: Hide | None = None,
    weaker: PredictData | None = None,
    num_steps: int = 1,
    spread: Spread | None = None,
    **options: Any,
) -> Guide:
    """A `denoise(x, t)` for samplers: uncond + scale (cond - uncond), Ho and Salimans 2022.

    Args:
        predict: (x, t, condition) -> data estimate, as `process.denoiser(model)` makes it.
        cond: B conditions.
        uncond: B conditions, or one for all: the null or a negative prompt.
        scale: guidance scale; at 1 `predict` is called once, with `cond`.
        hide: (x, t) -> the same without the given frames, which are pure noise there; needed for
            a frames_scale other than 1.
        weaker: the data estimate of a worse model, which then takes the place of `uncond` and is
            told what `predict` is told (autoguidance, Karras et al. 2024, arXiv 2406.02507).
        num_steps: of the schedule, for `frames_ramp`.
        spread: computes the branches in another way, such as on several ranks.
        options: the other keys of `GuidanceConfig`. Of memory nothing is known here: auto is one
            call.

    Returns:
        (x, t) -> data estimate, with x (B, C, T, H, W) and t (B, T).

    Raises:
        ValueError: when `uncond` has neither 1 nor B rows, or frames are to be guided by without
            `hide` or beside a weaker model.
    """
    config = GuidanceConfig(scale=scale, **options)
    if len(uncond) == 1:
        uncond = uncond[[0] * len(cond)]
    if len(uncond) != len(cond):
        raise ValueError(f"uncond has {len(uncond)} rows; it needs 1 or {len(cond)} as cond has")
    if config.frames_scale != 1 and (hide is None or weaker is not None):
        raise ValueError(
            f"frames_scale is {config.frames_scale}; it needs hide= and no weaker model"
        )
    return Guide(predict, cond, uncond, config, hide, weaker, num_steps, spread)


class Guide:
    """What `classifier_free` gives: a function of x and t that knows which step it is in.

    With given frames (InstructPix2Pix, Brooks et al. 2023, equation 3; Open-Sora 2.0):

        blind + frames_scale (seen - blind) + scale (told - seen)

    where `told` has text and frames, `seen` no text, `blind` neither; frames are hidden by noise of
    level 1 (Song et al. 2025, "History-Guided Video Diffusion"). Where the text is not guided by at
    all (scale 1) both branches are told it: blind' + frames_scale (told - blind'). Only frames at
    levels in the interval (low, high] are guided, the others are `told` (Kynkäänniemi et al. 2024);
    given frames, at level 0, never are. rescale is phi of Lin et al. 2023, "Common Diffusion Noise
    Schedules and Sample Steps are Flawed", equations 14 to 16, taken frame by frame, because frames
    may be at different levels.
    """

    def __init__(
        self,
        predict: PredictData,
        cond: Condition,
        uncond: Condition,
        config: GuidanceConfig,
        hide: Hide | None,
        weaker: PredictData | None,
        num_steps: int,
        spread: Spread | None,
    ):
        self.predict, self.cond, self.uncond = predict, cond, uncond
        self.config, self.hide, self.weaker = config, hide, weaker
        self.num_steps, self.spread, self.step = num_steps, spread, 0
        # An object for each branch, by which a step cache tells one from another.
        blind = {"told blind": replace(cond), "blind": replace(uncond)}
        self._words = {"told": cond, "seen": uncond, **blind}
        self._joined: dict[tuple[str, ...], Condition] = {}

    def after(self, step: int) -> None:
        """A step of the sampler, counted from 0, is over."""
        self.step = step + 1

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        scale, frames = self._scale("text", self.config.scale), self._frames_scale(x)
        if self.config.scale == 1 and self.config.frames_scale == 1:
            return self.predict(x, t, self.cond)
        low, high = self.config.interval
        guided = (t > low) & (t <= high)
        # The test costs a wait for the device, so it is made only where it can spare a call.
        if (low > 0 or high < 1) and not guided.any():
            return self.predict(x, t, self.cond)
        if frames is None and scale == 1:
            return self.predict(x, t, self.cond)
        told, data = self._combined(x, t, scale, frames)
        if self.config.rescale > 0:
            data = data * _contrast(told, data, self.config.rescale)
        return torch.where(per_frame(guided), data, told)

    def _combined(
        self, x: Tensor, t: Tensor, scale: float, frames: Tensor | float | None
    ) -> tuple[Tensor, Tensor]:
        """The estimate that is told everything, and the guided one."""
        if self.weaker is not None:
            strong = partial(self.predict, x, t, self.cond)
            told, worse = self._each([strong, partial(self.weaker, x, t, self.cond)], x)
            return told, torch.lerp(worse, told, scale)
        if frames is None:
            told, seen = self._estimates(x, t, ("told", "seen"))
            return told, torch.lerp(seen, told, scale)
        if self.config.scale == 1:
            told, blind = self._estimates(x, t, ("told", "told blind"))
            return told, blind + frames * (told - blind)
        told, seen, blind = self._estimates(x, t, ("told", "seen", "blind"))
        return told, blind + frames * (seen - blind) + scale * (told - seen)

    def _estimates(self, x: Tensor, t: Tensor, branches: tuple[str, ...]) -> list[Tensor]:
        """The estimate of each branch, in one call or one after the other."""
        inputs = []
        for branch in branches:
            shown = (x, t)
            if branch.endswith("blind") and self.hide is not None:
                shown = self.hide(x, t)
            inputs.append((*shown, self._words[branch]))
        if self.spread is not None or not self.config.batched:
            return self._each([partial(self.predict, *one) for one in inputs], x)
        if branches not in self._joined:
            self._joined[branches] = concatenate([one[2] for one in inputs])
        xs, ts = torch.cat([one[0] for one in inputs]), torch.cat([one[1] for one in inputs])
        return list(self.predict(xs, ts, self._joined[branches]).chunk(len(branches)))

    def _each(self, branches: Sequence[Branch], x: Tensor) -> list[Tensor]:
        if self.spread is not None:
            return self.spread(branches, x)
        return [branch() for branch in branches]

    def _scale(self, which: Oscillation, scale: float) -> float:
        """A scale as it is in this step."""
        rests = self.step >= STEADY_STEPS and self.step % 2 == 1
        return 1.0 if rests and self.config.oscillation in (which, "both") else scale

    def _frames_scale(self, x: Tensor) -> Tensor | float | None:
        """frames_scale in this step, for each frame where it is a ramp; None where it is off."""
        scale = self._scale("frames", self.config.frames_scale)
        if scale == 1:
            return None
        if not self.config.frames_ramp:
            return scale
        end = 1 + (scale - 1) * (1 - self.step / max(1, self.num_steps))
        return torch.linspace(1, end, x.shape[2], device=x.device, dtype=x.dtype).view(-1, 1, 1)


def _contrast(reference: Tensor, data: Tensor, rescale: float) -> Tensor:
    """The factor that takes each frame's standard deviation towards that of `reference`."""
    dims = (1, 3, 4)
    wanted = reference.std(dim=dims, keepdim=True, correction=0)  # (B, 1, T, 1, 1)
    found = data.std(dim=dims, keepdim=True, correction=0)
    smallest = torch.finfo(found.dtype).tiny
    return rescale * (wanted / found.clamp(min=smallest)) + (1 - rescale)
