"""Making odd video files with PyAV directly, and reading the numbers painted into frames."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

VIDEOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "videos"
MPEG4 = {"qmin": "2", "qmax": "2", "g": "12"}


def numbered_frames(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames of one grey each, 5 levels from frame to frame, with a corner of noise."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = (10 + 5 * np.arange(count, dtype=np.uint8))[:, None, None, None]
    noise = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    frames[:, :16, :16] = noise
    return frames


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers that `numbered_frames` painted, read back."""
    return [round((float(level) - 10) / 5) for level in frames[:, 24:, 24:].mean(axis=(1, 2, 3))]


def encode(
    path: Path,
    frames: np.ndarray,
    *,
    ticks: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 24),
    codec: str = "libx264",
    container: str | None = None,
    pixel_format: str = "yuv420p",
    input_format: str = "rgb24",
    options: dict[str, str] | None = None,
    tags: dict[str, int] | None = None,
) -> Path:
    """Encode frames with timestamps, tags and formats of the test's own choice."""
    with av.open(f"file:{path}", "w", format=container) as file:
        stream: Any = file.add_stream(codec, rate=24, options=options or {"crf": "10"})
        height, width = first_size(frames, input_format)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.time_base = time_base
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format=input_format)
            for name, value in (tags or {}).items():
                setattr(picture, name, value)
            picture.pts = index if ticks is None else ticks[index]
            picture.time_base = time_base
            file.mux(stream.encode(picture))
        file.mux(stream.encode(None))
    return path


def first_size(frames: np.ndarray, input_format: str) -> tuple[int, int]:
    """Height and width of the pictures in an array of packed RGB or planar 4:2:0 frames."""
    height, width = frames[0].shape[:2]
    return (height * 2 // 3, width) if input_format.startswith("yuv420p") else (height, width)
