"""Two ranks under ColossalAI's DDP plugin train as one rank does without it."""

import os
from pathlib import Path

import colossal_ranks
import pytest
import torch
from colossal_ranks import CASES
from runs import training
from test_ranks import Outcome, assert_equal_runs, launch
from train_support import ALONE, ROOT

VENV = Path(os.environ.get("OPENSORA_COLOSSAL_VENV", ROOT / ".venv-colossal"))
PYTHON = VENV / "bin" / "python"

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.xdist_group("train-colossal"),
    pytest.mark.skipif(not PYTHON.exists(), reason="scripts/colossal.sh has made no environment"),
]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Outcome:
    folder = tmp_path_factory.mktemp("colossal")
    launch(Path(colossal_ranks.__file__), str(folder), python=str(PYTHON))
    return Outcome(folder)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one(case, two, tmp_path):
    torch.set_num_threads(1)
    alone = [change for change in CASES[case] if not change.startswith("parallel")]
    rows = training(tmp_path / "one", ALONE, "stdit", *alone)
    seen = two.of(case)
    seen = seen[:1] if case == "shared" else seen
    assert_equal_runs(tmp_path / "one", two.run(case), rows, seen)
