"""What a run writes down: one JSON line a record, and TensorBoard or W&B where asked.

`metrics.jsonl` is the truth that the report reads; the others are views. Rank 0 writes.
"""

from __future__ import annotations

import json
import math
import resource
import secrets
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from opensora.config import Config
from opensora.disk import replace_file, storage_errors
from opensora.errors import StorageError, require
from opensora.runtime import Runtime, log

METRICS_NAME = "metrics.jsonl"
INCIDENTS_NAME = "incidents.jsonl"


class LogConfig(Config):
    """How often and where metrics go."""

    every: int = Field(default=10, ge=1, description="steps between records")
    bar: bool = Field(default=True, description="a live line on the terminal")
    tensorboard: bool = Field(default=False, description="write <output>/tensorboard; extra 'log'")
    wandb_project: str | None = Field(default=None, description="W&B project; extra 'log'")


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that the process (CPU) or the device (CUDA) has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Tracker:
    """Writes records; a resumed run forgets the records of steps that it will do again.

    A disk that refuses a record is told of once and does not end the run.

    Args:
        done: steps that are done; later records are dropped.
    """

    def __init__(self, config: LogConfig, folder: Path, runtime: Runtime, *, done: int):
        self.config, self.folder, self.runtime = config, folder, runtime
        self._writer: Any = None
        self._wandb: Any = None
        self._refused: set[str] = set()
        if not runtime.is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_NAME, INCIDENTS_NAME):
            _rewind(folder / name, done)
        if config.tensorboard:
            board = require("torch.utils.tensorboard", extra="log", purpose="log.tensorboard")
            self._writer = board.SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        if config.wandb_project:
            wandb = require("wandb", extra="log", purpose="log.wandb_project")
            self._wandb = wandb.init(
                project=config.wandb_project,
                name=folder.name,
                dir=str(folder),
                id=_identity(folder),
                resume="allow",
            )

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append a record of `kind` ('train', 'validation', ...) after `step` steps."""
        if not self.runtime.is_main:
            return
        moment = round(time.time(), 3)
        self._append(METRICS_NAME, {"kind": kind, "step": step, "time": moment, **values})
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{k}": v for k, v in numbers.items()}, step=step)

    def incident(self, step: int, values: dict[str, Any]) -> None:
        """Append to incidents.jsonl: a skipped step, counted from 1, and the samples in it."""
        if self.runtime.is_main:
            self._append(INCIDENTS_NAME, {"step": step, "time": round(time.time(), 3), **values})

    def close(self) -> None:
        """Flush what other programs keep."""
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _append(self, name: str, record: dict[str, Any]) -> None:
        path = self.folder / name
        # A line that was cut short by a full disk is ended before the next one.
        start = "\n" if name in self._refused else ""
        try:
            with storage_errors(path), open(path, "a", encoding="utf-8") as file:
                file.write(start + _line(record))
            self._refused.discard(name)
        except StorageError as error:
            if name not in self._refused:
                log.error("%s; training goes on", error)
            self._refused.add(name)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a line torn by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def _rewind(path: Path, done: int) -> None:
    """Keep the records of the first `done` steps, whole lines only."""
    if path.exists():
        kept = [record for record in read_records(path) if record.get("step", 0) <= done]
        replace_file(path, "".join(map(_line, kept)).encode("utf-8"))


def _identity(folder: Path) -> str:
    """This run's name for W&B, made once, so that an equal folder elsewhere is another run."""
    path = folder / "wandb-id"
    if not path.exists():
        replace_file(path, f"{folder.name}-{secrets.token_hex(4)}\n".encode())
    return path.read_text(encoding="utf-8").strip()


def _line(record: dict[str, Any]) -> str:
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """JSON has no infinity: non-finite numbers become strings."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
