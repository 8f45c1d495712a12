"""What a run tells: one JSON line a record, a live bar, and TensorBoard or W&B where asked.

`metrics.jsonl` is the truth that the report reads; the others are views. Rank 0 writes.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from opensora.config import Config
from opensora.errors import require
from opensora.runtime import Runtime


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
    """Writes records; opening an existing run truncates what lies after the resumed step."""

    def __init__(self, config: LogConfig, folder: Path, runtime: Runtime, *, first_step: int):
        self.config, self.folder, self.runtime = config, folder, runtime
        self.started = time.monotonic()
        self._writer: Any = None
        self._wandb: Any = None
        if not runtime.is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._rewind(folder / "metrics.jsonl", first_step)
        if config.tensorboard:
            board = require("torch.utils.tensorboard", extra="log", purpose="log.tensorboard")
            self._writer = board.SummaryWriter(folder / "tensorboard", purge_step=first_step)
        if config.wandb_project:
            wandb = require("wandb", extra="log", purpose="log.wandb_project")
            self._wandb = wandb.init(
                project=config.wandb_project, dir=folder, id=folder.name, resume="allow"
            )

    def _rewind(self, path: Path, first_step: int) -> None:
        """Drop records of steps that the resumed run will do again, and torn last lines."""
        kept = [r for r in read_records(path) if r["step"] < first_step or first_step == 0]
        if first_step == 0 and kept:
            path.rename(path.with_suffix(f".{int(time.time())}.jsonl"))
            kept = []
        path.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append a record of `kind` ('train', 'validation', ...) after `step` steps."""
        if not self.runtime.is_main:
            return
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **_plain(values)}
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{k}": v for k, v in numbers.items()}, step=step)

    def incident(self, values: dict[str, Any]) -> None:
        """Append to incidents.jsonl: skipped steps and the samples in them."""
        if self.runtime.is_main:
            with open(self.folder / "incidents.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(_plain(values)) + "\n")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a line torn by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: non-finite numbers become strings."""
    return {
        k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()
    }


class Bar:
    """One live line: progress, loss, rates, share of the machine's matmul rate, memory, ETA."""

    def __init__(self, *, total: int, first: int, title: str, visible: bool):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self.visible = visible
        self.live = visible and console.is_terminal
        self.title, self.total = title, total
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.live,
        )
        self.task = self.progress.add_task(title, total=total, completed=first, figures="")

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.stop()

    def update(self, done: int, figures: str, *, eta_seconds: float, print_line: bool) -> None:
        """Move the bar; where there is no terminal, print a line when asked to."""
        if self.live:
            self.progress.update(self.task, completed=done, figures=figures)
        elif self.visible and print_line:
            minutes, seconds = divmod(int(eta_seconds), 60)
            left = f"{minutes}:{seconds:02d} left"
            print(f"{self.title} {done}/{self.total} {figures} {left}", file=sys.stderr, flush=True)
