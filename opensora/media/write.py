"""Frames out: mp4, webm, gif and png, by the suffix of the path.

A file appears whole or not at all, carries the exact rational rate, and its colour tags say what
the conversion really did, so that reading it back gives the colours that were written. Frames are
uint8 RGB; nothing here knows models, captions or audio.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import secrets
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from opensora.errors import OpensoraError, StorageError, UsageError, did_you_mean
from opensora.media.sheet import contact_sheet

MAX_GIF_FPS = 50  # browsers replace delays under 2/100 s by 10/100 s
BT709 = 1  # the code point of primaries, transfer and matrix alike in ITU-T H.273


@dataclass(frozen=True)
class _Codec:
    """How one kind of file is encoded: `crf` runs from 0 (best) to `max_crf`."""

    container: str
    encoder: str
    crf: int
    max_crf: int
    codec_options: dict[str, str]
    container_options: dict[str, str]


_CODECS = {
    ".mp4": _Codec("mp4", "libx264", 17, 51, {"preset": "medium"}, {"movflags": "+faststart"}),
    ".webm": _Codec("webm", "libvpx-vp9", 24, 63, {"b": "0", "deadline": "good"}, {}),
}
FORMATS = (*_CODECS, ".gif", ".png")


def write_video(
    path: str | os.PathLike[str],
    frames: np.ndarray | Iterable[np.ndarray],
    *,
    fps: float | Fraction,
    crf: int | None = None,
    threads: int = 1,
    keyframe_every: int = 24,
) -> Path:
    """Write frames as the format that the suffix of `path` names.

    `.mp4` is h264 and `.webm` VP9, both yuv420p with the BT.709 matrix in limited range, which
    every browser plays. 4:2:0 needs even sizes, so an odd height or width grows by one pixel, a
    copy of its last row or column. `.gif` takes one palette of 256 colours for the whole clip;
    its delays are hundredths of a second, rounded so that no drift adds up. `.png` holds one
    frame, or all of them as a contact sheet, and has no rate.

    Args:
        path: parent folders are created; an existing file is replaced in one step.
        frames: uint8 (F, H, W, 3) RGB, or any iterable of (H, W, 3), encoded as it comes.
        fps: frames per second; a float means the nearest fraction with a denominator up to 1001,
            so 30000/1001 survives the trip through a float. GIF allows up to 50.
        crf: constant quality of mp4 (0 to 51, default 17) or webm (0 to 63, default 24); 0 is best.
        threads: of the encoder. With 1 the bytes do not depend on the machine's load or cores.
        keyframe_every: at most this many frames from one seekable frame of a video to the next.

    Returns:
        The path written.

    Raises:
        UsageError: for an unknown suffix, no frames, or frames, fps or crf out of their bounds.
        StorageError: when the disk is full, read-only or failing; no partial file is left.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        nearest = did_you_mean(suffix, FORMATS)
        raise UsageError(f"cannot write '{path}': the suffix '{suffix}' is no format.{nearest}")
    if crf is not None and suffix not in _CODECS:
        raise UsageError(f"crf={crf} means nothing for '{suffix}'; leave it out")
    checked = _frames_of_one_size(frames, path)
    if suffix == ".png":
        stacked = np.stack(list(checked))
        return write_image(path, contact_sheet(stacked, columns=math.ceil(len(stacked) ** 0.5)))
    rate = _rational(fps)
    with _replacing(path) as temporary:
        if suffix == ".gif":
            _encode_gif(temporary, checked, rate)
        else:
            codec = _CODECS[suffix]
            settings = _codec_options(codec, crf, threads, keyframe_every)
            _encode(temporary, checked, rate, codec, settings)
    return path


def write_image(path: str | os.PathLike[str], image: np.ndarray) -> Path:
    """Write one uint8 (H, W, 3) RGB image as PNG, whole or not at all.

    Raises:
        UsageError: for another dtype or shape, or a suffix other than .png.
        StorageError: when the disk refuses.
    """
    from PIL import Image

    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UsageError(f"cannot write '{path}': images are written as .png")
    (checked,) = _frames_of_one_size([image], path)
    with _replacing(path) as temporary:
        Image.fromarray(checked).save(temporary, format="PNG", optimize=True)
    return path


def safe_name(text: str, index: int) -> str:
    """A file name for a sample: its index and up to 40 characters of its prompt.

    Only a-z, 0-9 and single hyphens appear, so the name is safe in every file system, shell, URL
    and page, and never empty or hidden: ('A red Círcle!', 7) gives '0007-a-red-circle'. Prompts
    that share a slug still differ by index, a count from 0.
    """
    if index < 0:
        raise UsageError(f"the index of a sample counts from 0, got {index}")
    words = slug(text)
    return f"{index:04d}-{words}" if words else f"{index:04d}"


def slug(text: str) -> str:
    """Up to 40 characters of a text as a-z, 0-9 and single hyphens; may be empty."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text.lower())[:41].strip("-")[:40].rstrip("-")


def _rational(fps: float | Fraction) -> Fraction:
    if not (isinstance(fps, (int, float, Fraction)) and 0 < fps <= 1000):
        raise UsageError(f"fps is {fps!r}; it must be a number above 0 and up to 1000")
    rate = fps if isinstance(fps, Fraction) else Fraction(fps).limit_denominator(1001)
    if rate == 0:
        raise UsageError(f"fps is {fps!r}; the slowest float is 1/1001, pass a Fraction instead")
    return rate


def _frames_of_one_size(
    frames: np.ndarray | Iterable[np.ndarray], path: Path
) -> Iterator[np.ndarray]:
    """The frames as contiguous arrays, each checked as it comes."""
    shape: tuple[int, ...] | None = None
    for index, frame in enumerate(frames):
        frame = np.asarray(frame)
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
            raise UsageError(
                f"cannot write '{path}': frame {index} is {frame.dtype} {frame.shape}, not uint8 "
                "(H, W, 3). Clamp floats to [0, 1], multiply by 255, round, and move channels last."
            )
        if shape is not None and frame.shape != shape:
            raise UsageError(
                f"cannot write '{path}': frame {index} is {frame.shape}, frame 0 {shape}; "
                "resize them to one size"
            )
        shape = frame.shape
        yield np.ascontiguousarray(frame)
    if shape is None:
        raise UsageError(f"cannot write '{path}': there are no frames")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it after a clean exit and removed otherwise."""
    from av.error import FFmpegError

    # The name is short because `path.name` may already be as long as the file system allows.
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OpensoraError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(
            f"'{path}' cannot be written ({reason}). Check the folder and its free space."
        ) from error
    except FFmpegError as error:
        raise UsageError(
            f"'{path}' cannot be encoded ({error.strerror}); the frames may be too large for the "
            "format: resize them, or choose another suffix"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _codec_options(
    codec: _Codec, crf: int | None, threads: int, keyframe_every: int
) -> dict[str, str]:
    quality = codec.crf if crf is None else crf
    if not 0 <= quality <= codec.max_crf:
        raise UsageError(f"crf is {quality}; {codec.encoder} takes 0 (best) to {codec.max_crf}")
    if threads < 1 or keyframe_every < 1:
        raise UsageError(f"threads={threads} and keyframe_every={keyframe_every} must be >= 1")
    fixed = {"crf": str(quality), "threads": str(threads), "g": str(keyframe_every)}
    if codec.encoder == "libx264" and _has_avx512():
        fixed["x264-params"] = "asm=avx2"
    return codec.codec_options | fixed


@cache
def _has_avx512() -> bool:
    """Whether x264 would take its AVX-512 code, which reads memory that nobody wrote: the same
    frames give other bytes from one call to the next (PyAV 18.1's x264, seen with MALLOC_PERTURB_;
    AVX2 gives the same bytes for any content of that memory)."""
    try:
        return "avx512" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _encode(
    path: Path,
    frames: Iterator[np.ndarray],
    rate: Fraction,
    codec: _Codec,
    options: dict[str, str],
) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

    first = next(frames)
    pad_rows, pad_columns = first.shape[0] % 2, first.shape[1] % 2
    settings = {"fflags": "+bitexact", **codec.container_options}
    with av.open(f"file:{path}", "w", format=codec.container, options=settings) as container:
        stream: Any = container.add_stream(codec.encoder, rate=rate, options=options)
        stream.width, stream.height = first.shape[1] + pad_columns, first.shape[0] + pad_rows
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.time_base = 1 / rate
        context.color_range = ColorRange.MPEG
        context.colorspace = context.color_primaries = context.color_trc = BT709
        reformatter = VideoReformatter()
        for index, frame in enumerate(itertools.chain([first], frames)):
            if pad_rows or pad_columns:
                frame = np.pad(frame, ((0, pad_rows), (0, pad_columns), (0, 0)), mode="edge")
            picture = reformatter.reformat(
                av.VideoFrame.from_ndarray(frame, format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                threads=1,
            )
            picture.pts, picture.time_base = index, 1 / rate
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _encode_gif(path: Path, frames: Iterator[np.ndarray], rate: Fraction) -> None:
    """The palette needs every frame first, so the filter graph holds the whole clip in memory."""
    import av

    if rate > MAX_GIF_FPS:
        raise UsageError(f"fps is {float(rate):g}; GIF shows at most {MAX_GIF_FPS}, write .mp4")
    tick = Fraction(1, 100)
    first = next(frames)
    height, width = first.shape[:2]
    graph = _palette_graph(width, height, tick)
    starts = [0]
    for frame in itertools.chain([first], frames):
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts, picture.time_base = starts[-1], tick
        graph.push(picture)
        starts.append(round(len(starts) / rate / tick))
    graph.push(None)
    options = {"loop": "0", "final_delay": str(starts[-1] - starts[-2])}
    with av.open(f"file:{path}", "w", format="gif", options=options) as container:
        stream: Any = container.add_stream("gif", rate=100)
        stream.width, stream.height, stream.pix_fmt = width, height, "pal8"
        for _ in starts[:-1]:
            container.mux(stream.encode(graph.pull()))
        container.mux(stream.encode(None))


def _palette_graph(width: int, height: int, tick: Fraction) -> Any:
    """FFmpeg's palettegen and paletteuse filters: one palette for all the frames."""
    import av.filter

    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=width,
        height=height,
        format="rgb24",  # pyright: ignore[reportArgumentType]
        time_base=tick,
    )
    split = graph.add("split")
    palette = graph.add("palettegen", "reserve_transparent=0")
    paint = graph.add("paletteuse", "diff_mode=rectangle")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(paint, 1, 0)
    palette.link_to(paint, 0, 1)
    paint.link_to(sink)
    graph.configure()
    return graph
