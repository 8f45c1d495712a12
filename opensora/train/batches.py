"""Batches as the trainer sees them: where they come from, and how they are cut into pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

Batches = Iterator[Any]


class Source(Protocol):
    """Where batches come from."""

    @property
    def has_validation(self) -> bool: ...

    @property
    def identity(self) -> str:
        """Digest of everything that decides which samples a step sees."""
        ...

    def train(self, first_step: int) -> Batches:
        """This rank's batches from a step on, without end."""
        ...

    def validation(self) -> Batches:
        """One pass over this rank's validation batches, the same every time."""
        ...


def split(batch: Any, micro_batch: int | None) -> list[Any]:
    """A batch in pieces of at most `micro_batch` samples."""
    size = len(batch)
    if micro_batch is None or micro_batch >= size:
        return [batch]
    return [batch[start : start + micro_batch] for start in range(0, size, micro_batch)]


def tensor_shape(batch: Any) -> tuple[int, ...]:
    """The shape of a batch's pixels or latents."""
    values = getattr(batch, "latents", None)
    return tuple((values if values is not None else batch.pixels).shape)


def close(batches: Batches) -> None:
    """End what reads ahead."""
    end = getattr(batches, "close", None)
    if end is not None:
        end()
