"""The decord backend of `read_clip`: the same frames by the same choice, or a refusal.

decord hides damage, drops alpha, decodes untagged HD video with the SD matrix, rounds 10-bit
pictures its own way and ignores edit lists. PyAV looks at the first frame, and what decord would
show differently is refused by name.
"""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np

from opensora.errors import DataError, require
from opensora.media.pixels import colour_matrix, has_alpha, orientation
from opensora.media.selection import (
    Picture,
    Request,
    choose,
    clock_slack,
    measured_rate,
    refuse_shortage,
)
from opensora.media.source import Limits, Source, first_frame, opened
from opensora.types import Clip

EQUAL_MATRICES = {"ITU709", "ITU601"}


def read_with_decord(
    path: str | os.PathLike[str], request: Request, limits: Limits, threads: int
) -> Clip:
    """Read a clip through decord; see `opensora.media.read.read_clip`.

    Raises:
        DataError: for files that decord cannot read, or would decode to other frames.
        MissingPackageError: when decord is not installed.
    """
    decord: Any = require("decord", extra="decord", purpose="backend='decord'")
    decord.logging.set_level(decord.logging.QUIET)
    with opened(path, limits) as source:
        reason = _difference(source)
        tick, interval = source.tick, source.interval
    if reason:
        raise _refusal(path, reason)
    try:
        # The prefix keeps names with ':' from being taken for a protocol.
        reader = decord.VideoReader(f"file:{os.fspath(path)}", num_threads=threads)
        starts = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0].astype(np.float64)
    except (decord.DECORDError, RuntimeError, AssertionError) as error:
        raise _refusal(path, _reason(error)) from None
    if starts.min() < -tick / 2:
        raise _refusal(path, "it has an edit list or a clock that decord ignores")
    starts = np.round(starts / tick) * tick  # decord reports them in float32
    ends = np.append(starts[1:], starts[-1] + interval)
    pictures = [Picture(*times) for times in zip(starts, ends, range(len(starts)), strict=True)]
    chosen = list(choose(pictures, request, clock_slack(tick, interval)))
    refuse_shortage(str(path), request, len(chosen), stream_end=ends[-1], interval=interval)
    timestamps = np.array([time for time, _ in chosen])
    frames = _fetch(decord, reader, path, [picture.frame for _, picture in chosen], limits)
    rate = request.fps or measured_rate(timestamps, tick, interval)
    return Clip(frames, timestamps, rate, str(path))


def _fetch(
    decord: Any, reader: Any, path: str | os.PathLike[str], numbers: list[int], limits: Limits
) -> np.ndarray:
    """The frames with these numbers, each decoded once: uint8 (F, H, W, 3)."""
    unique, position = np.unique(numbers, return_inverse=True)
    try:
        height, width = reader[int(unique[0])].shape[:2]
        if len(numbers) > min(limits.max_frames, limits.max_bytes // (height * width * 3)):
            raise DataError(
                f"'{path}' gives more than max_frames={limits.max_frames} frames or "
                f"max_bytes={limits.max_bytes}; ask for fewer frames with num_frames, fps or end"
            )
        frames = reader.get_batch(unique).asnumpy()
    except (decord.DECORDError, RuntimeError) as error:
        raise _refusal(path, _reason(error)) from None
    return frames if len(unique) == len(numbers) else frames[position]


def _difference(source: Source) -> str | None:
    """What decord would show differently in this stream, or None."""
    frame = first_frame(source)
    if source.decoder is not source.stream.codec_context or has_alpha(frame.format):
        return "it has an alpha plane"
    bits = max(component.bits for component in frame.format.components)
    if bits > 8:
        return f"it has {bits} bits a sample"
    matrix = colour_matrix(frame, source.path)
    if matrix is not None and matrix not in EQUAL_MATRICES:
        return f"its colour matrix is {matrix}"
    if matrix == "ITU709" and frame.colorspace != 1:
        return "it is untagged HD video"
    a, b, c, d = orientation(frame)
    return "it is shown mirrored" if a * d - b * c < 0 else None


def _reason(error: Exception) -> str:
    """decord's message without its clock and source line."""
    return re.sub(r"^\[[\d:]+\] \S+: ", "", str(error).strip().splitlines()[-1]).rstrip(".")


def _refusal(path: str | os.PathLike[str], reason: str) -> DataError:
    return DataError(f"'{path}' cannot be read with decord: {reason}. Use backend='pyav'")
