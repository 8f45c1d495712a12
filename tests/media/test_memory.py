import gc
import itertools

import pytest
from test_damage import resident_bytes

from opensora.errors import DataError
from opensora.media.probe import probe
from opensora.media.read import read_clip


def growth(work, warm_up: int, rounds: int) -> int:
    """How many bytes more this process holds after `rounds` calls than after `warm_up`."""
    for _ in range(warm_up):
        work()
    gc.collect()
    before = resident_bytes()
    for _ in range(rounds):
        work()
    gc.collect()
    return resident_bytes() - before


@pytest.mark.parametrize("threads", [1, 2])
def test_decoding_again_and_again_holds_no_more_memory(mp4, threads):
    # One clip is 48 x 64 x 48 x 3 = 442 kB: losing even one in ten would show.
    grown = growth(lambda: read_clip(mp4, threads=threads), 20, 150)
    assert grown < 5 * 2**20


def test_errors_and_probes_hold_no_more_memory(mp4, tmp_path):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(mp4.read_bytes()[: mp4.stat().st_size // 2])

    def work():
        probe(mp4)
        with pytest.raises(DataError):
            read_clip(cut)

    assert growth(work, 20, 150) < 5 * 2**20


@pytest.mark.slow
def test_a_thousand_decodes_of_real_files_grow_by_less_than_50_mb(videos):
    names = ["asl_eat.mkv", "av1_small.mkv", "hevc_small.mp4", "vp8_testsrc2.webm", "rotate_90.mov"]
    names += ["alpha_vp9.webm", "animated_tiny.gif", "derived_zeroed_2kB.mkv", "chaplin.mp4"]
    names += ["h264_10bit_testsrc.mp4"]
    turn = itertools.cycle(names)

    def work():
        try:
            read_clip(videos / next(turn), num_frames=2, fps=20, start=0.05)
        except DataError:
            pass

    grown = growth(work, 50, 1000)
    print(f"resident growth over 1,000 decodes: {grown / 2**20:.1f} MB")
    assert grown < 50 * 2**20
