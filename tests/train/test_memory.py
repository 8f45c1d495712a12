"""When memory runs out, one report says what was asked for and what to change."""

import pytest
import torch
from train_support import ALONE, tiny, toy_trainer

from opensora.errors import OutOfMemory
from opensora.memory import is_out_of_memory
from opensora.runtime import Runtime
from opensora.train.memory import fixes


def cpu_error() -> Exception:
    """What torch raises where the CPU's allocator refuses, as it does 2 ** 62 bytes anywhere."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.float32)
    return caught.value


@pytest.mark.parametrize("kind", ["cpu", "cuda", "python"])
def test_an_allocator_that_refuses_becomes_a_report(kind, tmp_path):
    errors = {
        "cpu": cpu_error(),
        "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"),
        "python": MemoryError(),
    }

    def refuse(step: int, row: int) -> float:
        if step == 2:
            raise errors[kind]
        return 1.0

    trainer = toy_trainer(tmp_path / "run", "steps=4", poison=refuse)
    with pytest.raises(OutOfMemory) as caught:
        trainer.run()
    told = str(caught.value)
    assert caught.value.exit_code == 71
    rows = ", ".join(map(str, trainer.source.seen[2][1]))
    assert (
        f"out of memory in step 3 on rank 0: a batch of 6 x 1x8x8 (tensor 6x3, samples {rows})"
        in told
    )
    assert told.count("; or ") == 2
    assert "peak" in told
    assert "\n" not in told


def test_other_errors_are_left_alone(tmp_path):
    def fail(step: int, row: int) -> float:
        raise RuntimeError("shapes do not match")

    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        toy_trainer(tmp_path / "run", "steps=4", poison=fail).run()


FOUR = Runtime(0, 4, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "batch_size", "place", "expected"),
    [
        ([], 8, ALONE, ["micro_batch=4", "recompute.policy=selective", "precision=bf16"]),
        (["micro_batch=2"], 8, ALONE, ["micro_batch=1", "recompute.policy=selective"]),
        ([], 1, FOUR, ["recompute.policy=selective", "engine.kind=fsdp", "parallel.ulysses=2"]),
        (
            ["recompute.policy=pair", "engine.kind=fsdp", "parallel.ulysses=4"],
            1,
            FOUR,
            ["recompute.tiles=2", "precision=bf16", "fewer frames"],
        ),
    ],
)
def test_what_is_not_in_use_yet_is_proposed(changes, batch_size, place, expected, tmp_path):
    config = tiny("stdit", tmp_path, *changes)
    found = fixes(config, batch_size, place)
    assert len(found) == 3
    for start, text in zip(expected, found, strict=False):
        assert text.startswith(start)
    for text in found:  # what has a key is a change that the config takes
        if "=" in text and "data.buckets" not in text:
            tiny("stdit", tmp_path, *changes, text.split()[0])


def test_an_autoencoder_is_not_told_to_do_what_changes_its_result(tmp_path):
    found = fixes(tiny("vae", tmp_path), 8, FOUR)
    assert len(found) == 3
    assert not any(text.startswith(("micro_batch", "recompute", "parallel")) for text in found)
