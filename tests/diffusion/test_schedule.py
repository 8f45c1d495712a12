"""Schedules: shapes, staircases, given frames, and what is refused."""

import math

import pydantic
import pytest
import torch
from hypothesis import given as property_of
from hypothesis import settings
from hypothesis import strategies as st

from opensora.diffusion import schedule
from opensora.diffusion.schedule import (
    autoregressive,
    check,
    full_sequence,
    held,
    karras,
    pyramid,
)
from opensora.errors import UsageError


def test_full_sequence_descends_evenly_from_noise_to_data():
    levels = full_sequence(4, 3)
    assert levels.shape == (5, 3)
    assert levels.dtype == torch.float32
    assert levels[:, 0].tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert (levels == levels[:, :1]).all()


def test_shift_spends_steps_on_noise():
    """3t / (1 + 2t) at t = 1, 2/3, 1/3, 0."""
    levels = full_sequence(3, 1, shift=3.0)[:, 0]
    torch.testing.assert_close(levels, torch.tensor([1.0, 6 / 7, 0.6, 0.0]))


def test_given_frames_are_data_from_the_first_row():
    given = torch.tensor([True, False, True])
    levels = full_sequence(4, 3, given=given)
    assert (levels[:, given] == 0).all()
    assert (levels[0, ~given] == 1).all()


def test_given_frames_may_differ_by_sample():
    given = torch.tensor([[True, False, False], [False, False, True]])
    levels = full_sequence(4, 3, given=given)
    assert levels.shape == (5, 2, 3)
    for row in range(2):
        assert torch.equal(levels[:, row], full_sequence(4, 3, given=given[row]))


def test_chunks_start_when_the_chunk_before_them_is_data():
    levels = autoregressive(2, 4, chunk=2)
    assert levels.tolist() == [
        [1.0, 1.0, 1.0, 1.0],
        [0.5, 0.5, 1.0, 1.0],
        [0.0, 0.0, 1.0, 1.0],
        [0.0, 0.0, 0.5, 0.5],
        [0.0, 0.0, 0.0, 0.0],
    ]


def test_given_frames_take_no_place_in_the_queue():
    given = torch.tensor([True, False, True, False])
    levels = autoregressive(2, 4, given=given)
    assert levels.shape == (5, 4)
    assert levels[:, 1].tolist() == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert levels[:, 3].tolist() == [1.0, 1.0, 1.0, 0.5, 0.0]


def test_pyramid_is_a_staircase():
    levels = pyramid(2, 3, lag=1)
    assert levels.tolist() == [
        [1.0, 1.0, 1.0],
        [0.5, 1.0, 1.0],
        [0.0, 0.5, 1.0],
        [0.0, 0.0, 0.5],
        [0.0, 0.0, 0.0],
    ]


def test_lag_runs_from_full_sequence_to_autoregressive():
    assert torch.equal(pyramid(5, 4, lag=0), full_sequence(5, 4))
    assert torch.equal(pyramid(5, 4, lag=5, chunk=2), autoregressive(5, 4, chunk=2))


@settings(deadline=None, max_examples=200)
@property_of(st.data())
def test_every_schedule_can_be_walked(data):
    num_steps = data.draw(st.integers(1, 12))
    num_frames = data.draw(st.integers(1, 9))
    masks = st.lists(st.booleans(), min_size=num_frames, max_size=num_frames)
    rows = data.draw(st.lists(masks, min_size=1, max_size=3))
    given = torch.tensor(rows)
    options = {
        "lag": data.draw(st.integers(0, num_steps)),
        "chunk": data.draw(st.integers(1, 4)),
        "shift": data.draw(st.floats(0.1, 20.0)),
        "spacing": data.draw(st.sampled_from(list(schedule.SPACINGS.values()))),
        "given": given,
    }
    if given.all():
        with pytest.raises(UsageError, match="every frame is given"):
            pyramid(num_steps, num_frames, **options)
        return
    levels = pyramid(num_steps, num_frames, **options)
    check(levels, batch=len(rows), num_frames=num_frames)
    # Every frame that is not given takes exactly num_steps steps.
    moves = (levels[1:] < levels[:-1]).sum(dim=0)
    assert torch.equal(moves, torch.where(given, 0, num_steps))


def test_karras_levels_are_those_of_the_paper():
    """Karras et al. 2022, equation 5: sigma from 80 to 0.002 with sigma_data 0.5, then 0."""
    steps = torch.arange(18, dtype=torch.float64)
    sigma = (80 ** (1 / 7) + steps / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    levels = karras(18)
    assert levels[-1] == 0
    ratio = torch.tan(levels[:-1] * math.pi / 2)
    torch.testing.assert_close(ratio, sigma / 0.5, rtol=1e-9, atol=0)
    assert karras(1)[0] > 0.99


def test_a_config_describes_the_same_matrix():
    union = pydantic.TypeAdapter(schedule.ScheduleConfig)
    given = torch.tensor([True, False, False, False])
    for tree, expected in (
        ({"kind": "full_sequence", "num_steps": 6}, full_sequence(6, 4, shift=2.0, given=given)),
        (
            {"kind": "autoregressive", "num_steps": 6, "chunk": 2},
            autoregressive(6, 4, chunk=2, shift=2.0, given=given),
        ),
        (
            {"kind": "pyramid", "num_steps": 6, "lag": 3, "spacing": "karras"},
            pyramid(6, 4, lag=3, shift=2.0, given=given, spacing=karras),
        ),
    ):
        config = union.validate_python(tree)
        assert torch.equal(schedule.matrix(config, 4, shift=2.0, given=given), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"lag": -1}, "lag is -1"),
        ({"lag": 4}, "above num_steps"),
        ({"given": torch.ones(2, dtype=torch.bool)}, "every frame is given"),
        ({"given": torch.ones(3, dtype=torch.bool)}, "given covers 3 frames"),
    ],
)
def test_schedules_that_cannot_be_made_are_refused(options, message):
    arguments = {"num_steps": 3, "num_frames": 2, **options}
    with pytest.raises(UsageError, match=message):
        pyramid(**arguments)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0, 1.0]], "at least one step"),
        ([[1.0], [0.0]], "schedule has shape"),
        ([[1.5, 1.0], [0.0, 0.0]], "lie in"),
        ([[math.nan, 1.0], [0.0, 0.0]], "lie in"),
        ([[1.0, 0.2], [0.5, 0.3], [0.0, 0.0]], "never rise"),
        ([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]], "no frame moves in step 0"),
    ],
)
def test_schedules_that_cannot_be_walked_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        check(torch.tensor(rows), batch=1, num_frames=2)


def test_frames_are_never_above_the_level_they_start_at():
    levels = held(full_sequence(4, 3), torch.tensor([0.0, 0.6, 1.0]))
    expected = [[0, 0.6, 1.0], [0, 0.6, 0.75], [0, 0.5, 0.5], [0, 0.25, 0.25], [0, 0, 0]]
    torch.testing.assert_close(levels, torch.tensor(expected))
    check(levels, batch=1, num_frames=3)


def test_steps_in_which_nothing_moves_are_left_out():
    levels = held(full_sequence(4, 2), torch.tensor([0.4, 0.4]))
    torch.testing.assert_close(levels, torch.tensor([[0.4, 0.4], [0.25, 0.25], [0.0, 0.0]]))


def test_samples_of_a_batch_may_start_at_different_levels():
    start = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.3, 0.3]])
    levels = held(full_sequence(4, 2), start)
    check(levels, batch=3, num_frames=2)
    assert levels.shape == (5, 3, 2)
    for sample in range(3):
        alone = held(full_sequence(4, 2), start[sample])
        moving = torch.unique_consecutive(levels[:, sample], dim=0)
        torch.testing.assert_close(moving, alone)
    with pytest.raises(UsageError, match="every frame is given"):
        held(full_sequence(4, 2), torch.zeros(2))
