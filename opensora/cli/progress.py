"""Progress of named stages: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Stages:
    """`update(stage, done, total)` from anywhere inside the block."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self.live = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self.live,
        )
        self._tasks: dict[str, object] = {}
        self._told: dict[str, float] = {}

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        if self.live:
            if stage not in self._tasks:
                self._tasks[stage] = self._progress.add_task(stage, total=total)
            self._progress.update(self._tasks[stage], completed=done, total=total)  # type: ignore[arg-type]
            return
        now = time.monotonic()
        if done == total or now - self._told.get(stage, -1e9) >= 10:
            self._told[stage] = now
            print(f"{stage} {done}/{total}", file=sys.stderr, flush=True)
