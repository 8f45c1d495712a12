"""Checkpoints: what goes in comes out, damage is named, and the newest is never guessed."""

import json
from pathlib import Path

import pytest
import torch

from opensora import store
from opensora.arena.scenes import SceneConfig
from opensora.engine import checkpoint, saving, shards
from opensora.engine.checkpoint import Snapshot
from opensora.errors import CheckpointError, StorageError


def snapshot(step: int, **changes) -> Snapshot:
    shared = torch.arange(6.0)
    tensors = {
        "a.weight": torch.arange(6.0).view(2, 3).t(),
        "a.half": torch.ones(3, dtype=torch.bfloat16),
        "b.first": shared,
        "b.same": shared,
        "b.empty": torch.empty(0, 4),
        "b.scalar": torch.tensor(float("nan")),
        "b.steps": torch.tensor(step),
    }
    content = {
        "config": '{"task": {"kind": "toy"}}',
        "weights": tensors,
        "ema": {"a.weight": torch.ones(3, 2)},
        "optimizer": {"a.weight/step": torch.tensor(1.0)},
        "progress": {"note": "naïve ☃", "recent": [0.1, 1e-300]},
    }
    return Snapshot(step=step, **{**content, **changes})


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_snapshot_survives_the_disk(tmp_path):
    whole = snapshot(3)
    path = saving.save(tmp_path, whole, keep=2)
    assert path == tmp_path / "step-000003"
    again = checkpoint.load(path)
    for part in ("weights", "ema", "optimizer", "frozen"):
        mine, theirs = getattr(whole, part), getattr(again, part)
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            torch.testing.assert_close(theirs[name], value, rtol=0, atol=0, equal_nan=True)
    assert (again.step, again.config, again.progress) == (3, whole.config, whole.progress)


def test_parts_are_read_alone(tmp_path):
    path = saving.save(tmp_path, snapshot(1), keep=1)
    flip(path / "optimizer.safetensors", -1)
    assert checkpoint.load(path, parts=("weights", "ema")).optimizer == {}
    with pytest.raises(CheckpointError, match=r"a\.weight/step"):
        checkpoint.load(path)


@pytest.mark.parametrize("part", ["weights.safetensors", "config.json", "progress.json"])
def test_every_flipped_byte_is_found(part, tmp_path):
    path = saving.save(tmp_path, snapshot(1), keep=1)
    whole = (path / part).read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 40)):
        flip(path / part, position)
        with pytest.raises(CheckpointError, match=part):
            checkpoint.load(path)
        (path / part).write_bytes(whole)
    checkpoint.load(path)


def test_damage_names_the_tensor(tmp_path):
    path = saving.save(tmp_path, snapshot(1), keep=1)
    file = path / "weights.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little")
    offsets = json.loads(file.read_bytes()[8 : 8 + header])
    for name in ("a.half", "b.same", "b.steps"):
        flip(file, 8 + header + offsets[name]["data_offsets"][0])
        with pytest.raises(CheckpointError, match=f"damaged tensors: '{name}'"):
            checkpoint.load(path)
        flip(file, 8 + header + offsets[name]["data_offsets"][0])


def test_a_missing_file_is_damage(tmp_path):
    path = saving.save(tmp_path, snapshot(1), keep=1)
    (path / "ema.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"ema\.safetensors"):
        checkpoint.load(path)


def test_the_newest_are_kept_and_the_pointer_follows(tmp_path):
    for step in (5, 10, 15, 20):
        saving.save(tmp_path, snapshot(step), keep=2)
    assert [p.name for p in checkpoint.committed(tmp_path)] == ["step-000015", "step-000020"]
    assert (tmp_path / "latest").read_text().strip() == "step-000020"
    newest = checkpoint.open_newest(tmp_path)
    assert (newest.path.name, newest.step) == ("step-000020", 20)


def test_steps_beyond_a_million_are_still_in_order(tmp_path):
    for step in (999_999, 1_000_000):
        saving.save(tmp_path, snapshot(step), keep=3)
    assert [p.name for p in checkpoint.committed(tmp_path)] == ["step-999999", "step-1000000"]


def test_a_step_that_is_saved_again_replaces_the_first(tmp_path):
    saving.save(tmp_path, snapshot(5), keep=2)
    saving.save(tmp_path, snapshot(5, config="{}"), keep=2)
    assert checkpoint.load(tmp_path / "step-000005").config == "{}"


def test_what_a_dead_writer_left_is_no_checkpoint(tmp_path):
    saving.save(tmp_path, snapshot(5), keep=2)
    torn = tmp_path / ".step-000010.0123abcd.tmp"
    torn.mkdir()
    (torn / "weights.safetensors").write_bytes(b"half")
    (tmp_path / "step-000020").mkdir()  # no manifest: nothing was committed
    assert checkpoint.open_newest(tmp_path).path.name == "step-000005"
    assert not torn.exists()
    assert checkpoint.open_newest(tmp_path / "elsewhere") is None


def test_a_damaged_newest_is_told_not_passed_over(tmp_path):
    for step in (5, 10):
        saving.save(tmp_path / "checkpoints", snapshot(step), keep=2)
    file = tmp_path / "checkpoints/step-000010/ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"Remove \S+step-000010 to go on from step-000005"):
        checkpoint.open_newest(tmp_path / "checkpoints")
    assert checkpoint.find(tmp_path).name == "step-000010"
    checkpoint.store.remove(tmp_path / "checkpoints/step-000010")
    assert checkpoint.open_newest(tmp_path / "checkpoints").path.name == "step-000005"


def test_the_only_checkpoint_damaged_means_a_new_start(tmp_path):
    saving.save(tmp_path, snapshot(5), keep=2)
    (tmp_path / "step-000005/manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="to start again"):
        checkpoint.open_newest(tmp_path)


def test_a_path_may_name_the_run_its_checkpoints_one_of_them_or_the_pointer(tmp_path):
    path = saving.save(tmp_path / "run/checkpoints", snapshot(7), keep=2)
    for given in ("run", "run/checkpoints", "run/checkpoints/latest", path):
        assert checkpoint.find(tmp_path / given) == path
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.find(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        checkpoint.find(tmp_path / "empty")


def test_another_kind_of_folder_is_refused(tmp_path):
    with store.write(tmp_path / "other", kind="latents", meta={}) as folder:
        (folder / "file").write_text("content")
    with pytest.raises(CheckpointError, match="'latents' where 'checkpoint' is needed"):
        checkpoint.load(checkpoint.find(tmp_path / "other"))


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    saving.save(tmp_path, snapshot(5), keep=1)

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"the first bytes")
        raise shards.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(StorageError, match="No space left on device"):
        saving.save(tmp_path, snapshot(10), keep=1)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["step-000005"]
    assert checkpoint.open_newest(tmp_path).step == 5


def test_averages_stand_in_for_the_weights_they_are_of(tmp_path):
    path = saving.save(tmp_path, snapshot(1), keep=1)
    found = checkpoint.load(path)
    averaged = checkpoint.inference_weights(found)
    assert torch.equal(averaged["a.weight"], torch.ones(3, 2))
    assert torch.equal(averaged["b.first"], found.weights["b.first"])
    raw = checkpoint.inference_weights(found, averaged=False)
    assert torch.equal(raw["a.weight"], found.weights["a.weight"])
    below = checkpoint.prefixed(averaged, "a")
    assert below.keys() == {"weight", "half"}


def test_the_identity_of_weights_depends_on_every_part_of_them():
    base = {"a": torch.arange(4.0), "b": torch.zeros(2, dtype=torch.bfloat16)}
    others = [
        {**base, "a": torch.arange(4.0).view(2, 2)},
        {**base, "a": torch.arange(4.0).nextafter(torch.tensor(9.0))},
        {"c": base["a"], "b": base["b"]},
        {**base, "b": torch.zeros(2, dtype=torch.float16)},
        {"a": base["a"]},
    ]
    digests = {checkpoint.identity(tensors) for tensors in (base, *others)}
    assert len(digests) == 6
    assert checkpoint.identity(dict(reversed(base.items()))) == checkpoint.identity(base)


def test_a_config_of_another_version_is_a_checkpoint_error(tmp_path):
    assert checkpoint.part_of_config(SceneConfig, {"frames": 9}, tmp_path).frames == 9
    with pytest.raises(CheckpointError, match=r"config\.json.*unknown key 'framse'.*'frames'"):
        checkpoint.part_of_config(SceneConfig, {"framse": 9}, tmp_path)
