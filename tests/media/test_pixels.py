"""Colours against the standards' own equations, computed here in float64 from the stored planes."""

import av
import numpy as np
import pytest
from media_support import encode

from opensora.errors import DataError
from opensora.media.pixels import clockwise_degrees, colour_matrix
from opensora.media.read import read_clip

# Kr and Kb of ITU-R BT.709, BT.601 and BT.2020 (non-constant luminance).
WEIGHTS = {"709": (0.2126, 0.0722), "601": (0.299, 0.114), "2020": (0.2627, 0.0593)}
CODES = {"709": 1, "601": 6, "2020": 9}


def to_rgb(planes: np.ndarray, matrix: str, full: bool, bits: int = 8) -> np.ndarray:
    """YCbCr (..., 3) of `bits` bits -> RGB (..., 3) in [0, 255] by ITU-R BT.709-6, item 3."""
    red, blue = WEIGHTS[matrix]
    scale = 2.0 ** (bits - 8)
    low, luma, chroma = (0, 255, 255) if full else (16, 219, 224)
    luma = luma if not full else (2**bits - 1) / scale
    chroma = chroma if not full else (2**bits - 1) / scale
    y = (planes[..., 0] / scale - low) / luma
    cb, cr = ((planes[..., i] / scale - 128) / chroma for i in (1, 2))
    r = y + 2 * (1 - red) * cr
    b = y + 2 * (1 - blue) * cb
    g = (y - red * r - blue * b) / (1 - red - blue)
    return np.stack([r, g, b], -1).clip(0, 1) * 255


def yuv_frame(colours: np.ndarray, height: int, width: int) -> np.ndarray:
    """A planar 4:2:0 frame with one vertical stripe a colour, stripes of even width."""
    edges = np.linspace(0, width // 2, len(colours) + 1).astype(int)
    columns = np.repeat(np.arange(len(colours)), np.diff(edges))
    luma = np.broadcast_to(colours[columns.repeat(2), 0], (height, width))
    chroma = [np.broadcast_to(colours[columns, i], (height // 2, width // 2)) for i in (1, 2)]
    return np.concatenate([luma.ravel(), *(c.ravel() for c in chroma)]).reshape(-1, width)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", ["709", "601", "2020", "untagged"])
@pytest.mark.parametrize("height", [96, 720])
def test_matrix_and_range_follow_the_tags_or_the_rule_by_height(tmp_path, matrix, full, height):
    colours = np.array([[81, 90, 240], [145, 54, 34], [41, 240, 110], [120, 128, 128]], np.uint8)
    tags = {"color_range": 2 if full else 1, "colorspace": CODES.get(matrix, 2)}
    path = encode(
        tmp_path / "tagged.mp4",
        yuv_frame(colours, height, 64)[None],
        input_format="yuv420p" if not full else "yuvj420p",
        pixel_format="yuv420p" if not full else "yuvj420p",
        options={"qp": "0"},
        tags=tags,
    )
    rgb = read_clip(path).frames[0]
    meant = {"untagged": "709" if height > 576 else "601"}.get(matrix, matrix)
    expected = to_rgb(colours.astype(float), meant, full)
    # swscale works in fixed point: 2 levels; the other standards differ by tens on these colours.
    for stripe in range(4):
        assert np.abs(rgb[:, 16 * stripe + 4 : 16 * stripe + 12] - expected[stripe]).max() <= 2
    for other in set(WEIGHTS) - {meant}:
        assert np.abs(to_rgb(colours.astype(float), other, full) - expected).max() > 8


def test_ten_bit_video_keeps_its_colours(tmp_path):
    colours = np.array([[324, 360, 940], [580, 216, 136], [480, 512, 512]], np.uint16)
    path = encode(
        tmp_path / "ten.mp4",
        yuv_frame(colours, 48, 96)[None],
        input_format="yuv420p10le",
        pixel_format="yuv420p10le",
        codec="libx265",
        options={"x265-params": "lossless=1:log-level=none"},
        tags={"colorspace": 1, "color_range": 1},
    )
    rgb = read_clip(path).frames[0]
    expected = to_rgb(colours.astype(float), "709", full=False, bits=10)
    for stripe in range(3):
        # swscale's careful routine rounds to the nearest level.
        assert np.abs(rgb[:, 32 * stripe + 8 : 32 * stripe + 24] - expected[stripe]).max() <= 1


@pytest.mark.parametrize(
    ("name", "matrix", "full"),
    [
        ("bt601_full_range.mp4", "601", True),
        ("nasa_13013.mp4", "709", False),
        ("asl_eat.mkv", "601", True),
        ("bikes_scene_cuts.mp4", "601", False),
        ("bigbuckbunny_720p.mp4", "709", False),
    ],
)
def test_real_files_agree_with_the_equation_on_their_own_planes(videos, name, matrix, full):
    with av.open(str(videos / name)) as container:
        frame = next(container.decode(container.streams.best("video")))
        height, width = frame.height, frame.width
        planes = frame.to_ndarray().reshape(-1)
    luma, cb, cr = np.split(planes, [height * width, height * width * 5 // 4])
    chroma = [c.reshape(height // 2, width // 2).repeat(2, 0).repeat(2, 1) for c in (cb, cr)]
    expected = to_rgb(
        np.stack([luma.reshape(height, width), *chroma], -1).astype(float), matrix, full
    )
    rgb = read_clip(videos / name, num_frames=1).frames[0]
    # Chroma is upsampled by repetition in swscale's fast routine, as it is here.
    assert np.abs(rgb - expected).max() <= 3


def test_ten_bit_bt2020_agrees_with_the_equation_where_chroma_is_flat(videos):
    with av.open(str(videos / "bt2020_10bit_hevc.mp4")) as container:
        frame = next(container.decode(video=0))
        planes = frame.to_ndarray().reshape(-1).astype(float)
    luma, cb, cr = np.split(planes, [240 * 320, 240 * 320 * 5 // 4])
    cb, cr = cb.reshape(120, 160), cr.reshape(120, 160)
    flat = np.ones((120, 160), bool)
    for dy in (-2, -1, 0, 1, 2):
        for dx in (-2, -1, 0, 1, 2):
            for plane in (cb, cr):
                flat &= np.roll(plane, (dy, dx), (0, 1)) == plane
    full = [plane.repeat(2, 0).repeat(2, 1) for plane in (cb, cr, flat)]
    expected = to_rgb(np.stack([luma.reshape(240, 320), *full[:2]], -1), "2020", False, bits=10)
    rgb = read_clip(videos / "bt2020_10bit_hevc.mp4", num_frames=1).frames[0]
    assert full[2].mean() > 0.05
    assert np.abs(rgb - expected)[full[2].astype(bool)].max() <= 1


def test_transparent_pixels_are_laid_on_white(tmp_path):
    rgba = np.zeros((1, 32, 32, 4), np.uint8)
    rgba[0, :, :16] = (200, 0, 0, 255)
    rgba[0, :, 16:] = (0, 0, 200, 0)
    rgba[0, 16:, 16:, 3] = 51
    path = encode(
        tmp_path / "alpha.mkv",
        rgba,
        input_format="rgba",
        codec="ffv1",
        pixel_format="bgra",
        options={"level": "3"},
    )
    frame = read_clip(path).frames[0]
    assert (frame[:, :16] == (200, 0, 0)).all()
    assert (frame[:16, 16:] == 255).all()
    assert (frame[16:, 16:] == (204, 204, 244)).all()  # 51 / 255 of (0, 0, 200), the rest white


def test_alpha_kept_beside_vp9_frames_is_found(videos):
    frame = read_clip(videos / "alpha_vp9.webm", num_frames=1).frames[0]
    assert (frame[0] == 255).all()


MIRRORED = {  # display matrices as mp4 stores them -> what a viewer does to the stored pixels
    (1, 0, 0, 1): lambda x: x,
    (0, 1, -1, 0): lambda x: np.rot90(x, -1),
    (-1, 0, 0, -1): lambda x: np.rot90(x, 2),
    (0, -1, 1, 0): lambda x: np.rot90(x, 1),
    (-1, 0, 0, 1): lambda x: x[:, ::-1],
    (1, 0, 0, -1): lambda x: x[::-1],
    (0, 1, 1, 0): lambda x: x.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
}


@pytest.mark.parametrize("matrix", MIRRORED)
def test_all_eight_orientations_come_out_upright(tmp_path, mp4, matrix):
    plain = read_clip(mp4, num_frames=1).frames[0]
    content = bytearray(mp4.read_bytes())
    # The track header's matrix {a b u c d v x y w}, 16.16 fixed point, follows 44 bytes of fields.
    place = content.index(b"tkhd") + 4 + 40
    for index, value in zip((0, 1, 3, 4), matrix, strict=True):
        at = place + 4 * index
        content[at : at + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path = tmp_path / "turned.mp4"
    path.write_bytes(content)
    assert np.array_equal(read_clip(path, num_frames=1).frames[0], MIRRORED[matrix](plain))


def test_the_four_rotated_recordings_stand_upright(videos):
    for degrees, shape in ((0, (320, 568)), (90, (568, 320)), (180, (320, 568)), (270, (568, 320))):
        frame = read_clip(videos / f"rotate_{degrees}.mov", num_frames=1).frames[0]
        assert frame.shape == (*shape, 3)
    assert clockwise_degrees((0, 65536, -65536, 0)) == 90
    assert clockwise_degrees((0, -65536, 65536, 0)) == 270
    assert clockwise_degrees((-65536, 0, 0, -65536)) == 180


def test_a_matrix_without_a_table_is_refused_by_name():
    frame = av.VideoFrame(16, 16, "yuv420p")
    frame.colorspace = 14  # ICtCp
    with pytest.raises(DataError, match=r"'clip' has colour matrix 14"):
        colour_matrix(frame, "clip")
