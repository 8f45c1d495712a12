"""Opening a video file safely: one stream of one local file, positioned and ready to decode.

Untrusted files are opened with the formats, protocols and picture sizes named here and nothing
else, so a playlist that calls itself mp4 cannot reach the network or other files. Times are
seconds from the start of the video stream. Nothing here converts pixels or judges damage.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from opensora.config import Config
from opensora.errors import DataError

# Demuxers that read one self-contained file. Playlists (hls, dash, concat) are left out on purpose.
FORMATS = (
    "mov,mp4,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,mxf,ivf,h264,hevc,av1,obu,"
    "gif,apng,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,mp3,wav,flac,aac"
)
UNSEEKABLE = {"gif", "apng", "png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe"}
SEEK_MARGINS = (0.0, 2.0, 10.0)  # seconds before the target, tried in turn, then the very start


class Limits(Config):
    """What reading one clip may cost; a file that wants more is refused."""

    max_pixels_per_frame: int = Field(
        default=8192 * 4320, gt=0, description="largest width x height that is decoded"
    )
    max_frames: int = Field(default=16384, gt=0, description="most frames a call returns")
    max_bytes: int = Field(default=4 * 2**30, gt=0, description="most bytes of RGB a call returns")
    max_seconds: float = Field(default=120.0, gt=0, description="wall-clock seconds of decoding")


@dataclass(frozen=True)
class Source:
    """An open file and the one video stream that is read from it.

    Attributes:
        path: as the caller gave it, for messages.
        container: `av.container.InputContainer`.
        stream: the best video stream of it.
        decoder: the codec context that packets are sent to.
        packets: from the current position, of other streams too, with the flushing ones last.
        origin: timestamp, in ticks, that counts as second 0.
        tick: seconds a timestamp unit lasts.
        first_tick: frames before this timestamp lack their references and are dropped, or None.
    """

    path: str
    container: Any
    stream: Any
    decoder: Any
    packets: Iterator[Any]
    origin: int
    tick: float
    first_tick: int | None = None

    def seconds(self, timestamp: int) -> float:
        """Ticks -> seconds from the start of the stream."""
        return (timestamp - self.origin) * self.tick

    @property
    def interval(self) -> float:
        """Seconds from frame to frame that the file announces (1/25 where it is silent)."""
        return float(1 / (self.stream.average_rate or self.stream.base_rate or 25))


@contextmanager
def opened(
    path: str | os.PathLike[str], limits: Limits, *, threads: int = 1, target: float = 0.0
) -> Iterator[Source]:
    """Open a file, choose its best video stream and stand at a key frame at or before `target`.

    Seeking is checked, not trusted: where the first packet lies behind the target, or the format
    cannot seek, an earlier key frame is tried and in the end the start of the file.

    Args:
        threads: of the decoder.
        target: seconds from the start of the video stream.

    Raises:
        DataError: when the file is missing, empty, of no known format, without a video stream that
            can be decoded, or when its pictures exceed the limits.
    """
    check_file(path)
    margins = SEEK_MARGINS if target > 0 else ()
    for margin in (*margins, None):
        with _open_container(path, limits) as container:
            source = _at(path, container, limits, threads, target, margin)
            if source is not None:
                yield source
                return


def check_file(path: str | os.PathLike[str]) -> None:
    """Refuse what is not a readable, non-empty regular file (a pipe would hang the reader).

    Raises:
        DataError: naming the reason.
    """
    try:
        status = os.stat(path)
        with open(path, "rb"):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"'{path}' cannot be read: {reason}") from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"'{path}' is not a regular file; videos are read from files only")
    if status.st_size == 0:
        raise DataError(f"'{path}' is empty (0 bytes)")


@contextmanager
def _open_container(path: str | os.PathLike[str], limits: Limits) -> Iterator[Any]:
    import av
    from av.error import FFmpegError

    options = {
        "format_whitelist": FORMATS,
        "protocol_whitelist": "file",
        "max_pixels": str(limits.max_pixels_per_frame),
    }
    try:
        # The prefix keeps names with ':' from being taken for a protocol.
        container = av.open(f"file:{Path(path)}", options=options, metadata_errors="replace")
    except (FFmpegError, MemoryError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"'{path}' cannot be opened as a video ({reason}): it is no video of a known format, "
            "or its header is cut off"
        ) from None
    with container:
        yield container


def _at(
    path: str | os.PathLike[str],
    container: Any,
    limits: Limits,
    threads: int,
    target: float,
    margin: float | None,
) -> Source | None:
    """The source `margin` seconds before the target (None: at the start); None if missed."""
    from av.error import FFmpegError

    stream = best_stream(container, path)
    decoder = _decoder(stream, path, limits, threads)
    tick = float(stream.time_base)
    origin = stream.start_time or 0
    # Where only the whole file promises a length, the other streams have to be followed as well.
    packets = container.demux() if stream.duration is None else container.demux(stream)
    source = Source(str(path), container, stream, decoder, packets, origin, tick)
    if margin is None:
        return source
    wanted = origin + int((target - margin) / tick)
    if container.format.name in UNSEEKABLE or stream.start_time is None or wanted <= origin:
        return None
    depth = decoder.reorder_depth
    try:
        container.seek(wanted, stream=stream)
        passed = []
        for packet in packets:
            passed.append(packet)
            if packet.stream is stream:
                break
    except FFmpegError:
        return None
    decoder.reorder_depth = depth
    first = passed[-1].pts if passed else None
    if first is None or not passed[-1].is_keyframe or source.seconds(first) > target:
        return None
    rest = itertools.chain(passed, packets)
    return Source(str(path), container, stream, decoder, rest, origin, tick, first)


def best_stream(container: Any, path: str | os.PathLike[str]) -> Any:
    """The stream FFmpeg ranks best among those that are moving pictures, not cover art.

    Raises:
        DataError: when there is none, or no decoder for it.
    """
    from av.stream import Disposition

    still = Disposition.attached_pic | Disposition.timed_thumbnails
    moving = [s for s in container.streams.video if not s.disposition & still]
    if not moving:
        found = sorted({s.type for s in container.streams}) or ["nothing"]
        raise DataError(f"'{path}' has no video stream; it holds {', '.join(found)}")
    best = container.streams.best("video")
    if best is None or best not in moving:
        best = max(moving, key=lambda s: (s.width or 0) * (s.height or 0))
    if best.codec_context is None:
        raise DataError(f"'{path}' has a video stream that no installed codec decodes")
    return best


def first_frame(source: Source) -> Any:
    """Decode from the source's position to its first frame, and leave the position behind it.

    Raises:
        DataError: when nothing can be decoded.
    """
    from av.error import FFmpegError

    reason = "the stream is empty"
    try:
        for packet in source.packets:
            if packet.stream is source.stream:
                for frame in source.decoder.decode(packet):
                    return frame
    except FFmpegError as error:
        reason = error.strerror or str(error)
    raise DataError(f"'{source.path}': no frame could be decoded ({reason})")


def _decoder(stream: Any, path: str | os.PathLike[str], limits: Limits, threads: int) -> Any:
    import av

    context = stream.codec_context
    width, height = context.width, context.height
    if width * height > limits.max_pixels_per_frame:
        raise DataError(
            f"'{path}' has frames of {width}x{height} = {width * height} pixels, over "
            f"max_pixels_per_frame={limits.max_pixels_per_frame}; raise the limit or leave it out"
        )
    # FFmpeg's own VP8 and VP9 decoders drop the alpha plane that Matroska keeps beside the frame.
    alpha_codec = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(context.codec.canonical_name)
    has_alpha = stream.metadata.get("alpha_mode", stream.metadata.get("ALPHA_MODE")) == "1"
    if has_alpha and alpha_codec in av.codecs_available:
        context = av.CodecContext.create(alpha_codec, "r")
    context.thread_count = threads
    context.thread_type = "AUTO" if threads > 1 else "NONE"
    context.options = {"max_pixels": str(limits.max_pixels_per_frame)}
    return context
