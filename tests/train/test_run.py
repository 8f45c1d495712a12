"""Putting a run together from files: choices that are made once, and refusals before any work."""

import dataclasses
import json

import pytest
from train_support import ALONE, tiny

from opensora.config import to_json
from opensora.engine import saving
from opensora.engine.checkpoint import Snapshot
from opensora.errors import CheckpointError, UsageError
from opensora.ops import backends
from opensora.ops.backends import BACKENDS
from opensora.train import run
from opensora.train.text_to_video import TextToVideoConfig, load_vae, resolve
from opensora.zoo import build_vae

SLOW_BF16 = {"bf16": 1.0, "fp32": 1.0}
FAST_BF16 = {"bf16": 1.3, "fp32": 1.0}


@pytest.fixture
def vae_run(tmp_path):
    """A checkpoint of an autoencoder as training leaves it."""
    config = tiny("vae", tmp_path / "vae")
    vae = build_vae(config.task.vae)
    weights = {f"vae.{name}": value for name, value in vae.state_dict().items()}
    saving.save(tmp_path / "vae/checkpoints", Snapshot(1, config.json_text(), weights), keep=1)
    return tmp_path / "vae"


def save_config(config) -> None:
    weights = {"x": next(build_vae(tiny("vae", config.output).task.vae).parameters()).detach()}
    root = config.output / "checkpoints"
    saving.save(root, Snapshot(1, config.json_text(), weights), keep=1)


def test_the_faster_precision_is_chosen_once(tmp_path):
    config = tiny("vae", tmp_path / "run", "precision=auto")
    assert run.settle(config, ALONE, SLOW_BF16).precision == "fp32"
    chosen = run.settle(config, ALONE, FAST_BF16)
    assert chosen.precision == "bf16"
    save_config(chosen)
    # A busy machine measures otherwise; the run goes on as it began.
    assert run.settle(config, ALONE, SLOW_BF16).precision == "bf16"
    assert (
        run.settle(tiny("vae", tmp_path / "run", "precision=fp32"), ALONE, FAST_BF16).precision
        == "fp32"
    )


def test_whether_to_compile_is_chosen_once(vae_run, tmp_path, monkeypatch):
    config = tiny("stdit", tmp_path / "run", f'task.vae_from="{vae_run}"')
    assert run.settle(config, ALONE, SLOW_BF16).compile == "never"  # auto, on a CPU
    monkeypatch.setattr(run.compiling, "missing", lambda device: None)
    asked = config.model_copy(update={"compile": "always"})
    chosen = run.settle(asked, ALONE, SLOW_BF16)
    assert chosen.compile == "always"
    save_config(chosen)
    assert run.settle(config, ALONE, SLOW_BF16).compile == "always"
    assert run.settle(tiny("vae", tmp_path / "vae2"), ALONE, SLOW_BF16).compile == "never"
    with pytest.raises(UsageError, match="compile=always is for the task text_to_video"):
        tiny("vae", tmp_path / "vae2", "compile=always")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("attention=auto", "sdpa for self-attention, sdpa for cross, sdpa for attention shared"),
        ("attention=plain", "plain for self-attention, plain for cross, plain for"),
    ],
)
def test_what_serves_attention_is_chosen_and_told_in_one_line(
    vae_run, tmp_path, caplog, change, told
):
    config = tiny("stdit", tmp_path / "run", f'task.vae_from="{vae_run}"', change)
    config = run.settle(config, ALONE, SLOW_BF16)
    task = run.build_task(config)
    try:
        with caplog.at_level("INFO", logger="opensora"):
            run.select_attention(config, task, ALONE, run.ALONE)
        assert [told in r.getMessage() for r in caplog.records] == [True]
        assert backends.preferred() == config.attention
    finally:
        backends.prefer("auto")


def test_attention_that_cannot_serve_is_refused(vae_run, tmp_path, monkeypatch):
    config = tiny("stdit", tmp_path / "run", f'task.vae_from="{vae_run}"', "attention=flash3")
    config = run.settle(config, ALONE, SLOW_BF16)
    with pytest.raises(UsageError, match="attention=flash3 cannot serve this run: it runs on cuda"):
        run.select_attention(config, run.build_task(config), ALONE, run.ALONE)
    selective = ("recompute.policy=selective", f'task.vae_from="{vae_run}"')
    config = run.settle(tiny("stdit", tmp_path / "run", *selective), ALONE, SLOW_BF16)
    task = run.build_task(config)
    run.select_attention(config, task, ALONE, run.ALONE)
    # A kernel that nobody has heard of is not one whose results are kept.
    unheard = dataclasses.replace(BACKENDS["sdpa"], attend=BACKENDS["plain"].attend)
    monkeypatch.setitem(BACKENDS, "sdpa", unheard)
    with pytest.raises(UsageError, match="attention=sdpa runs none that is known"):
        run.select_attention(config, task, ALONE, run.ALONE)


def test_the_vae_of_another_run_is_written_into_the_config(vae_run, tmp_path):
    config = tiny("stdit", tmp_path / "run", f'task.vae_from="{vae_run}"')
    settled = run.settle(config, ALONE, SLOW_BF16)
    assert settled.task.vae == tiny("vae", tmp_path).task.vae
    assert run.settle(settled, ALONE, SLOW_BF16) == settled
    assert load_vae(vae_run).config == settled.task.vae


def test_a_vae_that_is_not_the_one_of_vae_from_is_refused(vae_run, tmp_path):
    other = {"kind": "causal", "latent_channels": 16}
    config = TextToVideoConfig(vae=other, vae_from=vae_run)
    with pytest.raises(UsageError, match=r"leave task\.vae out"):
        resolve(config)
    with pytest.raises(UsageError, match=r"task\.vae_from is not set"):
        resolve(TextToVideoConfig())


def test_a_checkpoint_without_a_vae_is_refused(tmp_path):
    config = tiny("stdit", tmp_path / "run")
    root = config.output / "checkpoints"
    saving.save(root, Snapshot(1, to_json(config), {}), keep=1)
    with pytest.raises(CheckpointError, match="has no VAE: its task is 'text_to_video'"):
        load_vae(config.output)


def test_the_environment_is_written_down(tmp_path):
    config = tiny("vae", tmp_path)
    task = run.build_task(config)
    run._write_facts(config, ALONE, task, SLOW_BF16)
    facts = json.loads((config.output / "environment.json").read_text())
    assert facts["parameters"] == sum(p.numel() for p in task.parameters())
    assert {"torch", "python", "platform", "processor", "world_size", "threads"} <= facts.keys()
    assert json.loads((config.output / "config.json").read_text())["steps"] == config.steps


def test_the_room_that_two_checkpoints_need_is_foreseen(tmp_path, vae_run):
    config = tiny("vae", tmp_path / "run")
    task = run.build_task(config)
    trained = sum(p.numel() for p in task.parameters())
    assert run._bytes_to_save(task) == 2 * 16 * trained
