"""Twenty resumes over other numbers of ranks and workers lose, repeat and reorder nothing.

Ranks are processes that die by SIGKILL in a forward pass, between two steps, and in the middle of a
checkpoint. The ledger is kept by the model, whose count of updates comes and goes with its weights.
"""

import json
import subprocess
import sys
from pathlib import Path

import ledger
import pytest

pytestmark = [pytest.mark.dist, pytest.mark.xdist_group("train-ledger")]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("ledger")
    with open(folder / "log", "w") as log:  # no pipe: workers of a killed rank hold it for seconds
        command = [sys.executable, str(Path(ledger.__file__)), str(folder)]
        ran = subprocess.run(command, stdout=log, stderr=log, timeout=600)
    assert ran.returncode == 0, (folder / "log").read_text()[-3000:]
    return json.loads((folder / "found.json").read_text())


def test_the_undisturbed_run_sees_each_step_once_and_each_epoch_whole(found):
    consumed = found["undisturbed"]["consumed"]
    assert [step for step, _ in consumed] == list(range(ledger.STEPS))
    assert {row for _, rows in consumed for row in rows} == set(range(50))


def test_twenty_resumes_are_the_undisturbed_run(found):
    disturbed = found["disturbed"]
    assert disturbed["consumed"] == found["undisturbed"]["consumed"]
    *killed, last = disturbed["codes"]
    assert len(killed) == 20
    assert set(last) == {0}
    for codes, attempt in zip(killed, ledger.attempts(20, seed=0), strict=False):
        expected = 75 if attempt.moment == "signal" else -9
        assert codes[attempt.victim] == expected, attempt
    # Sums over ranks are taken in another order: 60 steps of rounding a float32.
    assert disturbed["weights"] == pytest.approx(found["undisturbed"]["weights"], rel=1e-5)


def test_the_attempts_are_of_every_kind():
    made = ledger.attempts(20, seed=0)
    assert {attempt.world_size for attempt in made} == {1, 2, 4}
    assert {attempt.num_workers for attempt in made} == {0, 2}
    assert {attempt.moment for attempt in made} == {*ledger.MOMENTS, None}


def test_resumes_of_steps_that_mix_shapes_see_the_same_samples(found):
    whole, parts = (found[name]["consumed"] for name in ("undisturbed_mix", "disturbed_mix"))
    assert [step for step, _ in whole] == list(range(ledger.STEPS))
    in_any_order = [[(step, sorted(rows)) for step, rows in steps] for steps in (whole, parts)]
    assert in_any_order[0] == in_any_order[1]
    weights = [found[name]["weights"] for name in ("undisturbed_mix", "disturbed_mix")]
    assert weights[1] == pytest.approx(weights[0], rel=1e-5)


@pytest.mark.parametrize("bug", [bug.__name__ for bug in ledger.PLANTED])
def test_a_planted_bug_is_seen(bug, found):
    assert set(found[bug]["codes"][-1]) == {0}
    assert found[bug]["consumed"] != found["undisturbed"]["consumed"]
