from fractions import Fraction

import numpy as np
import pytest
from media_support import encode, numbered_frames

from opensora.errors import DataError, UsageError
from opensora.media.probe import probe
from opensora.media.source import Limits
from opensora.media.write import write_video


def test_a_plain_file_is_described(mp4):
    found = probe(mp4)
    assert found.path == str(mp4)
    assert (found.width, found.height, found.num_frames) == (64, 48, 48)
    assert (found.codec, found.pixel_format) == ("h264", "yuv420p")
    assert "mp4" in found.container
    assert (found.fps, found.nominal_fps, found.duration, found.start) == (24.0, 24.0, 2.0, 0.0)
    assert (found.rotation, found.pixel_aspect) == (0, 1.0)
    flags = (found.variable_rate, found.hdr, found.has_audio, found.damage)
    assert flags == (False, False, False, None)


def test_counting_by_decoding_agrees_with_counting_packets(mp4, tmp_path, frames):
    assert probe(mp4, count="decode") == probe(mp4)
    gif = write_video(tmp_path / "clip.gif", frames[:9], fps=8)
    assert probe(gif, count="decode") == probe(gif)


def test_a_variable_rate_is_noticed_and_averaged(tmp_path):
    path = encode(
        tmp_path / "variable.mkv",
        numbered_frames(5),
        ticks=[0, 40, 80, 500, 1000],
        time_base=Fraction(1, 1000),
    )
    found = probe(path)
    assert found.variable_rate
    assert found.fps == pytest.approx(4.0)
    jittered = [round(k * 1000 / 24) for k in range(24)]
    steady = encode(
        tmp_path / "steady.mkv",
        numbered_frames(24),
        ticks=jittered,
        time_base=Fraction(1, 1000),
    )
    assert not probe(steady).variable_rate


def test_frames_are_counted_not_believed(tmp_path, mp4):
    content = bytearray(mp4.read_bytes())
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(content[: len(content) * 2 // 3])
    found = probe(cut)
    assert found.num_frames < 48
    assert found.damage == f"packet {found.num_frames} is cut short"


def test_size_is_that_of_the_upright_picture(tmp_path, mp4):
    content = bytearray(mp4.read_bytes())
    place = content.index(b"tkhd") + 44
    for index, value in zip((0, 1, 3, 4), (0, 1, -1, 0), strict=True):
        at = place + 4 * index
        content[at : at + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(content)
    found = probe(turned)
    assert (found.width, found.height, found.rotation) == (48, 64, 90)


def test_what_cannot_be_probed_is_refused(tmp_path, mp4):
    with pytest.raises(DataError, match="absent"):
        probe(tmp_path / "absent.mp4")
    with pytest.raises(DataError, match="max_pixels_per_frame"):
        probe(mp4, limits=Limits(max_pixels_per_frame=100))
    with pytest.raises(UsageError, match="count is 'header'"):
        probe(mp4, count="header")


def test_hdr_is_told_from_sdr(videos):
    assert probe(videos / "nasa_13013_hdr_hevc10.mp4").hdr
    assert not probe(videos / "nasa_13013.mp4").hdr
    assert np.isclose(probe(videos / "carphone_pristine_qcif.mp4").pixel_aspect, 128 / 117)
