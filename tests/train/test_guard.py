"""The verdict before an update, and what is written down about a step that was refused."""

import json
import math

import pytest
from train_support import rows_of, toy_trainer

from opensora.errors import NumericsError
from opensora.train.guard import Guard, GuardConfig
from opensora.train.tracking import read_records


def guard_after(losses, **config) -> Guard:
    guard = Guard(GuardConfig(**{"window": 16, **config}))
    for loss in losses:
        guard.record(loss, None, step=1)
    return guard


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad):
    guard = guard_after([])
    assert "loss is" in guard.verdict(bad, 1.0)
    assert "gradient norm is" in guard.verdict(1.0, bad)
    assert guard.verdict(1.0, 1e9) is None


def test_a_spike_is_far_above_the_recent_losses():
    losses = [1.0, 2.0] * 8  # mean 1.5, deviation 0.5: six deviations above are 4.5
    guard = guard_after(losses)
    assert guard.verdict(4.4, 1.0) is None
    assert guard.verdict(4.6, 1.0).endswith("above 4.5, a spike")
    assert guard.verdict(-100.0, 1.0) is None
    assert guard_after(losses, spike_sigmas=7.0).verdict(4.6, 1.0) is None


def test_losses_that_hardly_differ_make_no_spike_of_a_small_rise():
    guard = guard_after([1.0, 1.0001] * 8)
    assert guard.verdict(1.9, 1.0) is None
    assert "spike" in guard.verdict(2.1, 1.0)


def test_half_a_window_has_to_be_known():
    guard = guard_after([1.0] * 7)
    assert guard.verdict(100.0, 1.0) is None
    guard.record(1.0, None, step=8)
    assert guard.verdict(100.0, 1.0) is not None


def test_only_the_window_counts_and_refused_losses_do_not():
    guard = guard_after([1000.0] * 16 + [1.0] * 16)
    assert guard.verdict(100.0, 1.0) is not None
    guard.record(500.0, "a spike", step=1)
    assert list(guard.recent) == [1.0] * 16


def test_patience_ends_the_run_and_an_accepted_step_renews_it():
    guard = guard_after([], patience=3)
    guard.record(1.0, "bad", step=1)
    guard.record(1.0, "bad", step=2)
    guard.record(1.0, None, step=3)
    guard.record(1.0, "bad", step=4)
    guard.record(1.0, "bad", step=5)
    with pytest.raises(NumericsError, match=r"step 6: 3 steps in a row.*resume_despite=\[optim\]"):
        guard.record(1.0, "bad", step=6)
    assert NumericsError.exit_code == 70


def test_its_memory_goes_through_json():
    guard = guard_after([0.1, 1 / 3, 1e-30])
    guard.record(1.0, "bad", step=4)
    again = Guard(GuardConfig(window=16))
    again.restore(json.loads(json.dumps(guard.state())))
    assert (again.recent, again.skipped_in_a_row) == (guard.recent, 1)


def test_a_spike_is_skipped_and_its_samples_are_named_worst_first(tmp_path):
    worst = rows_of(6, 6)[2]
    poison = lambda step, row: 1e4 if (step, row) == (6, worst) else 1.0  # noqa: E731
    trainer = toy_trainer(tmp_path / "run", "steps=9", "guard.window=8", poison=poison)
    trainer.run()
    assert trainer.task.decisions == [True] * 6 + [False] + [True] * 2
    (incident,) = read_records(tmp_path / "run/incidents.jsonl")
    assert incident["step"] == 7
    assert "a spike" in incident["reason"]
    samples = incident["samples"]
    assert (samples[0]["id"], samples[0]["text"]) == (worst, f"row {worst}")
    assert [s["loss"] for s in samples] == sorted((s["loss"] for s in samples), reverse=True)
    assert sorted(s["id"] for s in samples) == sorted(rows_of(6, 6))


def test_giving_up_keeps_the_last_checkpoint(tmp_path):
    poison = lambda step, row: math.nan if step >= 4 else 1.0  # noqa: E731
    options = ("steps=9", "guard.patience=2", "checkpoint.every=2")
    trainer = toy_trainer(tmp_path / "run", *options, poison=poison)
    with pytest.raises(NumericsError, match="step 6: 2 steps in a row"):
        trainer.run()
    again = toy_trainer(tmp_path / "run", *options)
    assert again.state.resume()
    assert again.progress.step == 4
    again.run()
    # What the first attempt wrote of steps after the checkpoint is forgotten.
    assert read_records(tmp_path / "run/incidents.jsonl") == []
