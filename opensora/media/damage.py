"""Finding damage that decoders hide: they conceal, skip and stop, and rarely raise.

A `Watch` sees every packet and frame of one pass and collects reasons why the file is not what it
promised: bytes that the codec forbids, packets cut short, lost or refused, frames the decoder
marked as concealed, an end that comes before the header's. It judges and never changes a frame.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from opensora.errors import DataError
from opensora.media.source import Limits, Source

# No NAL unit of H.264 or HEVC contains three zero bytes in a row (7.4.1 in both standards), and
# range-coded data of the others no hundreds of them; wiped regions do.
ZERO_RUNS = {"h264": 16, "hevc": 16, "vp8": 256, "vp9": 256, "av1": 256}
# Bytes between two Matroska blocks are a few element headers; more is a region that was skipped.
MAX_BLOCK_GAP = 512


class Watch:
    """What one pass over a file has seen so far.

    Attributes:
        reasons: why the file is damaged, in the order found; empty while nothing is wrong.
        packets: packets of the video stream that were read and are to be shown.
        frames: frames that the decoder returned.
        end: seconds at which the last frame that was seen stops being shown.
    """

    def __init__(self, source: Source, limits: Limits) -> None:
        self.reasons: list[str] = []
        self.packets = 0
        self.frames = 0
        self.end = 0.0
        self._source = source
        self._limits = limits
        self._deadline = time.monotonic() + limits.max_seconds
        self._read = 0
        self._forbidden = _forbidden_run(source)
        self._interval = source.interval
        # An alpha plane travels in the blocks too, between the packets.
        has_alpha = "alpha_mode" in {key.lower() for key in source.stream.metadata}
        self._in_blocks = source.container.format.name.startswith("matroska") and not has_alpha
        self._previous_end: int | None = None
        self._skipped = False
        self._last_shown: float | None = None
        self._follows_all = source.stream.duration is None
        self._ticks = {s.index: float(s.time_base or 0) for s in source.container.streams}
        self._reach = 0.0

    def packet(self, packet: Any) -> None:
        """Look at a packet of any stream before it is decoded."""
        if time.monotonic() > self._deadline:
            raise DataError(
                f"'{self._source.path}' took more than max_seconds={self._limits.max_seconds:g} to "
                f"decode ({self.frames} frames so far); raise the limit or cut the file"
            )
        if packet.size == 0:
            return
        if self._follows_all:
            self._follow(packet)
        if packet.stream is not self._source.stream:
            return
        self._read += 1
        self.packets += not packet.is_discard
        if packet.is_corrupt:
            self.reasons.append(f"packet {self._read} is cut short")
        elif self._forbidden is not None and self._forbidden in bytes(packet):
            self.reasons.append(f"packet {self._read} holds a region of zero bytes")
        self._see_time(packet.pts, packet.duration)

    def refused(self, error: Exception) -> None:
        """Note that the decoder would not take a packet."""
        reason = getattr(error, "strerror", None) or error
        self.reasons.append(f"packet {self._read} cannot be decoded ({reason})")

    def frame(self, frame: Any) -> None:
        """Look at a decoded frame."""
        if frame.is_corrupt:
            self.reasons.append(f"frame {self.frames} was patched up by the decoder")
        self.frames += 1
        if frame.pts is None:
            return
        shown, previous = self._source.seconds(frame.pts), self._last_shown
        if self._skipped and previous is not None and shown - previous > 1.5 * self._interval:
            self.reasons.append(f"frames are missing between {previous:.3f} s and {shown:.3f} s")
        self._last_shown = shown
        self._see_time(frame.pts, frame.duration)

    def finish(self) -> None:
        """Compare with what the header promised, after a pass that came to the last packet."""
        source = self._source
        promised = _promised_packets(source)
        if source.first_tick is None and self._read < promised:
            self.reasons.append(f"holds {self._read} of the {promised} frames that it promises")
        elif source.container.format.name == "gif":
            self.reasons += _gif_damage(source.path)
        # Some files promise a length for all streams together, and sound may be the longest.
        end, seconds = self._reach, (source.container.duration or 0) / 1e6
        if source.stream.duration is not None:
            end, seconds = self.end, float(source.stream.duration * source.stream.time_base)
        if seconds - end > max(2 * self._interval, 0.1):
            self.reasons.append(f"ends at {end:.3f} s of the {seconds:.3f} s that it promises")

    def error(self) -> DataError:
        """The error that says what was found."""
        promised = _promised_packets(self._source)
        expected = f" of {promised}" if promised else ""
        advice = "Replace the file, or read what is left with on_damage='keep'"
        if self.frames == 0:
            most = self._limits.max_pixels_per_frame
            advice = f"Replace the file (or are its pictures over max_pixels_per_frame={most}?)"
        return DataError(
            f"'{self._source.path}' is damaged: {self.reasons[0]}; {self.frames}{expected} frames "
            f"decoded so far. {advice}"
        )

    def _follow(self, packet: Any) -> None:
        """See how far any stream reaches, and the bytes that Matroska jumped over in silence."""
        if packet.pts is not None:
            finished = (packet.pts + (packet.duration or 0)) * self._ticks[packet.stream_index]
            self._reach = max(self._reach, finished)
        if not self._in_blocks or packet.pos is None:
            return
        gap = packet.pos - (packet.pos if self._previous_end is None else self._previous_end)
        self._previous_end = packet.pos + packet.size
        if gap > MAX_BLOCK_GAP:
            self._skipped = True

    def _see_time(self, timestamp: int | None, duration: int | None) -> None:
        if timestamp is None:
            return
        seconds = self._source.seconds(timestamp)
        shown = (duration or 0) * self._source.tick or self._interval
        self.end = max(self.end, seconds + shown)


def packets(source: Source, watch: Watch) -> Iterator[Any]:
    """The video stream's packets, watched; what stops the demuxer early becomes a reason."""
    from av.error import FFmpegError

    try:
        for packet in source.packets:
            watch.packet(packet)
            if packet.stream is source.stream:
                yield packet
    except FFmpegError as error:
        watch.refused(error)


def decode(source: Source, packet: Any, watch: Watch) -> list[Any]:
    """The frames that a packet releases, still unwatched; a refusal becomes a reason."""
    from av.error import FFmpegError

    try:
        frames = source.decoder.decode(packet)
    except FFmpegError as error:
        watch.refused(error)
        return []
    if source.first_tick is None:
        return frames
    return [f for f in frames if f.pts is None or f.pts >= source.first_tick]


def _promised_packets(source: Source) -> int:
    """How many packets the header says the stream has; 0 where it does not say."""
    # An mp4 counts all its samples; the index is what its edit list leaves of them.
    if source.container.format.name.startswith("mov"):
        return len(source.stream.index_entries)
    return source.stream.frames


def _forbidden_run(source: Source) -> bytes | None:
    context = source.stream.codec_context
    name = context.codec.canonical_name
    # Without the mp4-style header the units are delimited by zeros and may be padded with them.
    if name in ("h264", "hevc") and not (context.extradata or b"").startswith(b"\x01"):
        return None
    return bytes(ZERO_RUNS[name]) if name in ZERO_RUNS else None


def _gif_damage(path: str) -> list[str]:
    """Walk the blocks of a GIF to its trailer (GIF89a, appendix B); FFmpeg counts what it finds."""
    with open(path, "rb") as file:

        def skip_table(flags: int) -> None:
            if flags & 0x80:
                file.seek(3 << (flags & 7) + 1, os.SEEK_CUR)

        if len(header := file.read(13)) < 13:
            return ["breaks off in its header"]
        skip_table(header[10])
        while (kind := file.read(1)) != b"\x3b":
            if kind == b"\x21":
                file.seek(1, os.SEEK_CUR)
            elif kind == b"\x2c" and len(descriptor := file.read(9)) == 9:
                skip_table(descriptor[8])
                file.seek(1, os.SEEK_CUR)
            else:
                what = "breaks off" if not kind else "holds no GIF block"
                return [f"{what} at byte {file.tell()}"]
            while length := file.read(1):
                if length == b"\0":
                    break
                file.seek(length[0], os.SEEK_CUR)
    return []
