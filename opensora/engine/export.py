"""The weights of a checkpoint alone, whole and ready to use: what is given to others.

An export is a checkpoint without optimizer and averages: everything that takes a checkpoint to use
it takes an export; training does not go on from one.
"""

from __future__ import annotations

from pathlib import Path

import torch

from opensora import store
from opensora.engine import checkpoint, shards
from opensora.engine.checkpoint import CONFIG_NAME, KIND, PROGRESS_NAME
from opensora.engine.shards import Tensors
from opensora.errors import UsageError, did_you_mean

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(source: str | Path, output: str | Path, *, dtype: str, averaged: bool = True) -> Path:
    """Write `weights.safetensors` and, where the model uses frozen parts, `frozen.safetensors`,
    with the config that says what they are of.

    Args:
        source: as in `checkpoint.find`; whole or sharded.
        output: a folder that does not exist yet.
        dtype: of floating point weights, a key of `DTYPES`.
        averaged: take the averages where there are any.

    Raises:
        CheckpointError: the source is missing or damaged.
        UsageError: the output exists, or the dtype is unknown.
        StorageError: the disk refuses.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype} is unknown.{did_you_mean(dtype, DTYPES)}")
    folder = checkpoint.find(source)
    parts = ("weights", "frozen", "ema") if averaged else ("weights", "frozen")
    found = checkpoint.load(folder, parts=parts)
    tensors = {"weights": checkpoint.inference_weights(found, averaged=averaged)}
    if found.frozen:
        tensors["frozen"] = found.frozen
    meta = {"step": found.step, "exported": {"dtype": dtype, "averaged": averaged}}
    with store.write(output, kind=KIND, meta=meta) as written:
        for part, content in tensors.items():
            pieces = shards.pieces(_cast(content, DTYPES[dtype]), rank=0)
            shards.write(written / f"{part}.safetensors", pieces)
        for name in (CONFIG_NAME, PROGRESS_NAME):
            (written / name).write_bytes((folder / name).read_bytes())
    return Path(output)


def _cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {n: v.to(dtype) if v.is_floating_point() else v for n, v in tensors.items()}
