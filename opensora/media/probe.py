"""What a video file holds, counted rather than believed.

The frames are counted by reading the packets (no decoding but the first frame), or on request by
decoding all of them. What the file promises and does not hold is reported as damage.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import numpy as np

from opensora.errors import DataError, UsageError
from opensora.media.damage import Watch, decode, packets
from opensora.media.pixels import HDR_TRANSFERS, clockwise_degrees, orientation
from opensora.media.selection import measured_rate
from opensora.media.source import Limits, opened

DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Probe:
    """Facts about the best video stream of a file.

    Attributes:
        path: as it was given.
        container: FFmpeg's name of the format, such as 'mov,mp4,m4a,3gp,3g2,mj2'.
        codec: such as 'h264' or 'av1'.
        pixel_format: FFmpeg's name, such as 'yuv420p10le'.
        width: pixels of the upright picture.
        height: pixels of the upright picture.
        num_frames: frames that are shown, as counted.
        fps: average of the timestamps.
        nominal_fps: what the header announces; 0 where it does not.
        duration: seconds from the first frame to the end of the last.
        start: seconds between the container's zero and the first frame.
        rotation: degrees, 0, 90, 180 or 270, by which pixels are turned clockwise to stand upright.
        variable_rate: whether some frames are shown more than half as long again as others.
        pixel_aspect: width of a pixel over its height.
        hdr: whether the transfer is PQ or HLG, which `read_clip` does not map to SDR.
        has_audio: whether there is a sound track.
        damage: the first reason why the file is not what it promises, or None.
    """

    path: str
    container: str
    codec: str
    pixel_format: str
    width: int
    height: int
    num_frames: int
    fps: float
    nominal_fps: float
    duration: float
    start: float
    rotation: int
    variable_rate: bool
    pixel_aspect: float
    hdr: bool
    has_audio: bool
    damage: str | None


def probe(
    path: str | os.PathLike[str],
    *,
    count: Literal["packets", "decode"] = "packets",
    limits: Limits = DEFAULT_LIMITS,
    threads: int = 1,
) -> Probe:
    """Look at a file once, from its first packet to its last.

    Args:
        count: 'packets' reads without decoding; 'decode' decodes every frame, which also finds
            pictures that only the decoder can tell are damaged.
        limits: of picture size and seconds.
        threads: of the decoder.

    Raises:
        DataError: when the file cannot be opened, holds no video, exceeds the limits, or not one
            frame of it can be decoded. Lesser damage is in the result.
    """
    if count not in ("packets", "decode"):
        raise UsageError(f"count is '{count}'; it is 'packets' or 'decode'")
    first = None
    read: list[int] = []
    shown: list[int] = []
    with opened(path, limits, threads=threads) as source:
        watch = Watch(source, limits)
        for packet in packets(source, watch):
            if packet.size and packet.pts is not None and not packet.is_discard:
                read.append(packet.pts)
            if first is not None and count == "packets":
                continue
            for frame in decode(source, packet, watch):
                watch.frame(frame)
                first = first or frame
                shown.append(frame.pts or 0)
        watch.finish()
        if first is None:
            reason = watch.reasons[0] if watch.reasons else "the stream is empty"
            raise DataError(f"'{source.path}': no frame could be decoded ({reason})")
        stream, tick = source.stream, source.tick
        stamps = np.unique((shown if count == "decode" else read) or [source.origin])
        degrees = clockwise_degrees(orientation(first))
        sides = (first.width, first.height) if degrees % 180 == 0 else (first.height, first.width)
        begin = float(stamps[0]) * tick
        return Probe(
            path=source.path,
            container=source.container.format.name,
            codec=stream.codec_context.codec.canonical_name,
            pixel_format=first.format.name,
            width=sides[0],
            height=sides[1],
            num_frames=watch.frames if count == "decode" else watch.packets,
            fps=measured_rate(stamps * tick, tick, source.interval),
            nominal_fps=float(stream.average_rate or 0),
            duration=watch.end - source.seconds(int(stamps[0])),
            start=begin,
            rotation=degrees,
            variable_rate=_is_variable(stamps),
            pixel_aspect=float(stream.sample_aspect_ratio or 1),
            hdr=first.color_trc in HDR_TRANSFERS,
            has_audio=bool(source.container.streams.audio),
            damage=watch.reasons[0] if watch.reasons else None,
        )


def _is_variable(stamps: np.ndarray) -> bool:
    """Whether sorted timestamps (F,), in ticks, differ in spacing by more than their rounding."""
    if len(stamps) < 3:
        return False
    spacing = np.diff(stamps)
    shortest, longest = spacing.min(), spacing.max()
    return bool(longest > 1.5 * shortest and longest - shortest > 2)
