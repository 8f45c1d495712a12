"""A training config refuses what cannot be carried out, before anything is built."""

import json

import pytest
from train_support import tiny

from opensora.errors import UsageError
from opensora.train.config import FREE_TO_CHANGE, TrainConfig


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("vae", "data={kind: latents, cache: x, buckets: {resolutions: {32px: {5: [1.0, 2]}}}}",
         "autoencoder trains on clips"),
        ("vae", "samples={every: 5, prompts: [a dog]}", "autoencoder draws no videos"),
        ("stdit", "samples.every=5", "no samples.prompts"),
        ("vae", "task.loss={l1: 0, l2: 0}", "give one a weight"),
        ("stdit", "task.model.num_heads=5", "num_heads"),
        ("vae", "steps=0", "greater than or equal to 1"),
        ("vae", "attention=sdpa", "no attention"),
        ("stdit", "attention=flash5", "attention"),
        ("stdit", "attention=flex", "attention"),
        ("stdit", "attention=plain recompute.policy=selective", "policy=block or"),
        ("vae", "guard.windw=9", r"'guard\.windw'\. Did you mean 'window'"),
        ("vae", "optim.kind=muno", "'muon'"),
    ],
)  # fmt: skip
def test_impossible_configs_are_refused_with_the_mend(name, change, told, tmp_path):
    with pytest.raises(UsageError, match=told):
        tiny(name, tmp_path, *(change.split() if change.startswith("attention") else [change]))


def test_a_config_goes_through_json(tmp_path):
    config = tiny("stdit", tmp_path, "resume_despite=[steps]")
    assert TrainConfig.model_validate(json.loads(config.json_text())) == config


def test_the_free_keys_exist(tmp_path):
    trees = [json.loads(tiny(name, tmp_path).json_text()) for name in ("vae", "stdit")]
    for key in FREE_TO_CHANGE:
        *parents, last = key.split(".")
        found = False
        for tree in trees:
            for parent in parents:
                tree = tree.get(parent, {})
            found |= last in tree
        assert found, key


def test_the_same_config_may_resume_and_free_keys_may_differ(tmp_path):
    saved = tiny("stdit", tmp_path).json_text()
    tiny("stdit", tmp_path).check_resumable(saved, "here")
    moved = tiny(
        "stdit", tmp_path / "moved", "data.cache=elsewhere", "task.vae_from=other",
        "data.num_workers=2", "micro_batch=1", "checkpoint.every=7", "device=auto",
        "attention=plain",
    )  # fmt: skip
    moved.check_resumable(saved, "here")


def test_a_part_is_accepted_with_all_its_keys_but_never_another_kind(tmp_path):
    saved = tiny("stdit", tmp_path).json_text()
    changes = ("optim.lr=0.5", "optim.adamw.lr=0.5", "optim.schedule.warmup_steps=0")
    with pytest.raises(UsageError, match=r"optim\.adamw\.lr is 0\.5, was 0\.002; optim\.lr"):
        tiny("stdit", tmp_path, *changes).check_resumable(saved, "here")
    accepted = tiny("stdit", tmp_path, *changes, "resume_despite=[optim]")
    accepted.check_resumable(saved, "here")
    assert accepted.accepts_change_of("optim.lr")
    assert not accepted.accepts_change_of("optimism")
    other = tiny("stdit", tmp_path, "optim.kind=adamw", "resume_despite=[optim]")
    with pytest.raises(UsageError, match=r"optim\.kind"):
        other.check_resumable(saved, "here")


def test_micro_batches_move_the_loss_of_the_autoencoder_only(tmp_path):
    for name, free in (("stdit", True), ("vae", False)):
        saved = tiny(name, tmp_path).json_text()
        changed = tiny(name, tmp_path, "micro_batch=2")
        if free:
            changed.check_resumable(saved, "here")
        else:
            with pytest.raises(UsageError, match="micro_batch"):
                changed.check_resumable(saved, "here")
