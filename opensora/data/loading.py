"""Batches of consecutive steps, read ahead by worker processes.

The main process walks the plan and hands each worker what to read, so workers hold neither the
plan nor its memory, and what a step sees does not depend on how many of them there are.
"""

from __future__ import annotations

import itertools
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from opensora.data.plan import Order, PartOf, whole
from opensora.errors import OpensoraError, UsageError

Item = TypeVar("Item")
Answer = TypeVar("Answer", covariant=True)


class BatchDataset(Protocol[Answer]):
    """What answers a request of the plan: ClipDataset, LatentDataset."""

    def __getitem__(self, request: Any, /) -> Answer: ...


def batches(
    dataset: BatchDataset[Item],
    plan: Order,
    first_step: int = 0,
    *,
    part: PartOf = whole,
    num_steps: int | None = None,
    num_workers: int = 0,
    prefetch: int = 2,
    multiprocessing_context: str | None = None,
) -> Iterator[Item]:
    """What one rank sees at steps first_step, first_step + 1, ...

    Closing the iterator, or dropping it, ends the workers.

    Args:
        part: which part of a bucket's batches this rank reads.
        num_steps: how many; None never ends.
        num_workers: processes that read ahead; 0 reads in this one.
        prefetch: batches that each worker keeps ready.
        multiprocessing_context: 'fork', 'spawn' or 'forkserver'; None is the platform's own.

    Raises:
        UsageError: a number is negative, or a batch has fewer clips than parts.
        DataError: as the dataset raises it, also out of a worker.
    """
    if first_step < 0 or num_workers < 0:
        raise UsageError(f"first_step={first_step}, num_workers={num_workers}: 0 is the least")
    plan.check_parts(lambda bucket: part(bucket)[1])
    steps = itertools.count(first_step)
    chosen = steps if num_steps is None else itertools.islice(steps, num_steps)
    requests = (plan.local(step, part) for step in chosen)
    return answers(
        dataset,
        requests,
        num_workers=num_workers,
        prefetch=prefetch,
        multiprocessing_context=multiprocessing_context,
    )


def answers(
    dataset: BatchDataset[Item],
    requests: Iterator[Any],
    *,
    num_workers: int = 0,
    prefetch: int = 2,
    multiprocessing_context: str | None = None,
) -> Iterator[Item]:
    """The dataset's answers to the requests, in their order; the arguments are those of `batches`.

    Raises:
        OpensoraError: as the dataset raises it; out of a worker it arrives with its own message
            and without the worker's traceback.
    """
    if num_workers == 0:
        yield from (dataset[request] for request in requests)
        return
    with warnings.catch_warnings():
        # More workers than cores is the caller's choice: a worker also waits for the disk.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        # Python 3.12 warns of any fork beside threads; the workers use no lock of the parent's.
        warnings.filterwarnings("ignore", message=r"This process .* is multi-threaded")
        loader: DataLoader[Any] = DataLoader(
            _Guarded(dataset),
            sampler=requests,  # pyright: ignore[reportArgumentType]
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=num_workers,
            prefetch_factor=prefetch,
            multiprocessing_context=multiprocessing_context,
            worker_init_fn=_start_worker,
        )
        with _blocked():  # a worker that is only beginning would die of them
            iterator = iter(loader)
    try:
        for answer in iterator:
            if isinstance(answer, OpensoraError):
                raise answer
            yield answer
    finally:
        del iterator, loader  # the last reference: the workers are told to stop and waited for


class _Guarded(Dataset[Any]):
    """Brings errors meant for the user home as values; the loader would wrap them in tracebacks."""

    def __init__(self, dataset: BatchDataset[Any]) -> None:
        self._dataset = dataset

    def __getitem__(self, request: Any) -> Any:
        try:
            return self._dataset[request]
        except OpensoraError as error:
            return error


def _unchanged(item: Item) -> Item:
    return item


_STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def _blocked() -> Iterator[None]:
    """Processes started inside inherit that stop signals wait; for this one they wait as long."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker: int) -> None:
    """Leave signals to the parent, which finishes its step; a worker dies with its parent."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    torch.set_num_threads(1)
