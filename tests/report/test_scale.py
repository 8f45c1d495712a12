"""Axes hold what they show between round ticks, and figures say it in few digits."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora.report.scale import duration, figure, fit_axis, labels, round_step, size, tight_axis

finite = st.floats(-1e30, 1e30, allow_nan=False)


@given(st.lists(finite, min_size=1, max_size=20), st.booleans())
def test_an_axis_holds_all_values_between_its_ticks(values, from_zero):
    values = np.array(values)
    axis = fit_axis(values, from_zero=from_zero)
    assert axis.low < axis.high
    assert 2 <= len(axis.ticks) <= 10
    assert list(axis.ticks) == sorted(set(axis.ticks))
    places = axis.fraction(values)
    assert np.isfinite(places).all()
    # Values within 0.2 % outside a logarithmic axis are taken as on its end.
    assert (places >= -0.01).all()
    assert (places <= 1.01).all()
    if from_zero:
        assert axis.low <= 0 <= axis.high
        assert not axis.log


@given(finite, finite)
def test_a_tight_axis_ends_where_it_is_told_to(first, second):
    low, high = sorted((first, second))
    axis = tight_axis(low, high)
    places = axis.fraction(np.array(axis.ticks))
    # A tick within 1e-9 steps of an end is taken as on it; five steps make the axis or less.
    assert ((places > -1e-8) & (places < 1 + 1e-8)).all()
    if high - low > 1e-6 * max(abs(low), abs(high), 1e-20):
        assert (axis.low, axis.high) == (low, high)
        assert len(axis.ticks) >= 2


def test_a_loss_over_decades_is_logarithmic_and_a_calm_one_is_not():
    loss = fit_axis(np.array([0.02, 3.0]))
    assert loss.log
    assert loss.ticks == pytest.approx((0.02, 0.1, 0.5, 2))
    assert loss.fraction(np.array(math.sqrt(loss.low * loss.high))) == pytest.approx(0.5)
    assert not fit_axis(np.array([0.5, 3.0])).log
    assert not fit_axis(np.array([-1.0, 300.0])).log
    assert not fit_axis(np.array([0.0, 300.0])).log


def test_ticks_are_round():
    assert fit_axis(np.array([0.13, 0.88])).ticks == (0, 0.2, 0.4, 0.6, 0.8, 1.0)
    assert fit_axis(np.array([9000.0, 10400.0]), from_zero=True).ticks == (0, 5000, 10000, 15000)
    assert tight_axis(0, 3700).ticks == (0, 1000, 2000, 3000)
    assert fit_axis(np.array([])).ticks == (0.0, 0.5, 1.0)
    assert fit_axis(np.zeros(3), from_zero=True).low == 0


def test_labels_of_ticks_are_not_rounded():
    assert labels((0.83, 0.8325, 0.835)) == ["0.83", "0.8325", "0.835"]
    assert labels((0.0, 1000.0, 2500.0)) == ["0", "1k", "2.5k"]
    assert labels((1e9, 1e9 + 1)) == ["1G", "1.000000001G"]


@pytest.mark.parametrize(
    ("length", "step"), [(1, 1), (1.1, 2), (2.2, 2.5), (3, 5), (6, 10), (0.003, 0.005), (7e8, 1e9)]
)
def test_steps_are_one_two_two_and_a_half_or_five(length, step):
    assert round_step(length) == pytest.approx(step)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.03124, "0.0312"),
        (-0.5, "−0.5"),
        (12.0, "12"),
        (1500, "1.5k"),
        (999.7, "1k"),
        (12345, "12.3k"),
        (999_999, "1M"),
        (1.932e6, "1.93M"),
        (1.31e11, "131G"),
        (0.00001, "1e-05"),
        (math.nan, "nan"),
        (-math.inf, "−∞"),
        (None, "–"),
    ],
)
def test_figures_have_three_digits(value, text):
    assert figure(value) == text


def test_units_take_the_prefix():
    assert figure(1.31e11, unit="FLOP/s") == "131 GFLOP/s"
    assert figure(12.0, unit="FLOP/s") == "12 FLOP/s"


@given(st.floats())
def test_any_number_can_be_written(value):
    assert figure(value)
    assert duration(value)
    assert size(value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3.25, "3.2 s"),
        (41, "41 s"),
        (59.7, "1 min 00 s"),
        (740, "12 min 20 s"),
        (11100, "3 h 05 min"),
        (187200, "2 d 4 h"),
        (None, "–"),
    ],
)
def test_durations_read_like_speech(seconds, text):
    assert duration(seconds) == text


def test_sizes_have_binary_units():
    assert [size(n) for n in (812, 1536, 2**30, 3 * 2**40)] == [
        "812 B",
        "1.5 KiB",
        "1 GiB",
        "3 TiB",
    ]
