"""Losses, gradient norms and validation of the tiny configs are the numbers in tests/golden.

Any engine and layout has to reproduce them. Set OPENSORA_WRITE_GOLDEN=1 to write them anew, after a
change that is meant to move them.
"""

import json
import os
from pathlib import Path

import pytest
from train_support import losses, make_trainer, tiny, train_records

from opensora.train.tracking import read_records

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
STEPS = 12

# Weights that differ by 1e-6 of their size, ten roundings of float32, move none of these numbers
# by more than 1e-6; other kernels round every sum of a step differently, hence twenty times that.
TOLERANCE = 2e-5


def measured(name: str, output: Path) -> dict[str, object]:
    config = tiny(name, output, f"steps={STEPS}", "checkpoint.every=0", "validation.every=0")
    make_trainer(config, validation_sizes=(4, 3)).run()
    records = read_records(output / "metrics.jsonl")
    (last,) = (r for r in records if r["kind"] == "validation")
    return {
        "loss": losses(output),
        "gradient_norm": [record["gradient_norm"] for record in train_records(output)],
        "validation": {k: v for k, v in last.items() if k not in ("kind", "step", "time")},
    }


@pytest.mark.parametrize("name", ["vae", "stdit", "mmdit"])
def test_a_tiny_run_is_the_golden_one(name, tmp_path):
    path = GOLDEN / f"{name}.json"
    found = measured(name, tmp_path / "run")
    if os.environ.get("OPENSORA_WRITE_GOLDEN"):
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    golden = json.loads(path.read_text(encoding="utf-8"))
    assert found["loss"] == pytest.approx(golden["loss"], rel=TOLERANCE)
    assert found["gradient_norm"] == pytest.approx(golden["gradient_norm"], rel=TOLERANCE)
    assert found["validation"] == pytest.approx(golden["validation"], rel=TOLERANCE)
    assert len(golden["loss"]) == STEPS
