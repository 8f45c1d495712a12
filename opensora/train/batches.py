"""Batches as the trainer sees them: where they come from, and how they are cut into pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from opensora.types import MixedBatch

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


def pieces(batch: Any) -> tuple[Any, ...]:
    """What a rank has of a step, by shape; may be none where shapes mix."""
    return batch.pieces if isinstance(batch, MixedBatch) else (batch,)


def split(batch: Any, micro_batch: int | None) -> list[Any]:
    """A batch in pieces of one shape and at most `micro_batch` samples."""
    return [part for piece in pieces(batch) for part in _split(piece, micro_batch)]


def _split(piece: Any, micro_batch: int | None) -> list[Any]:
    size = len(piece)
    if micro_batch is None or micro_batch >= size:
        return [piece]
    return [piece[start : start + micro_batch] for start in range(0, size, micro_batch)]


def stand_in(batch: Any, parts: list[Any]) -> Any:
    """What to call the model with, for nothing, when other ranks have more parts."""
    given = batch.stand_in if isinstance(batch, MixedBatch) else None
    return parts[-1] if given is None else given


def tensor_shape(batch: Any) -> tuple[int, ...]:
    """The shape of a batch's pixels or latents."""
    values = getattr(batch, "latents", None)
    return tuple((values if values is not None else batch.pixels).shape)


def close(batches: Batches) -> None:
    """End what reads ahead."""
    end = getattr(batches, "close", None)
    if end is not None:
        end()
