"""Ranks as threads of one process: any number of them, with the calls of `dist.groups.Group`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor

from opensora.dist.groups import note
from opensora.dist.mesh import Layout
from opensora.dist.ulysses import SequenceGroups

PATIENCE = 30.0


class Exchange:
    """What the threads of one group share."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self.table: list[Any] = [None] * size

    def swap(self, rank: int, value: Any) -> list[Any]:
        """Everybody's value."""
        self.table[rank] = value
        self.barrier.wait()
        found = list(self.table)
        self.barrier.wait()
        return found


class ThreadGroup:
    """One thread's end of a group."""

    def __init__(self, exchange: Exchange, rank: int):
        self._exchange = exchange
        self.rank, self.size = rank, exchange.size

    def all_to_all(self, pieces: Sequence[Tensor], shapes: Sequence[Any]) -> list[Tensor]:
        note([p for rank, p in enumerate(pieces) if rank != self.rank])
        sent = self._exchange.swap(self.rank, [p.clone() for p in pieces])
        return self._checked([rows[self.rank] for rows in sent], shapes)

    def all_gather(self, piece: Tensor, shapes: Sequence[Any]) -> list[Tensor]:
        note([piece] * (self.size - 1))
        return self._checked(self._exchange.swap(self.rank, piece.clone()), shapes)

    def shift(self, tensors: Sequence[Tensor], shapes: Sequence[Any]) -> Callable[[], list[Tensor]]:
        note(tensors)
        sent = self._exchange.swap(self.rank, [t.clone() for t in tensors])
        received = self._checked(sent[(self.rank - 1) % self.size], shapes)
        return lambda: received

    def _checked(self, received: list[Tensor], shapes: Sequence[Any]) -> list[Tensor]:
        assert [tuple(t.shape) for t in received] == [tuple(s) for s in shapes]
        return received


def run(size: int, work: Callable[[int], Any]) -> list[Any]:
    """work(rank) on `size` threads; their results by rank."""
    with ThreadPoolExecutor(size) as pool:
        jobs = [pool.submit(copy_context().run, work, rank) for rank in range(size)]
        for job in as_completed(jobs):  # the one that failed first says why the others wait
            job.result()
        return [job.result() for job in jobs]


def groups(size: int) -> list[ThreadGroup]:
    """The ends of a group of `size` threads, by rank."""
    exchange = Exchange(size)
    return [ThreadGroup(exchange, rank) for rank in range(size)]


class ThreadMesh:
    """Stands for `dist.mesh.Mesh` where ranks are threads."""

    def __init__(self, layout: Layout, every: list[SequenceGroups], rank: int):
        self.layout, self._groups = layout, every[rank]

    def sequence(self, degree: int) -> SequenceGroups:
        return self._groups if degree > 1 else SequenceGroups()


def ends(ulysses: int, ring: int) -> list[SequenceGroups]:
    """The groups of every rank, ring-major, those of all ranks included."""
    inner = [groups(ulysses) for _ in range(ring)]
    outer = [groups(ring) for _ in range(ulysses)]
    flat = groups(ulysses * ring)
    return [
        SequenceGroups(inner[r][u], outer[u][r], flat[r * ulysses + u])
        for r in range(ring)
        for u in range(ulysses)
    ]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
