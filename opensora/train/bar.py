"""One live line on the terminal: progress, loss, rates, share of the matmul rate, memory, ETA."""

from __future__ import annotations

import sys


class Bar:
    """Shows nothing where it is not `visible`, lines where there is no terminal."""

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
