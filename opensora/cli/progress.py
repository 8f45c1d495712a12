"""Progress of named stages: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


class Stages:
    """`update(stage, done, total)` from anywhere inside the block.

    Args:
        visible: False on ranks that stay silent.
    """

    def __init__(self, *, visible: bool = True) -> None:
        console = Console(stderr=True)
        self.visible = visible
        self.live = visible and console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self.live,
        )
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, float] = {}

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Show how much of a stage is done; a stage begins when it is first named.

        Args:
            note: where in the next one it is; it alone makes no line off a terminal sooner.
        """
        if not self.visible:
            return
        if self.live:
            if stage not in self._tasks:
                self._tasks[stage] = self._progress.add_task(stage, total=total)
            said = f"{stage} ({note})" if note else stage
            self._progress.update(self._tasks[stage], completed=done, total=total, description=said)
            return
        now = time.monotonic()
        if (done == total and not note) or now - self._told.get(stage, -1e9) >= 10:
            self._told[stage] = now
            told = f"{stage} {done}/{total}" + (f", {note}" if note else "")
            print(told, file=sys.stderr, flush=True)
