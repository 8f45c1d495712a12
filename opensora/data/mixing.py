"""Steps that mix clips of all buckets, dealt to ranks by cost.

The rows of an epoch are one stream in random order. A clip fills 1 / batch_size of its bucket of a
step, and a step is what begins in it. So a mixed step has on average the clips, tokens and cost of
the buckets' own steps, and which clips those are depends neither on costs nor on ranks; these
only decide which rank gets which.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from math import ceil
from typing import Any, Literal

import numpy as np
from pydantic import Field
from torch.utils.data import Dataset

from opensora.config import Config
from opensora.data.balance import deal
from opensora.data.buckets import Bucket
from opensora.data.loading import BatchDataset
from opensora.data.plan import NUM_SPARES, Assigner, Batch, PartOf, check_parts, spares_of
from opensora.errors import UsageError
from opensora.runtime import fractions
from opensora.types import MixedBatch

Cost = Callable[[Bucket], float]

_FINEST = 2**32
"""Parts of a step, at most, in which the clips' shares of it are counted."""


class MixingConfig(Config):
    """What every kind of training data can do."""

    mix: Literal["steps", "clips"] = Field(
        default="steps",
        description="what comes in random order: steps, each of one bucket, or clips, so that a "
        "step has some of every bucket and ranks get them by cost",
    )


@dataclass(frozen=True)
class MixedStep:
    """What one step reads over all ranks together.

    Attributes:
        step: of the run, from 0.
        rows: int64 (N,), sample ids in the order of the stream.
        buckets: int64 (N,), indices into the plan's buckets.
        epochs: int64 (N,), the epoch that each row is of.
    """

    step: int
    rows: np.ndarray
    buckets: np.ndarray
    epochs: np.ndarray


@dataclass(frozen=True)
class MixedRequest:
    """What one rank reads of a step: batches of one bucket each, those that ranks share first.

    Attributes:
        pieces: may be none.
        stand_in: as in `types.MixedBatch`.
    """

    pieces: tuple[Batch, ...]
    stand_in: Batch | None


class MixedPlan:
    """The counterpart of `Plan` for steps of many shapes.

    Attributes:
        identity: SHA-256 of everything that the order depends on. Costs are not among it.
        buckets: every shape there can be.

    Args:
        assign: rows -> buckets for an epoch.
        seed: of the run.
        cost: of a clip, above 0, in any unit; asked once for each bucket.
    """

    def __init__(self, assign: Assigner, *, seed: int, cost: Cost) -> None:
        self._assign, self._seed, self._cost = assign, seed, cost
        self.identity = hashlib.sha256(f"mixed {assign.identity} {seed}".encode()).hexdigest()
        self.buckets = assign(0).buckets
        sizes = [bucket.batch_size for bucket in self.buckets]
        self._unit = min(math.lcm(*sizes), _FINEST)
        self._shares = np.array([self._unit // size for size in sizes], np.int64)
        self._begins = [0]
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)

    def batch(self, step: int) -> MixedStep:
        """The clips of a step over all ranks; any step, in any order."""
        begin, end = step * self._unit, (step + 1) * self._unit
        epoch = self._epoch_at(begin)
        found = []
        while (first := self._begin(epoch)) < end:
            rows, buckets, begins = self._epoch(epoch)
            here = slice(*np.searchsorted(begins, [begin - first, end - first]).tolist())
            found.append((rows[here], buckets[here], np.full(len(rows[here]), epoch)))
            epoch += 1
        return MixedStep(step, *(np.concatenate(column) for column in zip(*found, strict=True)))

    def local(self, step: int, part: PartOf) -> MixedRequest:
        """The part of a step that one rank reads."""
        whole = self.batch(step)
        ranks, rank, widths = self._places(part)
        costs, shared = self._costs[whole.buckets], widths[whole.buckets]
        mine = deal(costs, shared, ranks)[rank]
        pieces: list[Batch] = []
        by_bucket: dict[int, list[int]] = {}
        for clip in mine:
            by_bucket.setdefault(int(whole.buckets[clip]), []).append(clip)
        # Sorted, because equal costs of two buckets may have come in turns.
        for bucket in sorted(by_bucket, key=lambda b: (-widths[b], -self._costs[b], b)):
            clips = by_bucket[bucket]
            at_once = ceil(self.buckets[bucket].batch_size * int(widths[bucket]) / ranks)
            for some in np.array_split(clips, ceil(len(clips) / at_once)):
                pieces.append(self._read(whole, bucket, some))
        stand_in = None
        narrow = int(shared.min())
        if not any(shared[clip] == narrow for clip in mine):
            candidates = np.flatnonzero(shared == narrow)
            clip = candidates[costs[candidates].argmin()]
            stand_in = self._read(whole, int(whole.buckets[clip]), np.array([clip]))
        return MixedRequest(tuple(pieces), stand_in)

    def check_parts(self, count: Callable[[Bucket], int]) -> None:
        """Refuse ranks that the steps cannot be dealt to.

        Args:
            count: into how many parts the batches of a bucket would be cut.

        Raises:
            UsageError: naming the bucket, or the numbers of ranks that share clips.
        """
        check_parts(self.buckets, count)
        counts = sorted({count(bucket) for bucket in self.buckets})
        if any(larger % smaller for smaller, larger in pairwise(counts)):
            raise UsageError(
                f"data.mix=clips cannot deal to {' and '.join(map(str, counts))} groups of ranks "
                "in one step: choose parallel.ulysses and ring so that each number of ranks that "
                "share a clip divides the next, such as powers of 2, or leave max_tokens out"
            )

    def _places(self, part: PartOf) -> tuple[int, int, np.ndarray]:
        """How many groups of ranks there are to deal to, this rank's, and how many of them share a
        clip of each bucket."""
        places = [part(bucket) for bucket in self.buckets]
        rank, ranks = max(places, key=lambda place: place[1])
        return ranks, rank, np.array([ranks // count for _, count in places])

    def _read(self, whole: MixedStep, bucket: int, clips: np.ndarray) -> Batch:
        """The request for some clips of one bucket."""
        rows, epochs = whole.rows[clips], whole.epochs[clips]
        spares = np.empty((len(rows), NUM_SPARES), np.int64)
        for epoch in np.unique(epochs).tolist():
            members = self._assign(epoch).rows_of(bucket)
            own = epochs == epoch
            spares[own] = spares_of(rows[own], members, seed=self._seed, step=whole.step)
        return Batch(whole.step, int(epochs[0]), self.buckets[bucket], rows, spares)

    @cached_property
    def _costs(self) -> np.ndarray:
        return np.array([self._cost(bucket) for bucket in self.buckets], np.float64)

    def _begin(self, epoch: int) -> int:
        """Where an epoch begins in the stream, in units of which a step has `_unit`."""
        if self._assign.is_constant:
            return epoch * self._length(0)
        while len(self._begins) <= epoch:
            self._begins.append(self._begins[-1] + self._length(len(self._begins) - 1))
        return self._begins[epoch]

    def _length(self, epoch: int) -> int:
        return int((self._assign(epoch).counts * self._shares).sum())

    def _epoch_at(self, place: int) -> int:
        """The last epoch that begins at a place of the stream or before."""
        if self._assign.is_constant:
            return place // self._length(0)
        while self._begins[-1] <= place:
            self._begin(len(self._begins))
        return bisect_right(self._begins, place) - 1

    def _build_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows of an epoch in order, their buckets, and where each begins from the first."""
        bucket_of_row = self._assign(epoch).bucket_of_row
        rows = np.flatnonzero(bucket_of_row >= 0)
        rows = rows[np.argsort(fractions(rows, self._seed, "sample order", epoch), kind="stable")]
        buckets = bucket_of_row[rows].astype(np.int64)
        shares = self._shares[buckets]
        return rows, buckets, np.cumsum(shares) - shares


class MixedDataset(Dataset[MixedBatch]):
    """Requests of a `MixedPlan` -> what the dataset underneath answers to their pieces."""

    def __init__(self, dataset: BatchDataset[Any]) -> None:
        self._dataset = dataset

    def __getitem__(self, request: MixedRequest) -> MixedBatch:
        pieces = tuple(self._dataset[piece] for piece in request.pieces)
        spare = request.stand_in
        return MixedBatch(pieces, None if spare is None else self._dataset[spare])
