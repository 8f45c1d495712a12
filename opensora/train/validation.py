"""Measuring a task between steps: on the averaged weights, over the ranks, leaving no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from opensora.engine.ema import Averages
from opensora.runtime import Runtime
from opensora.train.exchange import means
from opensora.train.tasks import Sums, Task


@contextmanager
def averaged(task: Task, ema: Averages | None) -> Iterator[None]:
    """The task in eval mode, with its averaged weights where such are kept."""
    task.eval()
    try:
        with ema.swapped() if ema is not None else nullcontext():
            yield
    finally:
        task.train()


def measure(
    batches: Iterable[Any],
    metrics: Callable[[Any], Sums],
    runtime: Runtime,
    *,
    stand_in: Callable[[], Any] | None = None,
) -> dict[str, float]:
    """Means of a task's metrics over this rank's batches and those of the other ranks.

    Args:
        stand_in: makes a batch that is measured for nothing, where every rank has to call the
            model equally often and this one has fewer batches.
    """
    sums: dict[str, tuple[float, float]] = {}
    if stand_in is not None:
        batches = _in_step(batches, metrics, runtime, stand_in)
    for batch in batches:
        for name, (total, count) in metrics(batch).items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + float(total), before[1] + float(count))
    return means(sums, runtime)


def _in_step(
    batches: Iterable[Any],
    metrics: Callable[[Any], Sums],
    runtime: Runtime,
    stand_in: Callable[[], Any],
) -> Iterator[Any]:
    """The batches, and work for nothing until no rank has any left."""
    mine, spare = iter(batches), None
    while True:
        batch = next(mine, None)
        if not any(runtime.gather_objects(batch is not None)):
            return
        if batch is not None:
            yield batch
        else:
            spare = stand_in() if spare is None else spare
            metrics(spare)
