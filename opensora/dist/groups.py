"""A group of ranks as the sequence-parallel code sees it: five calls, three of which move tensors.

Shapes of what arrives are always known beforehand, so nothing is exchanged to find them out, and
parts may differ in size and be empty. `traffic` counts what leaves a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Shape = Sequence[int]
Wait = Callable[[], list[Tensor]]


class Group(Protocol):
    """Ranks 0 .. size - 1 that work on one sequence."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_to_all(self, pieces: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """Send piece p to rank p; returns what rank 0, 1, ... sent here, of `shapes`."""
        ...

    def all_gather(self, piece: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        """Every rank's piece, on every rank."""
        ...

    def shift(self, tensors: Sequence[Tensor], shapes: Sequence[Shape]) -> Wait:
        """Begin to send tensors to the next rank; the result waits for the previous rank's."""
        ...


@dataclass
class Traffic:
    """Bytes that this rank sent to others."""

    sent: int = 0
    calls: int = 0


_ledger: ContextVar[Traffic | None] = ContextVar("traffic", default=None)


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count what is sent inside the block."""
    ledger = Traffic()
    token = _ledger.set(ledger)
    try:
        yield ledger
    finally:
        _ledger.reset(token)


def note(tensors: Sequence[Tensor]) -> None:
    """Add tensors that leave this rank to the open count."""
    ledger = _ledger.get()
    if ledger is not None:
        ledger.sent += sum(t.nbytes for t in tensors)
        ledger.calls += 1


class TorchGroup:
    """A torch.distributed process group, gloo or NCCL."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self._ranks = dist.get_process_group_ranks(group)

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    def all_to_all(self, pieces: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        pieces = [piece.contiguous() for piece in pieces]
        note([piece for rank, piece in enumerate(pieces) if rank != self.rank])
        received = [pieces[0].new_empty(tuple(shape)) for shape in shapes]
        if len({p.numel() for p in pieces} | {r.numel() for r in received}) == 1:
            dist.all_to_all(received, pieces, group=self.group)
            return received
        # Uneven lists are not every backend's; flat buffers with sizes are.
        sizes = [[t.numel() for t in tensors] for tensors in (received, pieces)]
        flat = torch.cat([piece.reshape(-1) for piece in pieces])
        buffer = flat.new_empty(sum(sizes[0]))
        dist.all_to_all_single(buffer, flat, *sizes, group=self.group)
        parts = buffer.split(sizes[0])
        return [part.view(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]

    def all_gather(self, piece: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        piece = piece.contiguous()
        note([piece] * (self.size - 1))
        most = max(torch.Size(shape).numel() for shape in shapes)
        flat = piece.new_zeros(most)
        flat[: piece.numel()] = piece.reshape(-1)
        rows = [flat.new_empty(most) for _ in shapes]
        dist.all_gather(rows, flat, group=self.group)
        sizes = [torch.Size(shape).numel() for shape in shapes]
        return [
            row[:n].view(tuple(shape)) for row, n, shape in zip(rows, sizes, shapes, strict=True)
        ]

    def shift(self, tensors: Sequence[Tensor], shapes: Sequence[Shape]) -> Wait:
        following = self._ranks[(self.rank + 1) % self.size]
        previous = self._ranks[(self.rank - 1) % self.size]
        tensors = [t.contiguous() for t in tensors]
        note(tensors)
        received = [
            t.new_empty(tuple(shape)) for t, shape in zip(tensors, shapes, strict=True)
        ]
        operations = []
        for mine, theirs in zip(tensors, received, strict=True):
            if mine.numel():
                operations.append(dist.P2POp(dist.isend, mine, following, self.group))
            if theirs.numel():
                operations.append(dist.P2POp(dist.irecv, theirs, previous, self.group))
        pending = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> list[Tensor]:
            for request in pending:
                request.wait()
            return received

        return wait
