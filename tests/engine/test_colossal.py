"""ColossalAI: our config in its words, and what is refused; `tests/train/test_colossal_ranks.py`
trains with it."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from opensora import config as configs
from opensora.dist.mesh import Layout
from opensora.engine.colossal import ColossalConfig, translate
from opensora.errors import UsageError
from opensora.train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("OPENSORA_COLOSSAL_VENV", ROOT / ".venv-colossal")) / "bin" / "python"

CONFIGS = [
    ColossalConfig(),
    ColossalConfig(plugin="low_level_zero", stage=2, offload=True),
    ColossalConfig(plugin="gemini", stage=3),
    ColossalConfig(plugin="hybrid_parallel", stage=1),
]


def words(config: ColossalConfig, **layout: int):
    return translate(config, Layout(**layout), precision=torch.bfloat16, max_norm=0.5)


def test_ddp_gets_its_bucket():
    assert words(ColossalConfig(bucket_mb=8)) == ("TorchDDPPlugin", {"bucket_cap_mb": 8})


def test_zero_gets_stage_offload_clipping_and_buckets_in_millions():
    name, found = words(ColossalConfig(plugin="low_level_zero", stage=2, offload=True))
    assert name == "LowLevelZeroPlugin"
    assert found == {
        "stage": 2,
        "precision": "bf16",
        "max_norm": 0.5,
        "reduce_bucket_size_in_m": 6,
        "cpu_offload": True,
    }


@pytest.mark.parametrize(("stage", "share"), [(2, 0.0), (3, 1.0)])
def test_gemini_shards_parameters_in_stage_3(stage, share):
    _, found = words(ColossalConfig(plugin="gemini", stage=stage, offload=True), tp=2)
    assert (found["shard_param_frac"], found["offload_optim_frac"]) == (share, 1.0)
    assert found["tp_size"] == 2


def test_hybrid_gets_the_mesh():
    name, found = words(ColossalConfig(plugin="hybrid_parallel", stage=1), tp=4)
    assert name == "HybridParallelPlugin"
    assert (found["tp_size"], found["pp_size"], found["zero_stage"]) == (4, 1, 1)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["engine.plugin=gemini", "engine.stage=1"], "gemini has no stage 1: set stage=2 or 3"),
        (["engine.stage=1"], "ddp has no stage 1"),
        (["engine.offload=true"], "offload needs sharded state"),
        (["engine.plugin=gemini", "engine.stage=3"], "does not train: set engine.kind=fsdp"),
        (["engine.plugin=low_level_zero", "engine.stage=2"], "set engine.kind=deepspeed"),
    ],
)
def test_what_does_not_train_is_refused_with_the_config(overrides, told):
    tiny = ROOT / "configs" / "tiny" / "stdit.yaml"
    configs.load(TrainConfig, tiny, ["output=x", "engine.kind=colossal"])
    with pytest.raises(UsageError, match=told):
        configs.load(TrainConfig, tiny, ["output=x", "engine.kind=colossal", *overrides])


@pytest.mark.skipif(not PYTHON.exists(), reason="scripts/colossal.sh has made no environment")
def test_the_plugins_have_arguments_of_these_names():
    asked = {name: sorted(found) for name, found in map(words, CONFIGS)}
    code = (
        "import inspect\n"
        "from opensora.engine.colossal import load\n"
        "plugins = load()[1]\n"
        f"for name, asked in {asked!r}.items():\n"
        "    known = inspect.signature(getattr(plugins, name).__init__).parameters\n"
        "    assert set(asked) <= set(known), (name, set(asked) - set(known))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([PYTHON, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
