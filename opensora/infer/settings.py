"""What a call of the pipeline is told beside its prompts, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field

from opensora.config import Config
from opensora.diffusion.guidance import GuidanceConfig
from opensora.diffusion.schedule import FullSequenceConfig, ScheduleConfig
from opensora.errors import UsageError
from opensora.infer.caching.configs import CacheConfig

Seed = int | torch.Generator


class SamplingConfig(Config):
    """How a video is drawn."""

    sampler: Literal["euler", "heun", "dpmpp_2m", "ddim", "ancestral", "renoise"] = Field(
        default="euler",
        description="solver; ancestral and renoise draw fresh noise, the latter for few-step "
        "students",
    )
    schedule: ScheduleConfig = FullSequenceConfig(num_steps=30)
    guidance: GuidanceConfig = GuidanceConfig(scale=3.0)
    cache: CacheConfig | None = Field(
        default=None, description="spares work from step to step; None computes every step"
    )


@dataclass(frozen=True)
class Sample:
    """A finished video.

    Attributes:
        frames: uint8 (F, H, W, 3), or what `output_type` says (`calls.Names`).
        fps: frames per second.
    """

    prompt: str
    seed: int
    frames: Any
    fps: float


class Samples(list[Sample]):
    """The videos of a call."""

    @property
    def frames(self) -> list[Any]:
        """Of each, as diffusers' outputs have them."""
        return [sample.frames for sample in self]


@dataclass(frozen=True)
class Shape:
    """What to draw: pixel frames, height, width and frames per second."""

    num_frames: int
    height: int
    width: int
    fps: float


class Misfit(UsageError):
    """A shape that a model does not draw.

    Attributes:
        reason: what does not fit; the message says the nearest beside it.
        field: what is at fault.
        nearest: numbers of frames below and above, or the nearest height and width.
    """

    def __init__(self, reason: str, field: Literal["num_frames", "size"], nearest: tuple[int, int]):
        one, other = nearest
        fits = f"num_frames={one} or {other}"
        fits = fits if field == "num_frames" else f"height={one}, width={other}"
        super().__init__(f"{reason}: give {fits}")
        self.reason, self.field, self.nearest = reason, field, nearest


def check_fit(
    num_frames: int, height: int, width: int, *, stride: Sequence[int], patch: Sequence[int]
) -> None:
    """Refuse a video that a model does not draw, with the nearest that it does.

    Args:
        num_frames, height, width: of the video, in pixels.
        stride: of the VAE in time, height and width.
        patch: of the model, in the same order.

    Raises:
        Misfit: the frames are not 1 + stride k, or the sides no multiples of stride and patch.
    """
    time, (high, wide) = stride[0], (stride[1] * patch[1], stride[2] * patch[2])
    if num_frames < 1 or (num_frames - 1) % time:
        below = max(1, num_frames - (num_frames - 1) % time)
        reason = f"{num_frames} frames do not fit the model, which draws 1 + {time} k"
        raise Misfit(reason, "num_frames", (below, below + time))
    near = max(1, round(height / high)) * high, max(1, round(width / wide)) * wide
    if near != (height, width):
        raise Misfit(
            f"a height of {height} and a width of {width} do not fit the model, whose sides are "
            f"multiples of {high} and {wide}",
            "size",
            near,
        )
