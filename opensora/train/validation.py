"""Measuring a task between steps: on the averaged weights, over the ranks, leaving no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from opensora.engine.ema import EMA
from opensora.runtime import Runtime
from opensora.train.exchange import means
from opensora.train.tasks import Sums, Task


@contextmanager
def averaged(task: Task, ema: EMA | None) -> Iterator[None]:
    """The task in eval mode, with its averaged weights where such are kept."""
    task.eval()
    try:
        with ema.swapped() if ema is not None else nullcontext():
            yield
    finally:
        task.train()


def measure(
    batches: Iterable[Any], metrics: Callable[[Any], Sums], runtime: Runtime
) -> dict[str, float]:
    """Means of a task's metrics over this rank's batches and those of the other ranks."""
    sums: dict[str, tuple[float, float]] = {}
    for batch in batches:
        for name, (total, count) in metrics(batch).items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + float(total), before[1] + float(count))
    return means(sums, runtime)
