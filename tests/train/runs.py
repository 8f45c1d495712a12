"""Runs that one rank and several ranks make alike; `test_ranks.py` compares what is left of them.

A scenario writes a run to its folder and returns what its rank saw, as JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train_support import MemorySource, clips, digests, latents, make_trainer, tiny

from opensora.runtime import Runtime

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
