"""A run that stopped and went on is the run that never stopped, bit for bit."""

from pathlib import Path

import pytest
import torch
from train_support import (
    ALONE,
    MemorySource,
    clips,
    digests,
    latents,
    losses,
    make_trainer,
    tensors,
    tiny,
    toy_trainer,
    train_records,
)

from opensora.engine import checkpoint
from opensora.errors import CheckpointError, Preempted, UsageError
from opensora.train.signals import Requests
from opensora.train.tracking import read_records


class Crash(Exception):
    """Stands for a process that dies."""


class Interrupting(MemorySource):
    """Calls `act` when the batch of `step` is fetched."""

    def __init__(self, *args, step: int, act, **options):
        super().__init__(*args, **options)
        self.step, self.act = step, act

    def train(self, first_step):
        for number, batch in enumerate(super().train(first_step), first_step):
            if number == self.step:
                self.act()
            yield batch


def crash():
    raise Crash


def config_of(name: str, output: Path, *overrides: str):
    return tiny(
        name, output, "steps=8", "checkpoint.every=2", "validation.every=3", "guard.window=8",
        *overrides,
    )  # fmt: skip


def start(name: str, config, requests=None, source_class=MemorySource, **options):
    """A trainer as a new process would make it."""
    collate = clips if name == "vae" else latents
    source = source_class(collate, ALONE, batch_size=5, validation_sizes=(3, 2), **options)
    trainer = make_trainer(config, source=source, requests=requests)
    trainer.state.resume()
    return trainer, source


def whole_run(name: str, config):
    trainer, source = start(name, config)
    trainer.run()
    return trainer, source


def comparable(output: Path) -> list[dict]:
    """The metrics of a run, without its clocks."""
    clocks = ("time", "seconds", "per_second", "share", "peak_memory")
    records = read_records(output / "metrics.jsonl")
    return [{k: v for k, v in r.items() if not any(c in k for c in clocks)} for r in records]


@pytest.mark.parametrize("name", ["vae", "stdit", "mmdit"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_by_a_signal_and_resumed_is_uninterrupted(name, precision, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    change = f"precision={precision}"
    _, all_rows = whole_run(name, config_of(name, whole, change))

    requests = Requests()
    config = config_of(name, parts, change)
    trainer, source = start(
        name,
        config,
        requests,
        Interrupting,
        step=4,
        act=lambda: setattr(requests, "stops", 1),
    )
    with pytest.raises(Preempted, match="after step 5 of 8"):
        trainer.run()
    assert len(source.seen) == 5
    resumed, rest = start(name, config)
    assert resumed.progress.step == 5
    resumed.run()

    assert source.seen + rest.seen == all_rows.seen
    assert digests(parts) == digests(whole)
    assert comparable(parts) == comparable(whole)


def test_a_crash_repeats_the_steps_since_the_checkpoint_and_forgets_their_records(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole_run("stdit", config_of("stdit", whole))
    config = config_of("stdit", parts)
    trainer, _ = start("stdit", config, None, Interrupting, step=5, act=crash)
    with pytest.raises(Crash):
        trainer.run()
    with open(parts / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 6, "lo')  # torn by the crash
    assert [record["step"] for record in train_records(parts)] == [1, 2, 3, 4, 5]
    resumed, _ = start("stdit", config)
    assert resumed.progress.step == 4
    resumed.run()
    assert digests(parts) == digests(whole)
    assert comparable(parts) == comparable(whole)


def test_running_a_finished_run_again_does_nothing(tmp_path):
    config = config_of("stdit", tmp_path / "run")
    whole_run("stdit", config)
    before = digests(config.output), comparable(config.output)
    again, source = start("stdit", config)
    again.run()
    assert not source.seen
    assert (digests(config.output), comparable(config.output)) == before


def test_a_stop_at_the_last_step_leaves_the_last_measurements_to_the_next_attempt(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole_run("vae", config_of("vae", whole))
    requests = Requests()
    config = config_of("vae", parts)
    trainer, _ = start(
        "vae", config, requests, Interrupting, step=7, act=lambda: setattr(requests, "stops", 1)
    )
    with pytest.raises(Preempted, match="after step 8 of 8"):
        trainer.run()
    statistics = tensors(parts)["vae.latent_std"]
    resumed, source = start("vae", config)
    resumed.run()
    assert not source.seen
    assert not torch.equal(tensors(parts)["vae.latent_std"], statistics)
    assert digests(parts) == digests(whole)


def test_resuming_under_another_config_is_refused_by_key(tmp_path):
    config = config_of("stdit", tmp_path / "run")
    whole_run("stdit", config)
    for change, told in {
        "optim.lr=0.01": r"optim\.lr is 0\.01, was 0\.02",
        "steps=9": r"steps is 9, was 8.*resume_despite=\[steps\]",
        "ema.gamma=6.94": r"ema\.gamma is 6\.94",
        "ema=null": r"ema is None",
        "seed=1": r"seed is 1, was 0",
    }.items():
        with pytest.raises(UsageError, match=told):
            start("stdit", config_of("stdit", config.output, change))
    for change in ("log.every=3", "checkpoint.keep=5", "micro_batch=2", "threads=1"):
        start("stdit", config_of("stdit", config.output, change))


def test_micro_batches_belong_to_the_config_where_they_change_the_loss(tmp_path):
    config = config_of("vae", tmp_path / "run", "steps=1")
    whole_run("vae", config)
    with pytest.raises(UsageError, match="micro_batch is 2, was None"):
        start("vae", config_of("vae", config.output, "steps=1", "micro_batch=2"))


def test_accepted_changes_go_on_from_the_checkpoint(tmp_path):
    config = config_of("stdit", tmp_path / "run")
    whole_run("stdit", config)
    longer = config_of(
        "stdit", config.output, "steps=10", "optim.lr=0.01", "resume_despite=[steps]"
    )
    with pytest.raises(UsageError, match=r"optim\.lr"):
        start("stdit", longer)
    longer = config_of(
        "stdit", config.output, "steps=10", "optim.lr=0.01", "resume_despite=[steps, optim]"
    )
    trainer, source = start("stdit", longer)
    trainer.run()
    assert [step for step, _ in source.seen] == [8, 9]
    assert len(losses(config.output)) == 10
    other = config_of(
        "stdit", config.output, "optim={kind: adamw}", "resume_despite=[optim, steps]"
    )
    with pytest.raises(UsageError, match=r"optim\.kind is 'adamw', was 'muon'"):
        start("stdit", other)


def test_other_data_are_refused_unless_accepted(tmp_path):
    trainer = toy_trainer(tmp_path / "run", "steps=2")
    trainer.run()
    for accepted, outcome in (("[]", False), ("[data]", True)):
        again = toy_trainer(tmp_path / "run", "steps=2", f"resume_despite={accepted}")
        again.state._data = "other rows"
        if outcome:
            assert again.state.resume()
        else:
            with pytest.raises(
                UsageError, match=r"another content of data.*resume_despite=\[data\]"
            ):
                again.state.resume()


def test_a_flipped_byte_is_told_with_its_tensor_and_what_comes_before(tmp_path):
    config = config_of("stdit", tmp_path / "run")
    whole_run("stdit", config)
    newest, before = tmp_path / "run/checkpoints/step-000008", "step-000006"
    path = newest / "ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=rf"damaged tensors: 'text\.\S+'.*go on from {before}"
    ):
        start("stdit", config)
    path.write_bytes(content[:-5])  # no longer complete, and still not passed over
    with pytest.raises(CheckpointError, match=rf"ema\.safetensors.*go on from {before}"):
        start("stdit", config)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(checkpoint.find(tmp_path / "run"))
