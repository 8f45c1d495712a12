"""Videos longer than a model was trained for, in memory that does not grow with their length.

`windows` draws clips of the trained length one after the other, each given the last frames of the
one before it, which is how models trained with given frames extend a clip. `pyramid` keeps the
latent frames of one window at levels that rise with time: each step of the window finishes its
oldest chunk and lets a new one in (diffusion forcing, Chen et al. 2024; The Matrix, 2412.03568). It
needs a model whose frames were trained at levels of their own (`timesteps.levels: independent`).

Both yield frames as soon as they are finished.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from opensora import runtime
from opensora.config import Config
from opensora.data.transforms import to_uint8
from opensora.diffusion.schedule import SPACINGS
from opensora.diffusion.timesteps import shift_levels
from opensora.errors import UsageError
from opensora.infer.choices import out_of_memory
from opensora.infer.conditions import Given
from opensora.infer.pipeline import Callback, SamplingConfig, Shape, VideoPipeline

log = logging.getLogger("opensora")


class WindowsConfig(Config):
    """Clip after clip, each given the end of the one before it."""

    kind: Literal["windows"] = "windows"
    overlap: int = Field(
        default=2, ge=1, description="latent frames that a window is given of the one before it"
    )
    overlap_level: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="level from which they are changed; 0 keeps them as they are",
    )


class PyramidWindowConfig(Config):
    """A window at rising levels that moves over the video."""

    kind: Literal["pyramid"] = "pyramid"
    chunk: int = Field(default=1, ge=1, description="latent frames that descend together")
    context: int = Field(
        default=1, ge=1, description="finished latent frames that the window still sees"
    )


LongConfig = Annotated[WindowsConfig | PyramidWindowConfig, Field(discriminator="kind")]


def stream(
    pipeline: VideoPipeline,
    prompts: Sequence[str],
    *,
    num_frames: int,
    seed: int,
    long: WindowsConfig | PyramidWindowConfig,
    shape: Shape | None = None,
    sampling: SamplingConfig | None = None,
    negative_prompt: str = "",
    given: Sequence[Sequence[Given]] = (),
    callback: Callback | None = None,
) -> Iterator[np.ndarray]:
    """Draw one video piece by piece.

    Args:
        prompts: one for each window in turn; the last one goes on.
        num_frames: pixel frames of the video.
        shape: of a window; the trained shape by default.
        given: for each window in turn, frames that are there already.

    Yields:
        uint8 (f, H, W, 3), `num_frames` of them in all.

    Raises:
        UsageError: settings that leave a window nothing to draw, that `pyramid` has no use for, or
            for windows that the video does not have.
    """
    shape, sampling = shape or pipeline.shape, sampling or SamplingConfig()
    if num_frames < 1 or not prompts:
        raise UsageError("a video has at least one frame and one prompt")
    video = _Video(
        pipeline, tuple(prompts), num_frames, seed, shape, sampling, negative_prompt, callback
    )
    if isinstance(long, WindowsConfig):
        pieces = _windows(video, long, given)
    else:
        trained = pipeline.config.timesteps.levels
        if trained != "independent":
            _warn(
                f"a pyramid has frames at different levels, and this model was trained with "
                f"timesteps.levels={trained}: train with timesteps.levels=independent, or draw "
                "long videos in windows"
            )
        pieces = _pyramid(video, long, given)
    left = num_frames
    for piece in pieces:
        yield piece[:left]
        left -= len(piece)


@cache
def _warn(text: str) -> None:
    """Once for all videos of a process."""
    log.warning(text)


@dataclass(frozen=True)
class _Video:
    """What is drawn, whichever way; `stream` says what the attributes are."""

    pipeline: VideoPipeline
    prompts: tuple[str, ...]
    num_frames: int
    seed: int
    shape: Shape
    sampling: SamplingConfig
    negative_prompt: str
    callback: Callback | None


def _windows(
    video: _Video, long: WindowsConfig, given: Sequence[Sequence[Given]]
) -> Iterator[np.ndarray]:
    """Windows one after the other; frames that one shares with the last are not yielded again."""
    pipeline, shape, prompts = video.pipeline, video.shape, video.prompts
    stride = pipeline.vae.stride[0]
    latents = pipeline.latent_shape(shape)[1]
    if long.overlap >= latents:
        raise UsageError(
            f"long.overlap is {long.overlap}; windows of {shape.num_frames} frames have {latents} "
            "latent frames, so at most one less"
        )
    shared = 1 + stride * (long.overlap - 1)
    rest = max(0, video.num_frames - shape.num_frames)
    windows = 1 + math.ceil(rest / (shape.num_frames - shared))
    if len(prompts) > windows or any(given[windows:]):
        raise UsageError(
            f"{video.num_frames} frames are {windows} windows, and prompts or frames are given for "
            "later ones (counted from 0): leave them out, or ask for more frames"
        )
    last: np.ndarray | None = None
    for number in range(windows):
        own = list(given[number]) if number < len(given) else []
        if last is not None:
            own.insert(0, Given(last[-shared:], count=long.overlap, level=long.overlap_level))
        (sample,) = pipeline(
            prompts[min(number, len(prompts) - 1)],
            seeds=[video.seed if number == 0 else runtime.address(video.seed, "window", number)],
            shape=shape,
            sampling=video.sampling,
            negative_prompt=video.negative_prompt,
            given=[own],
            callback=video.callback,
        )
        yield sample.frames if last is None else sample.frames[shared:]
        last = sample.frames


@torch.no_grad()
def _pyramid(
    video: _Video, long: PyramidWindowConfig, given: Sequence[Sequence[Given]]
) -> Iterator[np.ndarray]:
    """Chunks of latent frames, decoded as they come out of the window."""
    pipeline, shape, sampling = video.pipeline, video.shape, video.sampling
    if len(video.prompts) > 1 or any(given):
        raise UsageError("long.kind=pyramid takes one prompt and no given frames: use windows")
    if sampling.schedule.kind != "full_sequence":
        raise UsageError(
            f"long.kind=pyramid has its own staircase: leave out schedule.kind="
            f"{sampling.schedule.kind}, or use windows"
        )
    if pipeline.savings.decode.tile is True or pipeline.savings.decode.chunk is not None:
        raise UsageError(
            "long.kind=pyramid decodes as it goes, and neither in tiles nor by decode.chunk: leave "
            "them out, or use windows"
        )
    channels, latents, height, width = pipeline.latent_shape(shape)
    active = (latents - long.context) // long.chunk
    if active < 1:
        raise UsageError(
            f"long.context {long.context} and long.chunk {long.chunk} leave nothing of a window of "
            f"{latents} latent frames"
        )
    total = math.ceil((1 + (video.num_frames - 1) / pipeline.vae.stride[0]) / long.chunk)
    lag = math.ceil(sampling.schedule.num_steps / active)
    ladder = shift_levels(
        SPACINGS[sampling.schedule.spacing](lag * active), pipeline.shift(shape, latents)
    ).float()
    guide = pipeline.guide(video.prompts, shape, sampling, video.negative_prompt, lag)

    def noise(chunk: int, *step: int, frames: int = long.chunk) -> Tensor:
        generator = runtime.generator(video.seed, "sample", chunk, *step)
        drawn = torch.randn(1, channels, frames, height, width, generator=generator)
        return drawn.to(pipeline.device)

    window = torch.cat([noise(chunk) for chunk in range(min(active, total))], dim=2)
    context = window[:, :, :0]
    rows = torch.arange(lag * active + 1)
    decode = pipeline.vae.decoder_stream()
    for first in range(total):
        held, seen = window.shape[2] // long.chunk, context.shape[2]
        behind = torch.arange(held).repeat_interleave(long.chunk) * lag
        levels = ladder[(rows[:, None] - behind).clamp(min=0)]
        levels = torch.cat([levels.new_zeros(len(levels), seen), levels], dim=1)
        x = torch.cat([context, window], dim=2)
        fresh = partial(noise, first, frames=x.shape[2])
        with out_of_memory(pipeline.device, pipeline.savings, "denoising", shape, 1):
            x = pipeline.walk(guide, x, levels, sampling, video.callback, fresh)
        context = x[:, :, : seen + long.chunk]
        with out_of_memory(pipeline.device, pipeline.savings, "decoding", shape, 1):
            frames = to_uint8(decode(context[:, :, seen:]))[0]
        yield frames
        context = context[:, :, -long.context :]
        window = x[:, :, seen + long.chunk :]
        if first + active < total:
            window = torch.cat([window, noise(first + active)], dim=2)
        rows = torch.arange(lag * (active - 1), lag * active + 1)
