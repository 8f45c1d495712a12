"""A suite runs inside training, changes nothing in it and leaves nothing behind."""

import gc
from pathlib import Path

import pytest
import torch

from opensora.cli.main import invoke
from opensora.engine import checkpoint
from opensora.train.tracking import read_records

ROOT = Path(__file__).resolve().parents[2]
ARENA = (
    "evaluation.settings={num_prompts: {1: 2}, scenes: {height: 32, width: 32, frames: 5}, "
    "sampling: {schedule: {num_steps: 2}}}"
)


def train(world, output: Path, *changes: str) -> int:
    overrides = [*world.overrides("stdit", output), "steps=8", "validation.every=0", *changes]
    return invoke(["train", str(ROOT / "configs/tiny/stdit.yaml"), *overrides])


def evaluations(output: Path) -> list[dict]:
    return [r for r in read_records(output / "metrics.jsonl") if r["kind"] == "evaluation"]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.find(output)).weights


def test_a_suite_is_run_at_chosen_steps_and_changes_no_weight(world, tmp_path):
    assert train(world, tmp_path / "plain") == 0
    assert train(world, tmp_path / "judged", "evaluation.every=4", ARENA) == 0
    found = [
        r for r in read_records(tmp_path / "judged/metrics.jsonl") if r["kind"] == "evaluation"
    ]
    assert [record["step"] for record in found] == [4, 8]
    assert 0 <= found[0]["trained/colour"] <= 1
    assert "vae/psnr" in found[0]
    assert (tmp_path / "judged/evaluation/step-000004/scores.json").exists()
    plain, judged = weights(tmp_path / "plain"), weights(tmp_path / "judged")
    assert all(torch.equal(plain[name], judged[name]) for name in plain)


def test_a_suite_leaves_no_tensor_behind(world, tmp_path, monkeypatch):
    from opensora.train.trainer import Trainer

    counts = []
    evaluate = Trainer._evaluate

    def counted(trainer: Trainer) -> None:
        counts.append(alive())
        evaluate(trainer)
        counts.append(alive())

    monkeypatch.setattr(Trainer, "_evaluate", counted)
    assert train(world, tmp_path / "run", "evaluation.every=3", ARENA) == 0
    assert len(counts) == 6
    assert counts[3] == counts[2]
    assert counts[5] == counts[4]


def alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_a_suite_that_cannot_judge_is_told_and_training_goes_on(world, tmp_path, caplog):
    changes = ("evaluation.every=4", "evaluation.settings={num_prompts: {1: 2}}")
    assert train(world, tmp_path / "run", *changes) == 0
    assert caplog.text.count("the suite's scenes are 17x64x64") == 2
    assert not [
        r for r in read_records(tmp_path / "run/metrics.jsonl") if r["kind"] == "evaluation"
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("evaluation.suite=areena", "Did you mean 'arena'"),
        ("evaluation.settings={num_prompt: {}}", "Did you mean 'num_prompts'"),
    ],
)
def test_a_suite_or_setting_that_there_is_not_is_refused_at_once(
    change, told, world, tmp_path, capsys
):
    assert train(world, tmp_path / "run", "evaluation.every=4", change) == 64
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
