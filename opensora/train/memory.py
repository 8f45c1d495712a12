"""When memory runs out: which batch it was, how much was taken, and what to change.

The change is chosen by what the config does not use yet, in the order of what it costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch

from opensora.engine.fsdp import FsdpConfig
from opensora.errors import OutOfMemory
from opensora.memory import host_memory, is_out_of_memory
from opensora.runtime import Runtime
from opensora.train.batches import pieces, tensor_shape
from opensora.train.config import TrainConfig
from opensora.train.tasks import Task
from opensora.train.tracking import peak_memory_bytes

NUM_FIXES = 3


@contextmanager
def out_of_memory(
    batch: Any, *, config: TrainConfig, task: Task, runtime: Runtime, step: int
) -> Iterator[None]:
    """Turn an allocator's refusal inside the block into one report.

    Args:
        step: the number of the step, counted from 1.

    Raises:
        OutOfMemory: with the bucket, the samples, what was taken, and three changes.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(report(error, batch, config, task, runtime, step)) from error


def report(
    error: Exception, batch: Any, config: TrainConfig, task: Task, runtime: Runtime, step: int
) -> str:
    """One line: what, where, how much, and what to do; of a mixed step, about its largest batch."""
    parts = pieces(batch) or (batch.stand_in,)
    batch = max(parts, key=lambda part: prod(tensor_shape(part)))
    shape = task.shape(batch)
    clips = f"{len(batch)} x {shape['num_frames']}x{shape['height']}x{shape['width']}"
    if config.micro_batch is not None:
        clips += f", {config.micro_batch} at a time"
    ids = batch.sample_ids.tolist()
    samples = ", ".join(map(str, ids[:8])) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    size = "x".join(map(str, tensor_shape(batch)))
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return (
        f"out of memory in step {step} on rank {runtime.rank}: a batch of {clips} "
        f"(tensor {size}, samples {samples}); {_taken(runtime.device)}. "
        f"Set {'; or '.join(fixes(config, len(batch), runtime))}. `opensora plan` predicts the "
        f"peak. ({reason[:200]})"
    )


def fixes(config: TrainConfig, batch_size: int, runtime: Runtime) -> list[str]:
    """The first changes of the config that are not made yet, as words for the command line."""
    ranks, recompute, video = (
        runtime.world_size,
        config.recompute,
        config.task.kind != "autoencoder",
    )
    at_a_time = min(batch_size, config.micro_batch or batch_size)
    tiles = max(2, 2 * recompute.tiles)
    shared = config.parallel.ulysses * 2
    cheaper = {"none": "selective", "selective": "block", "block": "pair"}.get(recompute.policy)
    fits = ranks % (shared * config.parallel.ring * config.parallel.tp) == 0
    sharded = isinstance(config.engine, FsdpConfig)
    changes = [
        (video and at_a_time > 1, f"micro_batch={at_a_time // 2} (the same result)"),
        (video and cheaper is not None, f"recompute.policy={cheaper} (computes more)"),
        (video and ranks > 1 and not sharded, "engine.kind=fsdp (shards parameters)"),
        (video and fits and ranks > 1, f"parallel.ulysses={shared} (ranks share a clip)"),
        (video and recompute.policy != "none", f"recompute.tiles={tiles} (parts in turn)"),
        (
            video and runtime.device.type == "cuda" and not recompute.offload,
            "recompute.offload=true (keeps activations on the host)",
        ),
        (config.precision == "fp32", "precision=bf16 in a new run"),
        (batch_size > 1, f"a batch_size below {batch_size} in data.buckets, in a new run"),
        (True, "fewer frames in data.buckets, in a new run"),
        (True, "a smaller resolution in data.buckets, in a new run"),
        (True, "a smaller task.model or task.vae, in a new run"),
    ]
    return [text for applies, text in changes if applies][:NUM_FIXES]


def _taken(device: torch.device) -> str:
    """What is allocated now, the peak, and what there is, in GiB."""
    peak = peak_memory_bytes(device) / 2**30
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        now = torch.cuda.memory_allocated(device) / 2**30
        return (
            f"allocated {now:.2f} GiB, peak {peak:.2f} GiB, "
            f"free {free / 2**30:.2f} of {total / 2**30:.2f} GiB"
        )
    return f"peak {peak:.2f} GiB{_host()}"


def _host() -> str:
    """Free and total memory of a Linux host."""
    table = {name: size / 2**30 for name, size in host_memory().items()}
    if not table:
        return ""
    return f", free {table['MemAvailable']:.2f} of {table['MemTotal']:.2f} GiB"
