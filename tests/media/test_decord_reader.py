import numpy as np
import pytest
from media_support import encode

from opensora.errors import DataError
from opensora.media.read import read_clip
from opensora.media.source import Limits
from opensora.media.write import write_video

pytest.importorskip("decord")


def both(path, **arguments):
    plain = read_clip(path, **arguments)
    return plain, read_clip(path, backend="decord", on_damage="keep", **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_frames": 5, "start": 0.7},
        {"num_frames": 9, "fps": 10, "start": 0.3},
        {"fps": 50, "start": 0.5, "end": 1.0},
        {"num_frames": 3, "fps": 1},
    ],
)
def test_decord_gives_the_same_frames_bit_for_bit(mp4, arguments):
    plain, other = both(mp4, **arguments)
    assert np.array_equal(plain.frames, other.frames)
    assert other.timestamps == pytest.approx(plain.timestamps, abs=1e-9)
    assert (plain.fps, plain.path) == (other.fps, other.path)


@pytest.mark.parametrize(
    "name",
    ["rotate_90.mov", "bt601_full_range.mp4", "derived_vfr_nasa.mkv", "non_zero_start.mp4"],
)
def test_decord_agrees_on_rotated_full_range_variable_and_late_files(videos, name):
    plain, other = both(videos / name, num_frames=2, fps=30, start=0.03)
    assert np.array_equal(plain.frames, other.frames)


def test_a_colon_in_the_name_is_no_protocol(tmp_path, mp4, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:b.mp4", "-x.mp4", "é 影片.mp4"):
        (tmp_path / name).write_bytes(mp4.read_bytes())
        plain, other = both(name, num_frames=2)
        assert np.array_equal(plain.frames, other.frames)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("h264_10bit_testsrc.mp4", "10 bits"),
        ("alpha_vp9.webm", "alpha"),
        ("mpeg4_part2_testsrc2.avi", "untagged HD"),
        ("discard_first_keyframe.mp4", "edit list"),
        ("animated_tiny.gif", "alpha"),
    ],
)
def test_what_decord_would_show_differently_is_refused(videos, name, said):
    with pytest.raises(DataError, match=f"{name}' cannot be read with decord: .*{said}"):
        read_clip(videos / name, backend="decord", on_damage="keep")


def test_mirrored_video_and_foreign_matrices_are_refused(tmp_path, mp4, frames):
    content = bytearray(mp4.read_bytes())
    at = content.index(b"tkhd") + 44
    content[at : at + 4] = (-65536).to_bytes(4, "big", signed=True)
    (tmp_path / "mirrored.mp4").write_bytes(content)
    encode(tmp_path / "wide.mp4", frames[:2], tags={"colorspace": 9})
    for name, said in (("mirrored.mp4", "mirrored"), ("wide.mp4", "BT2020")):
        with pytest.raises(DataError, match=said):
            read_clip(tmp_path / name, backend="decord", on_damage="keep")


def test_limits_and_length_hold_for_decord_too(mp4, tmp_path, frames):
    with pytest.raises(DataError, match="cannot give"):
        read_clip(mp4, num_frames=99, backend="decord", on_damage="keep")
    with pytest.raises(DataError, match="max_frames=5"):
        read_clip(mp4, backend="decord", on_damage="keep", limits=Limits(max_frames=5))
    one = write_video(tmp_path / "one.mp4", frames[:1], fps=8)
    assert both(one)[1].frames.shape == (1, 48, 64, 3)
