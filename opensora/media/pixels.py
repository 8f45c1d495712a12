"""One decoded picture -> upright full-range RGB, with the matrix and range that it was coded in.

Tags decide; where they are silent the standard's rule does: BT.709 above 576 lines or from 1280
columns on, BT.601 below, limited range. HDR (PQ, HLG) is converted by its matrix alone: no tone
mapping, so it looks flat. Transparent pixels are laid on white. Interlaced lines stay as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from opensora.errors import DataError

# ITU-T H.273 matrix coefficients -> names of swscale's tables.
MATRICES = {1: "ITU709", 4: "FCC", 5: "ITU601", 6: "ITU601", 7: "SMPTE240M", 9: "BT2020"}
UNSPECIFIED = 2
FULL_RANGE = 2
HDR_TRANSFERS = {16, 18}  # PQ and HLG in ITU-T H.273
BACKGROUND = 255
# swscale converts these by a fast routine within 1 level of the equation; its general routine
# needs the flags in `Converter` to come as close, and without them is 2 levels too dark.
FAST_FORMATS = {"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuva420p"}


class Converter:
    """Turns the pictures of one stream into uint8 RGB arrays.

    The first picture fixes the orientation; the conversion context is kept from one to the next.
    """

    def __init__(self, path: str) -> None:
        from av.video.reformatter import Interpolation, VideoReformatter

        self._path = path
        accurate = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
        self._careful = Interpolation.BILINEAR | accurate
        self._reformatter = VideoReformatter()
        self._matrix: tuple[int, int, int, int] | None = None

    def __call__(self, frame: Any) -> np.ndarray:
        """Convert one picture.

        Returns:
            uint8 (H, W, 3), upright; a view into memory that lives as long as the array.

        Raises:
            DataError: for a colour matrix that cannot be converted.
        """
        alpha = has_alpha(frame.format)
        rgb = self._reformatter.reformat(
            frame,
            format="rgba" if alpha else "rgb24",
            src_colorspace=colour_matrix(frame, self._path),  # pyright: ignore[reportArgumentType]
            src_color_range=colour_range(frame),
            dst_color_range="JPEG",
            interpolation=None if frame.format.name in FAST_FORMATS else self._careful,
            threads=1,
        )
        plane = rgb.planes[0]
        channels = 4 if alpha else 3
        rows = np.frombuffer(plane, np.uint8)  # pyright: ignore[reportCallIssue, reportArgumentType]
        rows = rows.reshape(plane.height, plane.line_size)
        pixels = rows[:, : plane.width * channels].reshape(plane.height, plane.width, channels)
        return _upright(_on_background(pixels) if alpha else pixels, self._orientation(frame))

    def _orientation(self, frame: Any) -> tuple[int, int, int, int]:
        if self._matrix is None:
            self._matrix = orientation(frame)
        return self._matrix


def colour_matrix(frame: Any, path: str) -> str | None:
    """The swscale table to decode a frame with; None for pictures that are RGB or grey already.

    Args:
        path: where the frame came from, for the message.

    Raises:
        DataError: for a matrix that swscale has no table for.
    """
    if frame.format.is_rgb or frame.format.has_palette or frame.format.name.startswith("gray"):
        return None
    code = frame.colorspace
    if code == UNSPECIFIED:
        code = 1 if frame.height > 576 or frame.width >= 1280 else 6
    if code not in MATRICES:
        raise DataError(
            f"'{path}' has colour matrix {code} (ITU-T H.273), which cannot be converted; known "
            f"are {sorted(MATRICES)}. Re-encode it with BT.709"
        )
    return MATRICES[code]


def colour_range(frame: Any) -> str | None:
    """'JPEG' (full) or 'MPEG' (limited); None for RGB and grey, where the format implies it."""
    name = frame.format.name
    if frame.color_range == FULL_RANGE or name.startswith("yuvj"):
        return "JPEG"
    if frame.format.is_rgb or frame.format.has_palette or name.startswith("gray"):
        return None
    return "MPEG"


def has_alpha(pixel_format: Any) -> bool:
    """Whether pixels of this format can be transparent; palettes can."""
    return pixel_format.has_palette or any(c.is_alpha for c in pixel_format.components)


def orientation(frame: Any) -> tuple[int, int, int, int]:
    """The display matrix (a, b, c, d): (x, y) is shown at (a x + c y, b x + d y), y downwards."""
    # Asking a frame for its side data ties it into a reference cycle, which keeps megabytes until
    # the garbage collector comes; so a thumbnail, which carries the same side data, is asked.
    thumbnail = frame.reformat(
        width=16,
        height=16,
        format="gray",
        interpolation="POINT",
        src_colorspace="ITU601",
        dst_colorspace="ITU601",
        threads=1,
    )
    data = thumbnail.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = (int(value) for value in np.frombuffer(data, np.int32)[:5])
    return a, b, c, d


def clockwise_degrees(matrix: tuple[int, int, int, int]) -> int:
    """By how many degrees (0, 90, 180 or 270) the stored picture is turned clockwise to show it."""
    a, b, _, _ = matrix
    if abs(a) >= abs(b):
        return 0 if a >= 0 else 180
    return 90 if b > 0 else 270


def _upright(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Apply the nearest quarter turn or mirror image of a display matrix, as a view."""
    a, b, c, d = matrix
    if abs(a) >= abs(b):
        return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return pixels.transpose(1, 0, 2)[:: -1 if b < 0 else 1, :: -1 if c < 0 else 1]


def _on_background(pixels: np.ndarray) -> np.ndarray:
    colours, alpha = pixels[..., :3], pixels[..., 3:]
    if alpha.min() == 255:
        return colours
    opacity = alpha.astype(np.uint16)
    blended = colours * opacity + (255 - opacity) * np.uint16(BACKGROUND)
    return ((blended + 127) // 255).astype(np.uint8)
