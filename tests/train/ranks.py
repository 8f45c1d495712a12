"""What `test_ranks.py` runs on one rank in its own process and on two ranks in two: `ranks.py OUT`.

Every scenario writes a run to OUT/<name> and returns what its rank saw, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).parent))

from runs import (
    STEPS,
    adamw,
    autoencoder,
    both,
    fsdp,
    fsdp_bf16_state,
    fsdp_goes_on,
    fsdp_goes_on_in_copies,
    fsdp_offload,
    fsdp_pieces,
    fsdp_shared,
    fsdp_tiles,
    layers,
    layers_adamw,
    layers_and_clips,
    layers_go_on,
    layers_sharded,
    micro_batches,
    mmdit,
    mmdit_ring,
    on_other_ranks,
    ring,
    shards_of_data,
    short_clips,
    text_to_video,
    tiles,
    training,
    ulysses,
)
from train_support import (
    fresh_task,
    make_trainer,
    points,
    tiny,
    toy_trainer,
)

from opensora import disk, runtime
from opensora.data import sources
from opensora.dist import sharded
from opensora.engine import shards
from opensora.engine.checkpoint import Opened, Snapshot
from opensora.engine.saving import Saving
from opensora.errors import OpensoraError, StorageError
from opensora.runtime import Runtime
from opensora.train.config import TrainConfig
from opensora.train.run import Share, needs_of
from opensora.train.signals import listening
from opensora.train.tasks import Task


def not_a_number(output: Path, place: Runtime) -> Any:
    """The loss of row 9 is not a number at step 1; only one rank has that row."""
    poison = lambda step, row: float("nan") if (step, row) == (1, 9) else 1.0  # noqa: E731
    trainer = toy_trainer(output, "steps=3", place=place, poison=poison)
    layer = trainer.task.layer
    weights = []
    trainer.task.decided = lambda accepted: weights.append((accepted, layer.weight.tolist()))
    trainer.run()
    return {"weights": weights, "seen": trainer.source.seen}


def gives_up(output: Path, place: Runtime) -> Any:
    poison = lambda step, row: float("inf") if step >= 2 else 1.0  # noqa: E731
    trainer = toy_trainer(output, "steps=9", "guard.patience=3", place=place, poison=poison)
    return outcome(trainer.run)


def signals(output: Path, place: Runtime) -> Any:
    """The last rank is asked to save in step 1 and to stop in step 3."""

    def collate(rows: list[int], step: int | None) -> Any:
        if place.rank == place.world_size - 1 and step in (1, 3):
            os.kill(os.getpid(), signal.SIGUSR1 if step == 1 else signal.SIGTERM)
        return points(rows)

    with listening() as requests:
        trainer = toy_trainer(output, "steps=9", "checkpoint.every=0", place=place)
        trainer.source.collate = collate
        trainer.requests = requests
        found = outcome(trainer.run)
    kept = sorted(path.name for path in (output / "checkpoints").glob("step-*"))
    return {**found, "step": trainer.progress.step, "kept": kept}


def full_disk(output: Path, place: Runtime) -> Any:
    """The disk of rank 0 refuses every checkpoint."""

    def refuse(*args: Any, **options: Any) -> None:
        raise StorageError("the disk is full")

    trainer = toy_trainer(output, "steps=4", "checkpoint.every=2", place=place)
    whole, shards.write = shards.write, refuse
    try:
        return {**outcome(trainer.run), "step": trainer.progress.step}
    finally:
        shards.write = whole


def outcome(action: Any) -> dict[str, Any]:
    """How an action ends: the class, exit code and message of its error."""
    try:
        action()
    except OpensoraError as error:
        code = error.exit_code
        return {"error": type(error).__name__, "code": code, "message": str(error)}
    return {"error": None}


def full_disk_of_the_last(output: Path, place: Runtime) -> Any:
    """The disk of the last rank refuses its shards, in the background."""
    whole = shards.write

    def refuse(*args: Any, **options: Any) -> None:
        raise StorageError("the disk is full")

    if place.rank == place.world_size - 1:
        shards.write = refuse
    changes = ["engine.kind=fsdp", "checkpoint={every: 2, background: true}"]
    try:
        return outcome(lambda: training(output, place, "stdit", *changes))
    finally:
        shards.write = whole


def placements(output: Path, place: Runtime) -> Any:
    """Tensors in every placement are saved and read back in every other one."""
    lines = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    layouts = {
        "whole": None,
        "rows": (lines, [Shard(0)]),
        "columns": (lines, [Shard(1)]),
        "copied": (square, [Replicate(), Shard(0)]),
        "both": (square, [Shard(1), Shard(0)]),
        "twice": (square, [Shard(0), Shard(0)]),
        "pair": (square["b"], [Shard(0)]),
    }
    whole = {"odd": torch.arange(35.0).view(5, 7), "thin": torch.arange(3.0).view(1, 3).bfloat16()}
    differing = []
    for name, layout in layouts.items():
        tensors = {k: _as(v, layout) for k, v in whole.items()} | {"step": torch.tensor(3)}
        for background in (False, True):
            root = output / f"{name}-{background}"
            found = Snapshot(1, "{}", tensors, ema=dict(tensors))
            Saving(root, found, keep=1, place=place, background=background).finish()
        opened = Opened(root / "step-000001", place)
        for other, wanted in layouts.items():
            read = opened.read("weights", {k: _as(v, wanted) for k, v in whole.items()}.get)
            same = [torch.equal(sharded.whole(read[k]), v) for k, v in whole.items()]
            placed = [isinstance(read[k], DTensor) == (wanted is not None) for k in whole]
            if not all(same + placed):
                differing.append(f"{name} as {other}")
    return differing


def _as(value: torch.Tensor, layout: Any) -> torch.Tensor:
    return value if layout is None else distribute_tensor(value, *layout, src_data_rank=None)


class Planned:
    """Synthetic data of many shapes through the real plan, as a source that `make_trainer` takes.

    Attributes:
        seen: (step, sample ids) of every training batch that was handed out.
    """

    has_validation = False
    identity = "planned"

    def __init__(self, config: TrainConfig, task: Task):
        self.config, self.task, self.share = config, task, Share()
        self.seen: list[tuple[int, list[int]]] = []

    def train(self, first_step: int) -> Iterator[Any]:
        needs = needs_of(self.config, self.task, self.share)
        opened = sources.open_source(self.config.data, needs, seed=0)
        for step, batch in enumerate(opened.train(first_step), first_step):
            ids = [i for piece in batch.pieces for i in piece.sample_ids.tolist()]
            self.seen.append((step, ids))
            yield batch


def mixing(output: Path, place: Runtime, *overrides: str) -> Any:
    """Steps of clips with 4, 8 and 32 tokens, dealt by cost."""
    shapes = "{32px: {1: [1, 6], 5: [1, 5]}, 64px: {5: [1, 4]}}"
    data = "data={kind: synthetic, mix: clips, num_samples: 40, "
    data += f'buckets: {{resolutions: {shapes}, aspect_ratios: ["1:1"]}}}}'
    vae = f"task.vae={tiny('vae', output).task.vae.model_dump_json()}"
    config = tiny("stdit", output, STEPS, "checkpoint.every=0", data, vae, *overrides)
    task = fresh_task(config)
    source = Planned(config, task)
    trainer = make_trainer(config, place, task=task, source=source)  # type: ignore[arg-type]
    trainer.run()
    return source.seen[:5]


def mixed(output: Path, place: Runtime) -> Any:
    return mixing(output, place)


def mixed_shared(output: Path, place: Runtime) -> Any:
    """The longest clips are shared by two ranks, the others by none."""
    return mixing(output, place, f"parallel.ulysses={place.world_size}", "parallel.max_tokens=16")


def mixed_sharded(output: Path, place: Runtime) -> Any:
    """The longest clips are shared by all; parameters too, so all call the model equally often."""
    engine = ["engine.kind=fsdp"] * (place.world_size > 1)
    degree = f"parallel.ulysses={place.world_size}"
    return mixing(output, place, degree, "parallel.max_tokens=8", "micro_batch=1", *engine)


MIXED = (mixed, mixed_shared, mixed_sharded)


SCENARIOS = (
    autoencoder,
    text_to_video,
    micro_batches,
    adamw,
    on_other_ranks,
    not_a_number,
    gives_up,
    signals,
    full_disk,
    ulysses,
    ring,
    short_clips,
    fsdp,
    fsdp_pieces,
    fsdp_shared,
    tiles,
    fsdp_tiles,
    fsdp_offload,
    fsdp_bf16_state,
    fsdp_goes_on,
    full_disk_of_the_last,
    *MIXED,
    mmdit,
    mmdit_ring,
    layers,
    layers_adamw,
    layers_go_on,
)
ON_FOUR = (
    ulysses,
    ring,
    both,
    short_clips,
    shards_of_data,
    fsdp,
    fsdp_shared,
    fsdp_goes_on_in_copies,
    placements,
    *MIXED,
    layers,
    layers_sharded,
    layers_and_clips,
    layers_go_on,
)


def main(output: Path) -> None:
    place = runtime.start("cpu", timeout_seconds=120)
    wanted = sys.argv[2:]
    for scenario in ON_FOUR if place.world_size == 4 else SCENARIOS:
        if wanted and scenario.__name__ not in wanted:
            continue
        found = scenario(output / scenario.__name__, place)
        disk.replace_file(
            output / f"{scenario.__name__}-{place.rank}.json", json.dumps(found).encode()
        )
    place.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
