"""What a call of the pipeline is told beside its prompts, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field

from opensora.config import Config
from opensora.diffusion.guidance import GuidanceConfig
from opensora.diffusion.schedule import FullSequenceConfig, ScheduleConfig
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
