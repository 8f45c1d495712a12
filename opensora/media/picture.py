"""Still pictures in: png, jpeg, webp and bmp, upright, as frames of a video are."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from opensora.errors import DataError
from opensora.media.source import Limits, check_file

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_DEFAULT_LIMITS = Limits()


def is_picture(path: str | os.PathLike[str]) -> bool:
    """Whether a file's name is that of a still picture."""
    return Path(path).suffix.lower() in PICTURES


def as_pil(frame: np.ndarray) -> Any:
    """A PIL image of a frame, uint8 (H, W, 3)."""
    from PIL import Image

    return Image.fromarray(frame)


def read_picture(path: str | os.PathLike[str], *, limits: Limits = _DEFAULT_LIMITS) -> np.ndarray:
    """A picture as uint8 (H, W, 3) RGB: turned as its EXIF tag says, alpha laid on white.

    Raises:
        DataError: the file is missing, of no known format, damaged, or larger than the limits,
            which is found out before it is decoded.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
            image = Image.open(path, formats=_FORMATS)
        with image:
            if image.width * image.height > limits.max_pixels_per_frame:
                raise DataError(
                    f"'{path}' has {image.width}x{image.height} pixels, more than the limit of "
                    f"{limits.max_pixels_per_frame}: make it smaller"
                )
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # which Pillow would clip at 255, not scale
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            upright = upright.convert("RGBA")
    except UnidentifiedImageError:
        raise DataError(f"'{path}' is no picture: give {', '.join(PICTURES)}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"'{path}' cannot be read as a picture: {error}") from None
    ground = Image.new("RGBA", upright.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(ground, upright).convert("RGB"))


def resize_picture(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) at another size: PIL's bicubic, antialiased, rounded and clipped."""
    from PIL import Image

    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)
