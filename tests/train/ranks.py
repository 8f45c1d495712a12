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

from train_support import (
    MemorySource,
    clips,
    digests,
    fresh_task,
    latents,
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

STEPS = "steps=5"


def training(output: Path, place: Runtime, name: str, *overrides: str, batch_size: int = 5) -> Any:
    """A tiny run on a batch that two ranks cannot share evenly."""
    config = tiny(name, output, STEPS, "checkpoint.every=0", *overrides)
    collate = clips if name == "vae" else latents
    source = MemorySource(collate, place, batch_size=batch_size, validation_sizes=(3, 2, 2))
    trainer = make_trainer(config, place, source=source)
    trainer.state.resume()
    trainer.run()
    steps = [step for step, _ in source.seen]
    ascending = 1 + max((k for k in range(1, len(steps)) if steps[k] > steps[k - 1]), default=0)
    return source.seen[:ascending]  # what stood in for a validation batch comes after


def autoencoder(output: Path, place: Runtime) -> Any:
    return training(output, place, "vae")


def text_to_video(output: Path, place: Runtime) -> Any:
    return training(output, place, "stdit")


def micro_batches(output: Path, place: Runtime) -> Any:
    """Ranks with 3 and 4 samples make 2 and 2 pieces, with 2 and 3 samples 1 and 2 pieces."""
    return training(output, place, "stdit", "micro_batch=2")


def adamw(output: Path, place: Runtime) -> Any:
    return training(output, place, "stdit", "optim={kind: adamw, lr: 0.002}")


def on_other_ranks(output: Path, place: Runtime) -> Any:
    """Goes on from the run that `test_ranks.py` began on one rank."""
    return training(output, place, "stdit", "steps=8", "resume_despite=[steps]")


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


def ulysses(output: Path, place: Runtime) -> Any:
    """Every clip is shared by two ranks, who trade frames for places."""
    return training(output, place, "stdit", f"parallel.ulysses={min(2, place.world_size)}")


def ring(output: Path, place: Runtime) -> Any:
    """The same, where all frames and places are one window and keys travel."""
    degree = f"parallel.ring={min(2, place.world_size)}"
    return training(output, place, "stdit", degree, "task.model.window=[8, 8]")


def both(output: Path, place: Runtime) -> Any:
    """Four ranks share each clip of two frames, so two of them have none."""
    degrees = ["parallel.ulysses=2", "parallel.ring=2"] if place.world_size == 4 else []
    return training(output, place, "stdit", *degrees, "task.model.window=[8, 8]")


def short_clips(output: Path, place: Runtime) -> Any:
    """Ranks could share clips, but these are short enough for one."""
    degree = f"parallel.ulysses={place.world_size}"
    return training(output, place, "stdit", degree, "parallel.max_tokens=8")


def shards_of_data(output: Path, place: Runtime) -> Any:
    """On four ranks, two pairs; clips of 8 tokens are above what one rank takes."""
    degree = f"parallel.ulysses={min(2, place.world_size)}"
    return training(output, place, "stdit", degree, "parallel.max_tokens=4", "micro_batch=2")


def fsdp(output: Path, place: Runtime) -> Any:
    """Sharded parameters; on four ranks in two copies. Alone there is nothing to shard."""
    changes = ["engine.kind=fsdp"] if place.world_size > 1 else []
    if place.world_size == 4:
        changes.append("parallel.dp_replicate=2")
    return training(output, place, "stdit", *changes)


def fsdp_pieces(output: Path, place: Runtime) -> Any:
    """The same in uneven micro-batches, with AdamW and parameters kept after the forward pass."""
    changes = ["engine={kind: fsdp, reshard_after_forward: false}"] * (place.world_size > 1)
    return training(
        output, place, "stdit", *changes, "micro_batch=2", "optim={kind: adamw, lr: 0.002}"
    )


def fsdp_shared(output: Path, place: Runtime) -> Any:
    """Sharded parameters and shared clips: on two ranks one pair, on four two."""
    changes = ["engine.kind=fsdp", "parallel.ulysses=2"] * (place.world_size > 1)
    return training(output, place, "stdit", *changes)


def tiles(output: Path, place: Runtime) -> Any:
    """Copies of the model, whose blocks run in tiles, in uneven micro-batches."""
    saving = "recompute={policy: block, tiles: 2}"
    return training(output, place, "stdit", saving, "micro_batch=2")


def fsdp_tiles(output: Path, place: Runtime) -> Any:
    """Sharded parameters and shared clips, in tiles; pairs are computed again, exchanges too."""
    changes = ["engine.kind=fsdp", "parallel.ulysses=2"] * (place.world_size > 1)
    saving = "recompute={policy: pair, tiles: 2, offload: true}"
    return training(output, place, "stdit", *changes, saving)


def fsdp_offload(output: Path, place: Runtime) -> Any:
    """Sharded optimizer state on the host."""
    changes = ["engine.kind=fsdp"] * (place.world_size > 1)
    return training(
        output, place, "stdit", *changes, "optim={kind: adamw, lr: 0.002, offload: true}"
    )


def fsdp_bf16_state(output: Path, place: Runtime) -> Any:
    """Sharded optimizer state in bfloat16, uninterrupted and taken up again after step 3."""
    changes = ["engine.kind=fsdp"] * (place.world_size > 1)
    changes.append("optim={kind: adamw, lr: 0.002, state_dtype: bf16, schedule: {decay: constant}}")
    training(output, place, "stdit", *changes)
    parts = output.with_name(f"{output.name}-parts")
    training(parts, place, "stdit", *changes, "steps=3")
    training(parts, place, "stdit", *changes, "resume_despite=[steps]")
    return digests(parts) == digests(output)


def fsdp_goes_on(output: Path, place: Runtime) -> Any:
    """Goes on, sharded, from the run that `test_ranks.py` began on one rank. Checkpoints are
    written while it trains."""
    changes = ["steps=8", "engine.kind=fsdp", "parallel.ulysses=2"]
    saving = ["checkpoint={every: 1, background: true}"]
    return training(output, place, "stdit", "resume_despite=[steps]", *changes, *saving)


def fsdp_goes_on_in_copies(output: Path, place: Runtime) -> Any:
    """Goes on from there on four ranks: first HSDP, then whole weights and clips shared by all."""
    despite = "resume_despite=[steps]"
    copies = ["engine.kind=fsdp", "parallel.ulysses=2", "parallel.dp_replicate=2"]
    first = training(output, place, "stdit", despite, "steps=10", *copies)
    return first + training(output, place, "stdit", despite, "steps=12", "parallel.ulysses=4")


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


def mmdit(output: Path, place: Runtime) -> Any:
    """Ranks share clips whose every token sees every other and the text; three heads."""
    heads = ["task.model.num_heads=3", "task.model.width=24"]
    degree = f"parallel.ulysses={min(2, place.world_size)}"
    return training(output, place, "mmdit", *heads, degree)


def mmdit_ring(output: Path, place: Runtime) -> Any:
    """The same with keys that travel, and parameters that are sharded."""
    changes = ["engine.kind=fsdp", "parallel.ring=2"] * (place.world_size > 1)
    return training(output, place, "mmdit", *changes)


def layers(output: Path, place: Runtime) -> Any:
    """Two ranks share every layer; four are two such pairs on different clips."""
    degree = f"parallel.tp={min(2, place.world_size)}"
    return training(output, place, "mmdit", degree, "micro_batch=2")


def layers_adamw(output: Path, place: Runtime) -> Any:
    """The same with AdamW and gradients that are clipped."""
    degree = f"parallel.tp={min(2, place.world_size)}"
    optimizer = "optim={kind: adamw, lr: 0.002, weight_decay: 0.1}"
    return training(output, place, "mmdit", optimizer, "max_grad_norm=0.05", degree)


def layers_sharded(output: Path, place: Runtime) -> Any:
    """Four ranks: what a rank of each pair has of a layer is sharded over both pairs."""
    changes = ["parallel.tp=2", "engine.kind=fsdp"] * (place.world_size > 1)
    return training(output, place, "mmdit", *changes)


def layers_and_clips(output: Path, place: Runtime) -> Any:
    """Four ranks: pairs share layers, and both pairs share every clip."""
    changes = ["parallel.tp=2", "parallel.ulysses=2"] * (place.world_size > 1)
    return training(output, place, "mmdit", *changes)


def layers_go_on(output: Path, place: Runtime) -> Any:
    """Shared layers go on from the run that `test_ranks.py` began on one rank."""
    changes = ["steps=8", "resume_despite=[steps]", "parallel.tp=2"]
    changes += ["engine.kind=fsdp"] * (place.world_size == 4)
    return training(output, place, "mmdit", *changes)


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
