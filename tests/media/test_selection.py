import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora.errors import DataError, UsageError
from opensora.media.selection import (
    Picture,
    Request,
    choose,
    clock_slack,
    measured_rate,
    refuse_shortage,
)
from opensora.media.source import Limits

SLACK = 1e-6


def pictures(times: list[float]) -> list[Picture]:
    ends = [*times[1:], times[-1] + 0.1]
    return [Picture(t, e, k) for k, (t, e) in enumerate(zip(times, ends, strict=True))]


def request(num_frames=None, fps=None, start=0.0, end=None) -> Request:
    return Request.checked(num_frames, fps, start, end, Limits())


def chosen(times: list[float], wanted: Request) -> list[int]:
    return [picture.frame for _, picture in choose(pictures(times), wanted, SLACK)]


@given(
    gaps=st.lists(st.integers(1, 400), min_size=1, max_size=30),
    fps=st.sampled_from([1.0, 7.5, 24.0, 25.0, 29.97, 60.0]),
    start=st.integers(0, 3000),
    num_frames=st.integers(1, 40),
)
def test_each_grid_time_gets_the_last_frame_whose_time_has_come(gaps, fps, start, num_frames):
    times = np.cumsum([0, *gaps]) / 1000
    wanted = request(num_frames, fps, start / 1000)
    result = list(choose(pictures(list(times)), wanted, SLACK))
    until = times[-1] + 0.1 + 0.05
    for k in range(num_frames):
        time = start / 1000 + k / fps
        if time >= until:
            assert len(result) == k
            return
        assert result[k][0] == pytest.approx(time)
        assert result[k][1].frame == max(i for i, t in enumerate(times) if t <= time + SLACK)
    assert len(result) == num_frames


def test_without_fps_the_frames_of_the_half_open_range_are_taken():
    times = [0.0, 0.1, 0.2, 0.3, 0.4]
    assert chosen(times, request()) == [0, 1, 2, 3, 4]
    assert chosen(times, request(start=0.1, end=0.3)) == [1, 2]
    assert chosen(times, request(2, start=0.15)) == [2, 3]
    assert chosen(times, request(9, start=0.3)) == [3, 4]


def test_a_grid_that_runs_to_the_end_has_as_many_frames_as_the_stream_has_time_for():
    times = [0.0, 0.1, 0.2, 0.3]
    assert chosen(times, request(fps=10)) == [0, 1, 2, 3]
    assert chosen(times, request(fps=20)) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert chosen(times, request(fps=5)) == [0, 2]


def test_the_last_frame_stays_on_show_for_half_an_interval_more_but_no_longer():
    times = [0.0, 0.1, 0.2, 0.3]
    assert chosen(times, request(1, fps=1, start=0.44)) == [3]
    assert chosen(times, request(1, fps=1, start=0.46)) == []


def test_a_late_first_frame_stands_in_for_the_time_before():
    assert chosen([0.25, 0.35], request(4, fps=10)) == [0, 0, 0, 0]


@pytest.mark.parametrize("fps", [None, 10.0, 5.0])
def test_no_picture_is_drawn_that_the_clip_does_not_need(fps):
    drawn = []

    def counted():
        for picture in pictures([k / 10 for k in range(50)]):
            drawn.append(picture.frame)
            yield picture

    result = list(choose(counted(), request(4, fps), SLACK))
    assert drawn[-1] == result[-1][1].frame


def test_coarse_clocks_are_forgiven_and_exact_ones_are_not():
    assert clock_slack(0.001, 1 / 30) == pytest.approx(0.00101)
    assert clock_slack(1 / 30, 1 / 30) == 1e-6
    assert clock_slack(0.01, 0.02) == pytest.approx(0.005)
    assert clock_slack(1 / 90000, 1 / 30) < 2e-5


@given(
    num_frames=st.none() | st.integers(1, 20),
    fps=st.none() | st.sampled_from([5.0, 10.0, 24.0]),
    start=st.floats(0, 3),
    length=st.none() | st.floats(0.01, 3),
)
def test_a_clip_is_refused_exactly_when_it_is_shorter_than_asked(num_frames, fps, start, length):
    times = [k / 10 for k in range(10)]
    end = None if length is None else start + length
    wanted = request(num_frames, fps, start, end)
    count = len(chosen(times, wanted))
    short = count < (num_frames or 1) or (
        num_frames is None and end is not None and end > 1.05 + (0 if fps is None else 1 / fps)
    )
    enough = count >= (num_frames or 1) and (num_frames is not None or end is None or end <= 1.0)
    if enough:
        refuse_shortage("clip", wanted, count, stream_end=1.0, interval=0.1)
    if short:
        with pytest.raises(DataError, match="'clip' cannot give"):
            refuse_shortage("clip", wanted, count, stream_end=1.0, interval=0.1)


def test_the_announced_rate_is_kept_where_a_coarse_clock_agrees_with_it():
    rounded = np.round(np.arange(100) / 30, 3)
    assert measured_rate(rounded, 0.001, 1 / 30) == 30.0
    assert measured_rate(np.arange(50) / 12, 0.001, 1 / 30) == pytest.approx(12.0)
    assert measured_rate(np.zeros(1), 0.001, 1 / 25) == 25.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_frames": 0}, "num_frames is 0"),
        ({"num_frames": 10**9}, "max_frames"),
        ({"fps": 0}, "fps is 0"),
        ({"fps": math.nan}, "fps is nan"),
        ({"start": -1}, "start is -1"),
        ({"start": math.inf}, "start is inf"),
        ({"start": 2.0, "end": 2.0}, "end is 2.0"),
        ({"end": math.inf}, "end is inf"),
    ],
)
def test_requests_that_make_no_sense_are_refused(arguments, said):
    with pytest.raises(UsageError, match=said):
        request(**arguments)
