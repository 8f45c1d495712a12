import os
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora.errors import StorageError, UsageError
from opensora.media.read import read_clip
from opensora.media.write import safe_name, write_image, write_video

PALETTE = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 0),
    (0, 255, 255),
    (255, 0, 255),
    (255, 255, 255),
    (0, 0, 0),
    (128, 128, 128),
    (200, 100, 50),
    (30, 60, 120),
]


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
@pytest.mark.parametrize("size", [(64, 64), (33, 47)])
def test_solid_colours_survive_the_round_trip(tmp_path, suffix, size):
    frames = np.empty((len(PALETTE), *size, 3), np.uint8)
    frames[:] = np.array(PALETTE, np.uint8)[:, None, None, :]
    path = write_video(tmp_path / f"palette{suffix}", frames, fps=5, keyframe_every=1)
    read = read_clip(path).frames[:, : size[0], : size[1]]
    # 8-bit limited range costs up to 1 level a channel in each of Y, Cb, Cr: 2 levels in RGB;
    # quantisation at the default quality may cost another. GIF keeps 256 colours exactly.
    tolerance = 0 if suffix == ".gif" else 3
    assert np.abs(read.astype(int) - frames).max() <= tolerance


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_odd_sizes_grow_by_a_copy_of_their_last_row_and_column(tmp_path, suffix):
    frame = np.zeros((1, 15, 17, 3), np.uint8)
    frame[:, -1], frame[:, :, -1] = 255, 255
    read = read_clip(write_video(tmp_path / f"odd{suffix}", frame, fps=1, crf=0)).frames
    assert read.shape == (1, 16, 18, 3)
    assert (read[0, 14:] > 200).all()
    assert (read[0, :, 16:] > 200).all()
    assert (read[0, :12, :14] < 50).all()


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(25, 2), Fraction(8)])
def test_mp4_carries_the_exact_rational_rate_even_through_a_float(tmp_path, frames, rate):
    path = write_video(tmp_path / "rate.mp4", frames[:9], fps=float(rate))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == rate
        stamps = [frame.pts * stream.time_base for frame in container.decode(stream)]
    assert stamps == [k / rate for k in range(9)]


def test_mp4_is_tagged_bt709_limited_and_starts_with_its_index(tmp_path, frames):
    path = write_video(tmp_path / "tags.mp4", frames[:3], fps=8)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        tags = (context.colorspace, context.color_primaries, context.color_trc)
        assert tags == (1, 1, 1)
        assert context.color_range == 1
        assert context.format.name == "yuv420p"
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_bytes_do_not_depend_on_what_freed_memory_holds(tmp_path):
    """Each process finds another byte everywhere in fresh memory; a smooth scene with B-frames is
    where x264 was seen to read it."""
    code = """
import hashlib, sys
from opensora.arena.draw import render
from opensora.arena.scenes import SceneConfig, sample
from opensora.media.write import write_video
path = write_video(sys.argv[1], render(sample(SceneConfig(), 0, 3)), fps=8)
print(hashlib.sha256(path.read_bytes()).hexdigest())
"""
    found = set()
    for byte in ("1", "85", "170"):
        command = [sys.executable, "-c", code, str(tmp_path / f"{byte}.mp4")]
        environment = {**os.environ, "MALLOC_PERTURB_": byte}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1


def test_the_same_frames_give_the_same_bytes(tmp_path, frames):
    one = write_video(tmp_path / "one.mp4", frames, fps=8)
    two = write_video(tmp_path / "two.mp4", iter(frames), fps=8)
    assert one.read_bytes() == two.read_bytes()


def test_gif_delays_add_up_without_drift(tmp_path, frames):
    path = write_video(tmp_path / "slow.gif", frames, fps=30)
    clip = read_clip(path)
    assert np.abs(clip.timestamps - np.arange(48) / 30).max() <= 0.005
    with av.open(str(path)) as container:
        assert container.duration == 1_600_000  # the last delay included: 48 / 30 s


def test_png_holds_the_frame_or_a_sheet_of_all(tmp_path, frames):
    one = read_clip(write_video(tmp_path / "one.png", frames[5:6], fps=8)).frames
    assert np.array_equal(one[0], frames[5])
    sheet = read_clip(write_video(tmp_path / "all.png", frames[:4], fps=8)).frames[0]
    assert np.array_equal(sheet[:48, :64], frames[0])
    assert np.array_equal(sheet[52:, 68:], frames[3])


def test_parents_are_made_and_a_file_is_replaced(tmp_path, frames):
    path = tmp_path / "a" / "b" / "clip.mp4"
    write_video(path, frames[:2], fps=8)
    write_video(path, frames[:5], fps=8)
    assert len(read_clip(path).frames) == 5
    assert os.listdir(path.parent) == ["clip.mp4"]


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_a_failure_midway_leaves_the_old_file_and_no_other(tmp_path, frames, suffix):
    path = write_video(tmp_path / f"clip{suffix}", frames[:2], fps=8)
    before = path.read_bytes()

    def broken():
        yield from frames[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(path, broken(), fps=8)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_names_as_long_as_the_file_system_allows_are_written(tmp_path, frames):
    path = tmp_path / ("n" * 251 + ".mp4")
    assert read_clip(write_video(path, frames[:2], fps=8)).frames.shape[0] == 2


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path, frames):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot be written"):
        write_video(tmp_path / "file" / "clip.mp4", frames, fps=8)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_a_storage_error(tmp_path, frames, monkeypatch):
    monkeypatch.setattr("opensora.media.write.secrets.token_hex", lambda _: "x")
    (tmp_path / ".x.tmp").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space"):
        write_video(tmp_path / "clip.mp4", frames, fps=8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"path": "clip.mpeg"}, "is no format"),
        ({"path": "clip"}, "is no format"),
        ({"frames": np.zeros((0, 8, 8, 3), np.uint8)}, "no frames"),
        ({"frames": np.zeros((1, 8, 8, 3), np.float32)}, "float32"),
        ({"frames": np.zeros((1, 8, 8), np.uint8)}, r"\(8, 8\)"),
        ({"frames": [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)]}, "one size"),
        ({"fps": 0}, "fps is 0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": 1e-9}, "fps is 1e-09"),
        ({"crf": 52}, "crf is 52"),
        ({"threads": 0}, "threads=0"),
        ({"path": "clip.gif", "fps": 60}, "GIF"),
        ({"path": "clip.gif", "crf": 20}, "means nothing"),
        ({"frames": np.zeros((1, 2, 40000, 3), np.uint8)}, "cannot be encoded"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, frames, change, said):
    arguments = {"path": "clip.mp4", "frames": frames[:2], "fps": 8} | change
    path = tmp_path / arguments.pop("path")
    with pytest.raises(UsageError, match=said):
        write_video(path, **arguments)
    assert os.listdir(tmp_path) == []


def test_images_are_png_only(tmp_path, frames):
    with pytest.raises(UsageError, match=r"\.png"):
        write_image(tmp_path / "x.jpg", frames[0])


@given(st.text(max_size=80), st.integers(0, 10**6))
def test_safe_names_hold_nothing_but_letters_digits_and_hyphens(text, index):
    name = safe_name(text, index)
    assert name.startswith(f"{index:04d}")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert len(name) <= 40 + 1 + len(f"{index:04d}")
    assert not name.endswith("-")


def test_safe_names_read_like_the_prompt():
    assert safe_name("A red Círcle moves left!", 7) == "0007-a-red-circle-moves-left"
    assert safe_name("../../etc/passwd", 1) == "0001-etc-passwd"
    assert safe_name("影片", 2) == "0002"
    assert safe_name("x" * 60, 3) == "0003-" + "x" * 40
    with pytest.raises(UsageError, match="from 0"):
        safe_name("x", -1)
