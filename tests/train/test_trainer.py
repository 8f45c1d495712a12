"""The loop: what it reports, when it measures, samples and saves, and what a full disk does."""

import time

import pytest
import torch
from train_support import (
    ALONE,
    MemorySource,
    losses,
    make_trainer,
    points,
    tensors,
    tiny,
    toy_trainer,
    train_records,
)

from opensora.engine import checkpoint, compiling, shards
from opensora.errors import DataError, StorageError
from opensora.train.batches import split
from opensora.train.tracking import read_records


def kept(run) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def test_a_toy_learns_its_line(tmp_path):
    run = tmp_path / "run"
    toy_trainer(run, "steps=60", "optim.lr=0.1", "log.every=20", "validation.every=0").run()
    assert [record["step"] for record in train_records(run)] == [20, 40, 60]
    assert losses(run)[-1] < 0.1 * losses(run)[0]
    assert kept(run) == ["step-000050", "step-000060"]


def test_a_record_says_how_far_how_fast_and_how_well(tmp_path):
    run = tmp_path / "run"
    trainer = toy_trainer(run, "steps=3", matmul_rate=1e9)
    trainer.run()
    records = train_records(run)
    assert [r["tokens_seen"] for r in records] == [6, 12, 18]
    assert [r["skipped"] for r in records] == [False] * 3
    assert [r["lr_factor"] for r in records] == pytest.approx([1.0, 0.75, 0.25])
    seconds = [r["train_seconds"] for r in records]
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    assert records[-1]["eta_seconds"] == 0
    for name in ("gradient_norm", "steps_per_second", "matmul_share", "peak_memory_bytes"):
        assert records[0][name] > 0
    # A linear layer of 3 inputs and 6 rows: forward, and the gradient of its weight.
    flops = records[0]["flops_per_second"] / records[0]["steps_per_second"]
    assert flops == pytest.approx(2 * 2 * 6 * 3)


@pytest.mark.filterwarnings("default")
def test_a_compiled_run_counts_its_flops_beforehand_and_learns_the_same(tmp_path):
    records = {}
    for choice in ("never", "always"):
        trainer = make_trainer(
            tiny("stdit", tmp_path / choice, f"compile={choice}", "steps=4", "log.every=1")
        )
        if choice == "always":
            compiling.apply(trainer.task.blocks, backend="eager")
        trainer.run()
        records[choice] = train_records(tmp_path / choice)
    for plain, compiled in zip(records["never"], records["always"], strict=True):
        flops = [r["flops_per_second"] / r["steps_per_second"] for r in (plain, compiled)]
        assert flops[1] == pytest.approx(flops[0], rel=0.01)
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-5)


def test_measurements_are_no_part_of_the_speed(tmp_path):
    run = tmp_path / "run"
    trainer = toy_trainer(run, "steps=2", "validation.every=1", validation_sizes=(2,))
    validate = trainer.validate
    trainer.validate = lambda: time.sleep(0.5) or validate()
    trainer.run()
    assert train_records(run)[1]["steps_per_second"] > 1 / 0.5
    assert train_records(run)[1]["train_seconds"] < 0.5


def test_replaced_samples_are_counted_over_the_run(tmp_path):
    run = tmp_path / "run"
    source = MemorySource(points, ALONE, batch_size=6)
    whole = source.collate

    def collate(rows, step):
        batch = whole(rows, step)
        object.__setattr__(batch, "replaced", step)
        return batch

    source.collate = collate
    trainer = toy_trainer(run, "steps=4", "log.every=3")
    trainer.source = source
    trainer.run()
    assert [r["replaced_samples"] for r in train_records(run)] == [0 + 1 + 2, 0 + 1 + 2 + 3]


def test_validation_is_of_the_averaged_weights_and_leaves_the_others(tmp_path):
    run = tmp_path / "run"
    trainer = toy_trainer(
        run, "steps=6", "validation.every=2", "optim.lr=0.1", validation_sizes=(3, 2)
    )
    trainer.run()
    records = [r for r in read_records(run / "metrics.jsonl") if r["kind"] == "validation"]
    assert [r["step"] for r in records] == [2, 4, 6]
    snapshot = checkpoint.load(checkpoint.find(run))
    batch = points([0, 1, 2, 3, 4])

    def error(weights):
        found = batch.inputs @ weights["layer.weight"][0] + weights["layer.bias"]
        return float((found - batch.inputs.sum(1)).square().mean())

    assert records[-1]["loss"] == pytest.approx(error(snapshot.ema), rel=1e-5)
    assert records[-1]["loss"] != pytest.approx(error(snapshot.weights), rel=1e-5)
    assert torch.equal(trainer.task.layer.weight, snapshot.weights["layer.weight"])


def test_without_averages_validation_is_of_the_weights(tmp_path):
    trainer = toy_trainer(tmp_path / "run", "steps=2", "ema=null", validation_sizes=(3,))
    trainer.run()
    assert trainer.validate()["loss"] == pytest.approx(
        float(trainer.task.validation(points([0, 1, 2]))["loss"][0]) / 3
    )
    assert checkpoint.load(checkpoint.find(tmp_path / "run")).ema == {}


def test_samples_are_drawn_when_they_are_due_and_at_the_end(tmp_path):
    """Also where there is no validation."""
    calls = []

    def sampler(task, step, output, shape, *, place):
        calls.append((step, task.training, output.name, shape["num_frames"]))

    config = tiny(
        "stdit", tmp_path / "run", "steps=5", "samples={every: 2, prompts: [a]}", "log.every=9"
    )
    make_trainer(config, sampler=sampler).run()
    assert calls == [(2, False, "run", 5), (4, False, "run", 5), (5, False, "run", 5)]


def test_without_validation_the_vae_is_measured_on_training_clips(tmp_path):
    for sizes in ((), (4,)):
        run = tmp_path / f"run{len(sizes)}"
        config = tiny("vae", run, "steps=1", "data.validation=null")
        make_trainer(config, validation_sizes=sizes).run()
    measured, other = (tensors(tmp_path / f"run{k}")["vae.latent_std"] for k in (0, 1))
    assert not torch.allclose(measured, torch.ones(4), rtol=0.05)
    # The same latents on other clips of the same kind.
    assert torch.allclose(measured, other, rtol=0.5)


def test_data_that_end_are_an_error(tmp_path):
    trainer = toy_trainer(tmp_path / "run", "steps=4")
    whole = trainer.source.train
    trainer.source.train = lambda first: iter([next(whole(first))])
    with pytest.raises(DataError, match="ended at step 1 of 4"):
        trainer.run()


class FullDisk:
    """Refuses checkpoints while it is `full`."""

    def __init__(self, monkeypatch):
        self.full, self.write, self.refused = False, shards.write, 0
        monkeypatch.setattr(shards, "write", self)

    def __call__(self, path, content):
        if not self.full:
            return self.write(path, content)
        self.refused += 1
        raise StorageError(f"{path} cannot be written")


def test_a_full_disk_does_not_end_a_run_that_has_a_checkpoint(tmp_path, monkeypatch, caplog):
    disk = FullDisk(monkeypatch)
    run = tmp_path / "run"
    trainer = toy_trainer(run, "steps=8", "checkpoint.every=2")

    def decided(accepted):
        disk.full = 2 <= trainer.progress.step < 6

    trainer.task.decided = decided
    trainer.run()
    assert disk.refused == 2
    assert caplog.text.count("Training goes on") == 2
    assert kept(run) == ["step-000002", "step-000008"]
    assert len(losses(run)) == 8


def test_checkpoints_in_the_background_are_those_of_the_foreground(tmp_path, caplog):
    caplog.set_level("INFO", "opensora")
    kept_tensors = {}
    for background in ("false", "true"):
        run = tmp_path / background
        trainer = toy_trainer(
            run, "steps=9", f"checkpoint={{every: 2, keep: 9, background: {background}}}"
        )
        trainer.run()
        kept_tensors[background] = {
            path.name: checkpoint.load(path) for path in checkpoint.committed(run / "checkpoints")
        }
    first, second = kept_tensors.values()
    assert list(first) == list(second) == [f"step-00000{n}" for n in (2, 4, 6, 8, 9)]
    for name, snapshot in first.items():
        other = second[name]
        for part in ("weights", "ema", "optimizer"):
            mine, theirs = getattr(snapshot, part), getattr(other, part)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[k], theirs[k]) for k in mine)
        assert other.progress["guard"] == snapshot.progress["guard"]
    assert caplog.text.count("training waited") == 10


def test_a_full_disk_in_the_background_is_told_and_survived(tmp_path, monkeypatch, caplog):
    disk = FullDisk(monkeypatch)
    trainer = toy_trainer(tmp_path / "run", "steps=9", "checkpoint={every: 2, background: true}")

    def decided(accepted):
        disk.full = 4 <= trainer.progress.step < 8

    trainer.task.decided = decided
    trainer.run()
    assert disk.refused >= 1
    assert "Training goes on" in caplog.text
    assert kept(tmp_path / "run")[-1] == "step-000009"


def test_a_full_disk_ends_a_run_without_any_checkpoint(tmp_path, monkeypatch):
    disk = FullDisk(monkeypatch)
    disk.full = True
    trainer = toy_trainer(tmp_path / "run", "steps=8", "checkpoint.every=2")
    with pytest.raises(StorageError) as error:
        trainer.run()
    assert (trainer.progress.step, error.value.exit_code) == (2, 74)


def test_the_last_checkpoint_has_to_stand(tmp_path, monkeypatch):
    disk = FullDisk(monkeypatch)
    run = tmp_path / "run"
    trainer = toy_trainer(run, "steps=3", "checkpoint.every=2")
    trainer.task.decided = lambda accepted: setattr(disk, "full", trainer.progress.step == 2)
    with pytest.raises(StorageError):
        trainer.run()
    assert kept(run) == ["step-000002"]
    disk.full = False
    again = toy_trainer(run, "steps=3", "checkpoint.every=2")
    again.state.resume()
    again.run()
    assert kept(run) == ["step-000002", "step-000003"]


def test_batches_are_split_in_order_into_pieces_no_larger_than_asked():
    batch = points([0, 1, 2, 3, 4])
    assert split(batch, None) == [batch]
    assert split(batch, 5) == [batch]
    assert [part.sample_ids.tolist() for part in split(batch, 2)] == [[0, 1], [2, 3], [4]]
