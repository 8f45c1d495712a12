"""Curves keep what matters when they are smoothed and thinned."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora.report.series import MAX_POINTS, Collector, Series, smooth, thin


def series(values):
    return Series(np.arange(len(values), dtype=float), np.array(values, dtype=float))


def test_the_last_record_of_a_step_wins_and_steps_rise():
    collector = Collector()
    for step, value in ((2, 1.0), (1, 5.0), (2, 3.0), (3, math.nan)):
        collector.add(step, value)
    found = collector.series()
    assert found.steps.tolist() == [1, 2, 3]
    assert found.values.tolist()[:2] == [5.0, 3.0]
    assert found.last() == 3.0
    assert len(Collector().series()) == 0


def test_repeated_steps_keep_the_order_they_were_recorded_in():
    collector = Collector()
    for attempt in range(100):
        for step in range(7):
            collector.add(step, attempt)
    assert collector.series().values.tolist() == [99] * 7


def test_a_huge_curve_is_thinned_to_the_limit_and_keeps_its_spikes():
    values = np.ones(1_000_000)
    values[[123_456, 777_777]] = (50.0, -50.0)
    thinned = thin(series(values))
    assert len(thinned) <= MAX_POINTS
    assert {50.0, -50.0} <= set(thinned.values.tolist())
    assert thinned.steps[[0, -1]].tolist() == [0, 999_999]


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=200),
    st.integers(4, 40),
)
def test_thinning_keeps_order_ends_and_extremes(values, limit):
    whole = series(values)
    thinned = thin(whole, limit)
    assert len(thinned) <= limit or len(thinned) == len(whole)
    assert (np.diff(thinned.steps) > 0).all()
    assert {thinned.steps[0], thinned.steps[-1]} == {0, len(values) - 1}
    if len(whole.finite):
        assert thinned.finite.max() == whole.finite.max()
        assert thinned.finite.min() == whole.finite.min()


def test_smoothing_leaves_a_straight_line_alone_away_from_its_ends():
    line = series(np.arange(100.0) * 0.25 + 3)
    smoothed = smooth(line, window=11)
    # A symmetric kernel does not move a line; sums of 100 numbers below 1e3 keep 1e-11.
    np.testing.assert_allclose(smoothed.values[10:-10], line.values[10:-10], atol=1e-11)


def test_smoothing_takes_noise_away():
    noise = series(np.random.default_rng(0).normal(size=3000))
    # Two passes of a window of w: variance 2 / (3 w), here w = 101, deviation 0.081.
    assert smooth(noise).values.std() < 0.12


def test_smoothing_passes_over_what_is_not_finite():
    values = np.full(50, 2.0)
    values[[3, 4, 20]] = (math.nan, math.inf, 1e200)
    assert smooth(series(values), window=5).values == pytest.approx(np.full(50, 2.0))
    assert np.isnan(smooth(series([math.nan, math.nan])).values).all()


def test_smoothing_keeps_small_changes_on_a_large_level():
    values = 1e9 + np.arange(1000) % 2
    smoothed = smooth(series(values), window=100).values
    assert smoothed[200:-200] == pytest.approx(np.full(600, 1e9 + 0.5), abs=0.01)
