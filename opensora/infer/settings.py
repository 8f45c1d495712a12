"""What a call of the pipeline is told beside its prompts, in words of its own or diffusers'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

import numpy as np
import torch
from pydantic import Field

from opensora.config import Config, validate
from opensora.diffusion.guidance import GuidanceConfig
from opensora.diffusion.schedule import FullSequenceConfig, ScheduleConfig
from opensora.errors import did_you_mean
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
        frames: uint8 (F, H, W, 3).
        fps: frames per second.
    """

    prompt: str
    seed: int
    frames: np.ndarray
    fps: float


@dataclass(frozen=True)
class Shape:
    """What to draw: pixel frames, height, width and frames per second."""

    num_frames: int
    height: int
    width: int
    fps: float


class Names(TypedDict, total=False):
    """Arguments as diffusers' video pipelines call them; each goes over `shape` or `sampling`."""

    num_frames: int
    height: int
    width: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    generator: torch.Generator | Sequence[torch.Generator]


def settle(
    shape: Shape, sampling: SamplingConfig, names: Names
) -> tuple[Shape, SamplingConfig, list[Seed] | None]:
    """Shape, sampling and seeds with the named ones laid over them.

    Raises:
        TypeError: for another name.
    """
    if not names:
        return shape, sampling, None
    unknown = sorted(set(names) - set(Names.__annotations__))
    if unknown:
        hint = did_you_mean(unknown[0], Names.__annotations__)
        raise TypeError(f"a pipeline takes no argument '{unknown[0]}'.{hint}")
    sizes = {k: v for k, v in names.items() if k in ("num_frames", "height", "width", "fps")}
    shape = replace(shape, **sizes)  # type: ignore[arg-type]
    tree = sampling.model_dump()
    if "num_inference_steps" in names:
        tree["schedule"]["num_steps"] = names["num_inference_steps"]
    if "guidance_scale" in names:
        tree["guidance"]["scale"] = names["guidance_scale"]
    given = names.get("generator")
    seeds: list[Seed] | None = None
    if given is not None:
        seeds = [given] if isinstance(given, torch.Generator) else list(given)
    return shape, validate(SamplingConfig, tree, where="sampling"), seeds
