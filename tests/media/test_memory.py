import contextlib
import gc
import itertools

import numpy as np
import pytest
from test_damage import resident_bytes

from opensora.errors import DataError
from opensora.media.probe import probe
from opensora.media.read import read_clip
from opensora.media.write import write_video

ROUNDS = 100


def growth(work, warm_up: int, rounds: int) -> int:
    """How many bytes more this process holds after `rounds` calls than after `warm_up`.

    The collector of cycles is off: memory that waits for it is memory held.
    """
    for _ in range(warm_up):
        work()
    gc.collect()
    gc.disable()
    try:
        before = resident_bytes()
        for _ in range(rounds):
            work()
        return resident_bytes() - before
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Three frames of 512x512: one frame lost in each of 100 calls would hold 39 MB or more."""
    frames = np.full((3, 512, 512, 3), 90, np.uint8)
    return write_video(tmp_path_factory.mktemp("large") / "large.mp4", frames, fps=8)


@pytest.mark.parametrize("threads", [1, 2])
def test_decoding_again_and_again_holds_no_more_memory(large, threads):
    assert growth(lambda: read_clip(large, threads=threads), 20, ROUNDS) < 15 * 2**20


def test_errors_and_probes_hold_no_more_memory(large, tmp_path):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(large.read_bytes()[:-30])

    def work():
        probe(large)
        with pytest.raises(DataError, match="is damaged"):
            read_clip(cut)

    assert growth(work, 20, ROUNDS) < 15 * 2**20


@pytest.mark.slow
def test_a_thousand_decodes_of_real_files_grow_by_less_than_50_mb(videos):
    names = ["asl_eat.mkv", "av1_small.mkv", "hevc_small.mp4", "vp8_testsrc2.webm", "rotate_90.mov"]
    names += ["alpha_vp9.webm", "animated_tiny.gif", "derived_zeroed_2kB.mkv", "chaplin.mp4"]
    names += ["h264_10bit_testsrc.mp4"]
    turn = itertools.cycle(names)

    def work():
        with contextlib.suppress(DataError):
            read_clip(videos / next(turn), num_frames=2, fps=20, start=0.05)

    grown = growth(work, 50, 1000)
    print(f"resident growth over 1,000 decodes: {grown / 2**20:.1f} MB")
    assert grown < 50 * 2**20
