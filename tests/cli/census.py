"""What lives in a rank before and after every evaluation, as lines of `census-RANK` in a folder."""

from __future__ import annotations

import gc
import json
import os
import resource
import time
from pathlib import Path

import torch

from opensora.train.trainer import Trainer


def install(folder: Path) -> None:
    """Take the census from now on, in this process."""
    evaluate = Trainer._evaluate
    file = folder / f"census-{os.environ['RANK']}"

    def counted(trainer: Trainer) -> None:
        before = alive()
        evaluate(trainer)
        after, deadline = alive(), time.monotonic() + 30
        # gloo's thread lets go of what it sent a moment after a collective has ended.
        while after[:2] != before[:2] and time.monotonic() < deadline:
            time.sleep(0.05)
            after = alive()
        with file.open("a") as told:
            told.write(json.dumps([before, after]) + "\n")

    Trainer._evaluate = counted


def alive() -> tuple[int, int, int]:
    """Tensors, the bytes of their storages, and the resident set in bytes."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {}
    for tensor in tensors:
        part = getattr(tensor, "_local_tensor", tensor)
        storage = part.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(tensors), sum(storages.values()), pages * resource.getpagesize()


def read(folder: Path, rank: int) -> list[list[list[int]]]:
    """[before, after] of every evaluation of a rank."""
    return [json.loads(line) for line in (folder / f"census-{rank}").read_text().splitlines()]
