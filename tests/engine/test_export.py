"""An export is what a checkpoint gives to those who use it, and nothing more."""

import pytest
import torch
from safetensors.torch import load_file

from opensora.engine import checkpoint, saving
from opensora.engine.checkpoint import Snapshot
from opensora.engine.export import export
from opensora.errors import CheckpointError, UsageError


@pytest.fixture
def run(tmp_path):
    snapshot = Snapshot(
        step=7,
        config='{"task": {"kind": "toy"}}',
        weights={"a.weight": torch.arange(4.0), "a.count": torch.tensor(3)},
        ema={"a.weight": torch.arange(4.0) / 3},
        optimizer={"a.weight/exp_avg": torch.zeros(4)},
        frozen={"vae.weight": torch.ones(2)},
        progress={"shape": {"height": 32}},
    )
    saving.save(tmp_path / "run/checkpoints", snapshot, keep=1)
    return tmp_path / "run"


def test_an_export_is_a_checkpoint_of_weights_alone(run, tmp_path):
    path = export(run, tmp_path / "out", dtype="fp32")
    names = {file.name for file in path.iterdir()}
    assert names == {
        *("weights.safetensors", "frozen.safetensors"),
        *("config.json", "progress.json", "manifest.json"),
    }
    found = checkpoint.load(checkpoint.find(path))
    assert (found.step, found.progress, found.optimizer, found.ema) == (
        *(7, {"shape": {"height": 32}}, {}, {}),
    )
    torch.testing.assert_close(found.weights["a.weight"], torch.arange(4.0) / 3, rtol=0, atol=0)
    assert found.frozen["vae.weight"].tolist() == [1, 1]


def test_weights_may_be_the_last_ones_and_half_as_wide(run, tmp_path):
    path = export(run, tmp_path / "out", dtype="bf16", averaged=False)
    weights = load_file(path / "weights.safetensors")
    assert weights["a.weight"].dtype == torch.bfloat16
    assert weights["a.weight"].tolist() == [0, 1, 2, 3]
    assert weights["a.count"].dtype == torch.int64


def test_an_export_overwrites_nothing_and_needs_a_sound_source(run, tmp_path):
    with pytest.raises(UsageError, match=r"dtype fp61 is unknown\. Did you mean 'fp16'"):
        export(run, tmp_path / "out", dtype="fp61")
    export(run, tmp_path / "out", dtype="fp32")
    with pytest.raises(UsageError, match="already exists"):
        export(run, tmp_path / "out", dtype="fp32")
    file = run / "checkpoints/step-000007/ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"ema\.safetensors"):
        export(run, tmp_path / "other", dtype="fp32")
