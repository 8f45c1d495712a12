"""Frames in: one `read_clip` that chooses frames by their timestamps, never by their number.

A frame is shown from its timestamp until the next frame's. With `fps` the clip is what a viewer
sees at start, start + 1/fps, ...; without it, the file's own frames. Damage is an error that names
the file and the reason, not a shorter or patched clip. No resizing and no sound here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from fractions import Fraction
from typing import Literal

import numpy as np

from opensora.errors import DataError, UsageError
from opensora.media.damage import Watch, decode, packets
from opensora.media.pixels import Converter
from opensora.media.selection import (
    Picture,
    Request,
    choose,
    clock_slack,
    measured_rate,
    refuse_shortage,
)
from opensora.media.source import Limits, Source, opened
from opensora.types import Clip

DEFAULT_LIMITS = Limits()
OnDamage = Literal["raise", "keep"]
Backend = Literal["pyav", "decord"]


def read_clip(
    path: str | os.PathLike[str],
    *,
    num_frames: int | None = None,
    fps: float | Fraction | None = None,
    start: float = 0.0,
    end: float | None = None,
    backend: Backend = "pyav",
    on_damage: OnDamage = "raise",
    limits: Limits = DEFAULT_LIMITS,
    threads: int = 1,
) -> Clip:
    """Decode frames of the file's best video stream.

    With `fps`, frame k is the one on show at start + k / fps: the last whose timestamp has come
    (up to the rounding of the file's clock). Without it, the clip holds every frame whose
    timestamp lies in [start, end). The reader stands at the key frame before `start`, so a late
    clip costs no more than an early one where the format can seek.

    A request may end up to half a frame interval past the end of the stream, where the last frame
    stays on show; one that asks for more is refused. Without `num_frames` and `end` the clip runs
    to the end of the stream, and then the end must be where the header says.

    Colours follow the stream's tags (see `opensora.media.pixels`), rotation and mirroring are
    applied, alpha is laid on white. Pixels are not resampled to a square shape.

    Args:
        path: a local file; any name that the file system allows.
        num_frames: how many frames, exactly.
        fps: frames per second of the clip.
        start: seconds from the start of the video stream.
        end: seconds; frames at or after it are left out.
        backend: 'pyav', or 'decord' for files that decord decodes to the same frames; decord cannot
            see damage, so it asks for on_damage='keep'.
        on_damage: 'raise', or 'keep' for whatever the decoder gives from a damaged file.
        limits: what the call may cost.
        threads: of the decoder; 1 is best where several workers decode.

    Returns:
        Clip of uint8 (F, H, W, 3); `timestamps` are the grid's with `fps`, the frames' without.

    Raises:
        DataError: when the file cannot be opened, is damaged, is too short, or exceeds the limits.
        UsageError: when the arguments contradict each other.
    """
    request = Request.checked(num_frames, fps, start, end, limits)
    if on_damage not in ("raise", "keep"):
        raise UsageError(f"on_damage is '{on_damage}'; it is 'raise' or 'keep'")
    if threads < 1:
        raise UsageError(f"threads is {threads}; it is at least 1")
    if backend == "decord":
        from opensora.media.decord_reader import read_with_decord

        if on_damage == "raise":
            raise UsageError(
                "backend='decord' cannot see damage; say on_damage='keep', or use backend='pyav'"
            )
        return read_with_decord(path, request, limits, threads)
    if backend != "pyav":
        raise UsageError(f"backend is '{backend}'; it is 'pyav' or 'decord'")
    with opened(path, limits, threads=threads, target=request.start) as source:
        return _read(source, request, limits, on_damage)


def _read(source: Source, request: Request, limits: Limits, on_damage: OnDamage) -> Clip:
    watch = Watch(source, limits)
    pictures = _pictures(source, watch, on_damage)
    slack = clock_slack(source.tick, source.interval)
    convert = Converter(source.path)
    store = _Store(source.path, request.num_frames, limits)
    times: list[float] = []
    last: Picture | None = None
    for time, picture in choose(pictures, request, slack):
        if picture is last:
            store.repeat(picture.time)
        else:
            store.append(convert(picture.frame), picture.time)
        last = picture
        times.append(time)
    if watch.frames == 0:
        reason = watch.reasons[0] if watch.reasons else "the stream is empty"
        raise DataError(f"'{source.path}': no frame could be decoded ({reason})")
    end, interval = watch.end, source.interval
    refuse_shortage(source.path, request, len(times), stream_end=end, interval=interval)
    timestamps = np.asarray(times, np.float64)
    rate = request.fps or measured_rate(timestamps, source.tick, interval)
    return Clip(store.frames(), timestamps, rate, source.path)


def _pictures(source: Source, watch: Watch, on_damage: OnDamage) -> Iterator[Picture]:
    """Every picture in the order of showing; at the end the header's promises are checked."""

    def stop_if_damaged() -> None:
        if watch.reasons and on_damage == "raise":
            raise watch.error()

    previous = -math.inf
    for packet in packets(source, watch):
        stop_if_damaged()
        for frame in decode(source, packet, watch):
            watch.frame(frame)
            stop_if_damaged()
            time = previous + source.interval
            if frame.pts is not None or not math.isfinite(time):
                time = source.seconds(source.origin if frame.pts is None else frame.pts)
            # A clock that runs backwards is held, so that times never decrease.
            previous = max(time, previous)
            shown = (frame.duration or 0) * source.tick or source.interval
            yield Picture(previous, previous + shown, frame)
        stop_if_damaged()
    watch.finish()
    stop_if_damaged()


class _Store:
    """The frames gathered so far; only what the caller asked for is allocated ahead."""

    def __init__(self, path: str, num_frames: int | None, limits: Limits) -> None:
        self._path = path
        self._limits = limits
        self._num_frames = num_frames
        self._array: np.ndarray | None = None
        self._frames: list[np.ndarray] = []

    def append(self, pixels: np.ndarray, time: float) -> None:
        """Copy in uint8 (H, W, 3) pixels; `time` is for the message when the size has changed."""
        count = len(self._frames)
        if count and self._frames[0].shape != pixels.shape:
            (old_height, old_width), (height, width) = self._frames[0].shape[:2], pixels.shape[:2]
            raise DataError(
                f"'{self._path}' changes its frame size from {old_width}x{old_height} to "
                f"{width}x{height} at {time:.3f} s; cut it there"
            )
        self._refuse_excess(max(count + 1, self._num_frames or 0), pixels.nbytes)
        if self._num_frames is None:
            self._frames.append(np.array(pixels, order="C"))
            return
        if self._array is None:
            self._array = np.empty((self._num_frames, *pixels.shape), np.uint8)
        self._array[count] = pixels
        self._frames.append(self._array[count])

    def repeat(self, time: float) -> None:
        """Append the last frame again."""
        self.append(self._frames[-1], time)

    def frames(self) -> np.ndarray:
        """All frames: uint8 (F, H, W, 3)."""
        return np.stack(self._frames) if self._array is None else self._array

    def _refuse_excess(self, num_frames: int, frame_bytes: int) -> None:
        limits = self._limits
        if num_frames > limits.max_frames or num_frames * frame_bytes > limits.max_bytes:
            raise DataError(
                f"'{self._path}' gives more than max_frames={limits.max_frames} frames or "
                f"max_bytes={limits.max_bytes}; ask for fewer frames with num_frames, fps or end"
            )
