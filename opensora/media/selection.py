"""Which frames a clip is made of, decided from times alone: no file, no decoder, no pixels.

A picture is on show from its timestamp until the next one's. All times are seconds from the start
of the video stream. Both readers choose with these functions, so they choose alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from opensora.errors import DataError, UsageError
from opensora.media.source import Limits


@dataclass(frozen=True)
class Picture:
    """A frame, or whatever stands for it, that is on show from `time` to `until`."""

    time: float
    until: float
    frame: Any


@dataclass(frozen=True)
class Request:
    """Which frames are wanted; see `opensora.media.read.read_clip` for what the fields mean."""

    num_frames: int | None
    fps: float | None
    start: float
    end: float | None

    @classmethod
    def checked(
        cls,
        num_frames: int | None,
        fps: float | Fraction | None,
        start: float,
        end: float | None,
        limits: Limits,
    ) -> Request:
        """The request, if it makes sense; UsageError otherwise."""
        if num_frames is not None and not 1 <= num_frames <= limits.max_frames:
            raise UsageError(
                f"num_frames is {num_frames}; it is 1 to max_frames={limits.max_frames}"
            )
        if fps is not None and not 0 < fps <= 1000:
            raise UsageError(f"fps is {fps}; it is above 0 and up to 1000")
        if not (math.isfinite(start) and start >= 0):
            raise UsageError(f"start is {start}; it is 0 or more seconds")
        if end is not None and not (math.isfinite(end) and end > start):
            raise UsageError(f"end is {end}; it is a number of seconds after start={start}")
        return cls(num_frames, None if fps is None else float(fps), float(start), end)

    def grid(self, index: int) -> float | None:
        """The time of frame `index` of a resampled clip, or None when the clip is complete."""
        assert self.fps is not None
        time = self.start + index / self.fps
        complete = self.num_frames is not None and index >= self.num_frames
        return None if complete or (self.end is not None and time >= self.end - 1e-9) else time

    def __str__(self) -> str:
        text = "all frames" if self.num_frames is None else f"{self.num_frames} frames"
        text += f" from {self.start:g} s"
        text += "" if self.end is None else f" to {self.end:g} s"
        return text if self.fps is None else f"{text} at {self.fps:g} fps"


def clock_slack(tick: float, interval: float) -> float:
    """How far a timestamp and a time taken from one may lie apart only by rounding, in seconds.

    A Matroska clock of milliseconds puts the frame of 66.67 ms at 67, and a start that was copied
    from it is rounded too. A clock that ticks about once a frame was chosen for the rate: exact.

    Args:
        tick: seconds a timestamp unit lasts.
        interval: seconds from frame to frame.
    """
    return max(1e-6, min(1.01 * tick, interval / 4)) if tick <= interval / 2 else 1e-6


def choose(
    pictures: Iterable[Picture], request: Request, slack: float
) -> Iterator[tuple[float, Picture]]:
    """The pictures of the clip with their timestamps in it, drawn from `pictures` as needed.

    A picture comes again for each grid time at which it is still on show. Stops at the end of
    `pictures`; whether that is too early is for `refuse_shortage` to say.
    """
    if request.fps is None:
        return _native(pictures, request, slack)
    return _on_grid(pictures, request, slack)


def _native(
    pictures: Iterable[Picture], request: Request, slack: float
) -> Iterator[tuple[float, Picture]]:
    count = 0
    for picture in pictures:
        if picture.time < request.start - slack:
            continue
        if request.end is not None and picture.time >= request.end - slack:
            return
        yield picture.time, picture
        count += 1
        if count == request.num_frames:
            return


def _on_grid(
    pictures: Iterable[Picture], request: Request, slack: float
) -> Iterator[tuple[float, Picture]]:
    count = 0
    current: Picture | None = None
    for picture in pictures:
        while (time := request.grid(count)) is not None and time < picture.time - slack:
            # Where a stream starts late, its first picture stands in for the time before.
            yield time, current or picture
            count += 1
        # On time: the next picture need not be decoded to know that this one is on show.
        while (time := request.grid(count)) is not None and time <= picture.time + slack:
            yield time, picture
            count += 1
        if time is None:
            return
        current = picture
    if current is None:
        return
    open_ended = request.num_frames is None and request.end is None
    grace = -slack if open_ended else (current.until - current.time) / 2
    while (time := request.grid(count)) is not None and time < current.until + grace:
        yield time, current
        count += 1


def refuse_shortage(
    path: str, request: Request, count: int, *, stream_end: float, interval: float
) -> None:
    """Raise DataError when a stream that ends at `stream_end` gave `count` frames too few."""
    if request.num_frames is not None:
        short = count < request.num_frames
    elif request.end is None:
        short = count == 0
    elif request.fps is not None:
        short = request.grid(count) is not None
    else:
        short = count == 0 or request.end > stream_end + interval / 2
    if short:
        raise DataError(
            f"'{path}' cannot give {request}: found {count}, and the stream ends at "
            f"{stream_end:.3f} s. Ask for fewer frames, an earlier start or a wider range"
        )


def measured_rate(timestamps: np.ndarray, tick: float, interval: float) -> float:
    """Frames per second of float64 (F,) timestamps; the announced rate where they agree with it."""
    steps = len(timestamps) - 1
    span = float(timestamps[-1] - timestamps[0])
    if span <= 0 or abs(steps * interval - span) <= 2 * tick:
        return 1 / interval
    return steps / span
