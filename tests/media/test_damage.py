"""Hostile and damaged files: each is refused by name, with its reason, soon and without a crash."""

import os
import struct
import time

import numpy as np
import pytest
from media_support import MPEG4, encode, numbered_frames, numbers

from opensora.errors import DataError
from opensora.media.probe import probe
from opensora.media.read import read_clip
from opensora.media.write import write_video


def patched(content: bytes, tag: bytes, offset: int, value: int) -> bytes:
    """`content` with the 32-bit field `offset` bytes after a box's tag replaced."""
    changed = bytearray(content)
    struct.pack_into(">I", changed, content.index(tag) + 4 + offset, value)
    return bytes(changed)


def zeroed(content: bytes, at: float, length: int) -> bytes:
    """`content` with `length` bytes wiped from the fraction `at` on."""
    first = int(len(content) * at)
    return content[:first] + bytes(length) + content[first + length :]


def test_bytes_that_are_no_video_are_refused(tmp_path):
    cases = {
        "empty.mp4": (b"", r"is empty \(0 bytes\)"),
        "text.mp4": (b"these are not the frames you are looking for", "cannot be opened"),
        "header.mp4": (b"\0\0\0\x18ftypisom\0\0\x02\0isomiso2", "cannot be opened"),
        "noise.mkv": (np.random.default_rng(0).bytes(4096), "cannot be opened"),
    }
    for name, (content, said) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}' {said}"):
            read_clip(tmp_path / name)
        with pytest.raises(DataError, match=f"{name}' {said}"):
            probe(tmp_path / name)


def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    for name in ("pipe.mp4", "folder.mp4", "loop.mp4", "absent.mp4", "nul\0.mp4"):
        if name == "pipe.mp4":  # opening one for reading would wait for a writer for ever
            keep = os.open(tmp_path / name, os.O_RDWR)
        with pytest.raises(DataError):
            read_clip(tmp_path / name)
        if name == "pipe.mp4":
            os.close(keep)


def test_a_playlist_cannot_reach_other_files(tmp_path, mp4):
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.mp4").write_text(playlist.format(mp4))
    (tmp_path / "list.txt").write_text(f"ffconcat version 1.0\nfile '{mp4}'\n")
    for name in ("list.mp4", "list.txt"):
        with pytest.raises(DataError, match="cannot be opened"):
            read_clip(tmp_path / name)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".gif"])
def test_a_file_cut_in_half_is_damaged_and_its_first_half_can_be_kept(tmp_path, frames, suffix):
    path = tmp_path / f"cut{suffix}"
    if suffix in (".mp4", ".gif"):
        write_video(path, frames, fps=24)
    elif suffix == ".avi":
        encode(path, frames, codec="mpeg4", options=MPEG4)
    else:
        encode(path, frames)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=f"cut{suffix}' is damaged: .* frames decoded so far"):
        read_clip(path)
    assert probe(path).damage is not None
    kept = numbers(read_clip(path, on_damage="keep").frames)
    assert 5 < len(kept) < 48
    assert kept[:5] == list(range(5))
    assert numbers(read_clip(path, num_frames=5).frames) == list(range(5))  # before the damage


def test_an_mp4_without_its_index_is_refused(tmp_path, frames):
    path = encode(tmp_path / "tail.mp4", frames)  # the index comes last here
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="header is cut off"):
        read_clip(path)


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [("libx264", ".mp4"), ("libx265", ".mp4"), ("libx264", ".mkv"), ("libvpx-vp9", ".webm")],
)
@pytest.mark.parametrize("at", [0.3, 0.5, 0.7])
def test_a_wiped_region_is_found(tmp_path, codec, suffix, at):
    noise = np.random.default_rng(0).integers(0, 256, (24, 96, 96, 3), dtype=np.uint8)
    options = {"crf": "30", "x265-params": "log-level=none"} if "265" in codec else {"crf": "30"}
    path = encode(tmp_path / f"wiped{suffix}", noise, codec=codec, options=options)
    assert probe(path).damage is None
    path.write_bytes(zeroed(path.read_bytes(), at, 2000))
    with pytest.raises(DataError, match="is damaged"):
        read_clip(path)
    assert probe(path, count="decode").damage is not None


def test_a_wiped_gif_is_found(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (6, 48, 48, 3), dtype=np.uint8)
    path = write_video(tmp_path / "wiped.gif", noise, fps=8)
    path.write_bytes(zeroed(path.read_bytes(), 0.5, 1000))
    with pytest.raises(DataError, match="is damaged"):
        read_clip(path)


def test_clips_before_the_damage_can_still_be_read(tmp_path):
    frames = numbered_frames(48)
    frames[24:] = np.random.default_rng(0).integers(0, 256, frames[24:].shape, dtype=np.uint8)
    path = write_video(tmp_path / "late.mp4", frames, fps=24, keyframe_every=12)
    path.write_bytes(zeroed(path.read_bytes(), 0.8, 2000))
    assert numbers(read_clip(path, num_frames=12).frames) == list(range(12))
    with pytest.raises(DataError, match="is damaged"):
        read_clip(path, start=1.5)


def test_a_header_that_claims_a_billion_frames_costs_nothing(tmp_path, mp4):
    content = mp4.read_bytes()
    claims = {
        "stts": patched(content, b"stts", 8, 10**9),
        "stsz": patched(content, b"stsz", 8, 10**9),
        "constant": patched(patched(content, b"stsz", 4, 1), b"stsz", 8, 10**9),
        "mdhd": patched(patched(content, b"mdhd", 16, 2**31), b"mvhd", 16, 2**31),
        "stsc": patched(patched(content, b"stsz", 8, 10**9), b"stsc", 12, 10**9),
    }
    for name, claim in claims.items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(claim)
        began, before = time.monotonic(), resident_bytes()
        if name in ("stts", "mdhd"):  # durations only: the frames are there and are given
            assert numbers(read_clip(path, num_frames=40).frames) == list(range(40))
        else:
            with pytest.raises(DataError, match=f"{name}\\.mp4"):
                read_clip(path)
        assert time.monotonic() - began < 10
        assert resident_bytes() - before < 64 * 2**20


def test_a_header_that_claims_huge_pictures_is_refused_before_they_are_allocated(tmp_path):
    gif = write_video(tmp_path / "huge.gif", numbered_frames(2), fps=8)
    gif.write_bytes(gif.read_bytes()[:6] + struct.pack("<HH", 65500, 65500) + gif.read_bytes()[10:])
    before = resident_bytes()
    with pytest.raises(DataError, match=r"huge\.gif"):
        read_clip(gif)
    assert resident_bytes() - before < 64 * 2**20


def test_a_picture_of_16k_by_16k_is_refused_before_it_is_allocated(tmp_path):
    from PIL import Image

    path = tmp_path / "huge.png"
    Image.new("1", (16384, 16384)).save(path)
    before = resident_bytes()
    with pytest.raises(DataError, match=r"huge\.png.*max_pixels_per_frame"):
        read_clip(path)
    assert resident_bytes() - before < 64 * 2**20


def test_a_change_of_size_in_mid_stream_is_named(tmp_path):
    small = encode(tmp_path / "small.ts", numbered_frames(12))
    large = encode(tmp_path / "large.ts", numbered_frames(12, 96, 128), ticks=range(12, 24))
    path = tmp_path / "both.ts"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    with pytest.raises(DataError, match=r"changes its frame size from 64x48 to 128x96"):
        read_clip(path, on_damage="keep")
    assert len(read_clip(path, num_frames=10).frames) == 10


def test_one_frame_and_a_wrong_suffix_are_no_damage(tmp_path, frames):
    one = write_video(tmp_path / "one.mp4", frames[:1], fps=24)
    assert read_clip(one).frames.shape == (1, 48, 64, 3)
    gif = write_video(tmp_path / "real.gif", frames[:3], fps=8)
    renamed = gif.rename(tmp_path / "renamed.mp4")
    assert numbers(read_clip(renamed).frames) == [0, 1, 2]


def resident_bytes() -> int:
    """Memory this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
