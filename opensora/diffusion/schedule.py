"""The sampling schedule: a matrix of noise levels, one row a step and one column a frame.

Row 0 is where sampling starts, the last row is all 0 where it ends in data, and one network call
takes a row to the next. Text-to-video, autoregressive chunks and pyramids differ only in how long
each frame waits before it starts down the same list of levels, so all of them are one staircase.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from opensora.config import Config
from opensora.diffusion.timesteps import shift_levels
from opensora.errors import UsageError

Spacing = Callable[[int], Tensor]


def uniform(num_steps: int) -> Tensor:
    """Evenly spaced levels from 1 to 0: float64 (num_steps + 1,)."""
    return torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)


def karras(
    num_steps: int, sigma_min: float = 0.004, sigma_max: float = 160.0, rho: float = 7.0
) -> Tensor:
    """EDM's noise levels (Karras et al. 2022, equation 5) as levels of the `edm` process, then 0.

    Args:
        sigma_min, sigma_max: standard deviation of the noise over that of the data; the paper's
            0.002 and 80 at its sigma_data of 0.5.

    Returns:
        float64 (num_steps + 1,).
    """
    ramp = torch.linspace(1.0, 0.0, num_steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    levels = torch.atan((low + ramp * (high - low)) ** rho) * (2 / math.pi)
    return torch.cat([levels, levels.new_zeros(1)])


SPACINGS: dict[str, Spacing] = {"uniform": uniform, "karras": karras}


def full_sequence(
    num_steps: int,
    num_frames: int,
    *,
    shift: float = 1.0,
    given: Tensor | None = None,
    spacing: Spacing = uniform,
) -> Tensor:
    """All frames descend together: text-to-video, and every kind of given frame.

    Args:
        num_steps: steps that each frame takes.
        num_frames: T latent frames.
        shift: of the levels towards noise, as in training.
        given: bool (T,), or (B, T) where samples differ; these frames stay at level 0.
        spacing: levels before the shift.

    Returns:
        float32 (num_steps + 1, T), or (num_steps + 1, B, T) when `given` is (B, T).
    """
    return pyramid(num_steps, num_frames, lag=0, shift=shift, given=given, spacing=spacing)


def autoregressive(
    num_steps: int,
    num_frames: int,
    *,
    chunk: int = 1,
    shift: float = 1.0,
    given: Tensor | None = None,
    spacing: Spacing = uniform,
) -> Tensor:
    """Chunks of frames one after the other; a chunk starts when the one before it is data.

    Returns:
        float32 (num_chunks num_steps + 1, T), or with B before T when `given` is (B, T).
    """
    return pyramid(
        num_steps,
        num_frames,
        lag=num_steps,
        chunk=chunk,
        shift=shift,
        given=given,
        spacing=spacing,
    )


def pyramid(
    num_steps: int,
    num_frames: int,
    *,
    lag: int = 1,
    chunk: int = 1,
    shift: float = 1.0,
    given: Tensor | None = None,
    spacing: Spacing = uniform,
) -> Tensor:
    """A staircase: each chunk of frames starts `lag` steps after the one before it.

    `lag` 0 is `full_sequence`, `lag` num_steps is `autoregressive`; between them lie the pyramid
    of diffusion forcing (Chen et al. 2024) and the sliding window of The Matrix (2412.03568).
    Given frames take no place in the queue.

    Returns:
        float32 (num_steps + last delay + 1, T), or with B before T when `given` is (B, T).

    Raises:
        UsageError: for counts below 1, a lag outside [0, num_steps], or when every frame is given.
    """
    for name, value, least in (
        ("num_steps", num_steps, 1),
        ("num_frames", num_frames, 1),
        ("chunk", chunk, 1),
        ("lag", lag, 0),
    ):
        if value < least:
            raise UsageError(f"{name} is {value}; it must be at least {least}")
    if lag > num_steps:
        raise UsageError(f"lag is {lag}; above num_steps ({num_steps}) there is nothing to do")
    free = torch.ones(num_frames, dtype=torch.bool) if given is None else ~given.cpu()
    if free.shape[-1] != num_frames:
        raise UsageError(f"given covers {free.shape[-1]} frames, the clip has {num_frames}")
    if not free.any():
        raise UsageError("every frame is given; leave at least one to be sampled")
    levels = shift_levels(spacing(num_steps), shift).float()
    place = free.cumsum(-1) - 1  # in the queue of the frames that are sampled
    delay = torch.where(free, place // chunk * lag, 0)  # (T,) or (B, T)
    rows = torch.arange(num_steps + int(delay.max()) + 1)
    step = (rows.view(-1, *[1] * delay.ndim) - delay).clamp(0, num_steps)
    return torch.where(free, levels[step], 0.0)


def held(schedule: Tensor, start: Tensor) -> Tensor:
    """A schedule in which no frame is above the level that it starts at.

    A frame that starts at 0 is given, at 1 it is made from noise; one between waits until the
    others have come down to its level and is changed from there on (SDEdit, Meng et al. 2022).

    Args:
        schedule: (steps + 1, T), or (steps + 1, B, T).
        start: (T,) or (B, T) levels in [0, 1].

    Returns:
        (steps + 1, T), or with B before T where either argument has it; rows in which nothing
        moves are left out.

    Raises:
        UsageError: every frame is given.
    """
    start = start.to(schedule)
    rows = schedule.unsqueeze(1) if start.ndim > schedule.ndim - 1 else schedule
    rows = torch.minimum(rows, start)
    moves = (rows[1:] < rows[:-1]).flatten(1).any(dim=1)
    if not moves.any():
        raise UsageError("every frame is given; leave at least one to be sampled")
    # What starts lower than the first rows does not move in them, and stays where it is.
    kept = torch.cat([moves, moves.new_ones(1)])
    return rows[kept]


def check(schedule: Tensor, *, batch: int, num_frames: int) -> None:
    """Refuse a schedule that no sampler can walk.

    Raises:
        ValueError: for a wrong shape, levels outside [0, 1] or rising, or a step in which no frame
            moves.
    """
    if schedule.ndim == 2:
        fits = schedule.shape[1] == num_frames
    else:
        fits = schedule.ndim == 3 and tuple(schedule.shape[1:]) == (batch, num_frames)
    if not fits or schedule.shape[0] < 2:
        raise ValueError(
            f"schedule has shape {tuple(schedule.shape)}; these latents need (steps + 1, "
            f"{num_frames}) or (steps + 1, {batch}, {num_frames}) with at least one step"
        )
    if not ((schedule >= 0) & (schedule <= 1)).all():
        raise ValueError("levels of a schedule lie in [0, 1]; 0 is data and 1 is noise")
    moves = (schedule[1:] < schedule[:-1]).flatten(1).any(dim=1)
    if (schedule[1:] > schedule[:-1]).any():
        raise ValueError("levels of a schedule never rise from one row to the next")
    if not moves.all():
        idle = int((~moves).nonzero()[0])
        raise ValueError(f"no frame moves in step {idle} of the schedule; drop the repeated row")


class DescentConfig(Config):
    """How each frame descends, whatever the others do."""

    num_steps: int = Field(default=50, ge=1, description="steps that each frame takes")
    spacing: Literal["uniform", "karras"] = Field(
        default="uniform", description="levels before the shift; karras is EDM's"
    )


class FullSequenceConfig(DescentConfig):
    """All frames descend together."""

    kind: Literal["full_sequence"] = "full_sequence"


class AutoregressiveConfig(DescentConfig):
    """Chunks of frames one after the other."""

    kind: Literal["autoregressive"] = "autoregressive"
    chunk: int = Field(default=1, ge=1, description="latent frames that descend together")


class PyramidConfig(DescentConfig):
    """Chunks of frames, each starting some steps after the one before it."""

    kind: Literal["pyramid"] = "pyramid"
    chunk: int = Field(default=1, ge=1, description="latent frames that descend together")
    lag: int = Field(default=1, ge=0, description="steps between the starts of two chunks")


ScheduleConfig = Annotated[
    FullSequenceConfig | AutoregressiveConfig | PyramidConfig, Field(discriminator="kind")
]


def matrix(
    config: FullSequenceConfig | AutoregressiveConfig | PyramidConfig,
    num_frames: int,
    *,
    shift: float = 1.0,
    given: Tensor | None = None,
) -> Tensor:
    """The schedule that a config describes, for T latent frames; see `full_sequence`."""
    layout = {"full_sequence": full_sequence, "autoregressive": autoregressive, "pyramid": pyramid}
    options = config.model_dump(exclude={"kind", "num_steps", "spacing"})
    return layout[config.kind](
        config.num_steps,
        num_frames,
        shift=shift,
        given=given,
        spacing=SPACINGS[config.spacing],
        **options,
    )
