"""Still pictures come in upright, opaque and within their limits, or not at all."""

import zlib

import numpy as np
import pytest
from PIL import Image

from opensora.errors import DataError
from opensora.media.picture import PICTURES, is_picture, read_picture
from opensora.media.source import Limits


@pytest.fixture
def corner() -> np.ndarray:
    """White, 24 x 16, with a red corner at the top left."""
    picture = np.full((16, 24, 3), 255, np.uint8)
    picture[:8, :8] = (255, 0, 0)
    return picture


@pytest.mark.parametrize("suffix", PICTURES)
def test_every_format_is_read(suffix, corner, tmp_path):
    path = tmp_path / f"a{suffix.upper()}"
    Image.fromarray(corner).save(path, quality=95)
    found = read_picture(path)
    assert is_picture(path)
    assert (found.shape, found.dtype) == ((16, 24, 3), np.uint8)
    assert np.abs(found.astype(int) - corner).mean() < 8


def test_a_picture_is_turned_as_its_camera_was(corner, tmp_path):
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: a quarter turn clockwise makes it upright
    Image.fromarray(corner).save(path, exif=exif, quality=95)
    found = read_picture(path).astype(int)
    assert found.shape == (24, 16, 3)
    assert np.abs(found[:8, 8:] - (255, 0, 0)).mean() < 8


def test_what_is_transparent_is_white(tmp_path):
    picture = np.zeros((4, 4, 4), np.uint8)
    picture[0, 0] = (0, 0, 255, 255)
    Image.fromarray(picture).save(tmp_path / "a.png")
    found = read_picture(tmp_path / "a.png")
    assert found[0, 0].tolist() == [0, 0, 255]
    assert (found[1:] == 255).all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "I;16", "CMYK"])
def test_other_kinds_of_pixels_become_rgb(mode, tmp_path):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new(mode, (5, 3)).save(tmp_path / f"a.{suffix}")
    assert read_picture(tmp_path / f"a.{suffix}").shape == (3, 5, 3)


def test_grey_of_16_bits_keeps_its_upper_8(tmp_path):
    values = np.arange(0, 65536, 257 * 17, dtype=np.uint16)[None]
    Image.fromarray(values).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png")[0, :, 0].tolist() == (values[0] >> 8).tolist()


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG whose header alone is there."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        length = len(content).to_bytes(4, "big")
        return length + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x02\0\0\0") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("text.png", b"no picture at all", "is no picture"),
        ("empty.png", b"", "is empty"),
        ("bomb.png", png_that_claims(100_000, 100_000), "more than the limit|exceeds limit"),
        ("large.png", png_that_claims(9000, 9000), "more than the limit"),
        ("larger.png", png_that_claims(12_000, 12_000), "more than the limit"),
        ("cut.png", png_that_claims(8, 8), "cannot be read as a picture"),
        ("gif.png", b"GIF89a" + bytes(20), "is no picture"),
    ],
)
def test_what_is_none_or_too_large_is_refused_before_it_is_decoded(name, content, told, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        read_picture(tmp_path / name)


def test_limits_are_the_callers(corner, tmp_path):
    Image.fromarray(corner).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="24x16 pixels, more than the limit of 100"):
        read_picture(tmp_path / "a.png", limits=Limits(max_pixels_per_frame=100))


def test_a_missing_picture_and_a_folder_are_told(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(DataError):
            read_picture(path)
