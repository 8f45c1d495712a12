"""The order of training: which clips form the batch of which step, for ever.

A plan is a pure function of the seed and the assignment of rows to buckets. It knows batches over
all ranks together; a rank takes its slice, so neither the number of ranks nor of workers changes
what a step sees, and any step can be asked for directly.

Each bucket is an endless stream: the rows of epoch 0 in random order, then those of epoch 1, and so
on, cut into batches. What an epoch leaves over begins the next epoch's first batch of that bucket,
so nothing is dropped or repeated to fill a batch. Within an epoch, batches of all buckets mix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from opensora.data.assignment import Assignment
from opensora.data.buckets import Bucket
from opensora.errors import UsageError
from opensora.runtime import fractions

NUM_SPARES = 8

PartOf = Callable[[Bucket], tuple[int, int]]
"""A bucket -> (index, count): which part of its batches a rank reads. Ranks that share every clip
of a bucket read the same part."""


def whole(bucket: Bucket) -> tuple[int, int]:
    """One rank reads everything."""
    return 0, 1


class Assigner(Protocol):
    """What a plan needs to know about the data."""

    is_constant: bool
    identity: str

    def __call__(self, epoch: int) -> Assignment: ...


class Order(Protocol):
    """What the loader needs to know of a plan: `Plan`, `mixing.MixedPlan`."""

    def local(self, step: int, part: PartOf) -> Any:
        """What one rank reads at a step."""
        ...

    def check_parts(self, count: Callable[[Bucket], int]) -> None:
        """Refuse, as UsageError, numbers of parts of each bucket that cannot be read."""
        ...


@dataclass(frozen=True)
class Batch:
    """What one step reads.

    Attributes:
        step: the step of the run, from 0.
        epoch: the epoch that the step belongs to.
        bucket: the shape.
        rows: int64 (B,), sample ids.
        spares: int64 (B, NUM_SPARES), rows of the same bucket to take, in this order, where a row
            cannot be read.
    """

    step: int
    epoch: int
    bucket: Bucket
    rows: np.ndarray
    spares: np.ndarray

    def part(self, rank: int, world_size: int) -> Batch:
        """The contiguous slice of one rank; sizes differ by at most one."""
        begin = rank * len(self.rows) // world_size
        end = (rank + 1) * len(self.rows) // world_size
        return replace(self, rows=self.rows[begin:end], spares=self.spares[begin:end])


class Plan:
    """The batches of every step.

    Attributes:
        identity: SHA-256 of everything that the order depends on; a run that resumes compares it.
        buckets: every shape there can be.

    Args:
        assign: rows -> buckets for an epoch, such as `BucketAssigner`.
        seed: of the run.
    """

    def __init__(self, assign: Assigner, *, seed: int) -> None:
        self._assign = assign
        self._seed = seed
        self.identity = hashlib.sha256(f"{assign.identity} {seed}".encode()).hexdigest()
        self.buckets = assign(0).buckets
        self._sizes = np.array([bucket.batch_size for bucket in self.buckets])
        self._counted = [np.zeros(len(self.buckets), np.int64)]  # rows before each epoch
        self._recent = 0
        self._epoch = lru_cache(maxsize=1)(self._build_epoch)

    def batch(self, step: int) -> Batch:
        """The batch of a step over all ranks; any step, in any order."""
        epoch = self.epoch_of(step)
        index = step - self.first_step(epoch)
        bucket, rows = self._epoch(epoch).batch(index)
        members = self._assign(epoch).rows_of(bucket)
        spares = spares_of(rows, members, seed=self._seed, step=step)
        return Batch(step, epoch, self.buckets[bucket], rows, spares)

    def local(self, step: int, part: PartOf) -> Batch:
        """The part of a step's batch that one rank reads."""
        batch = self.batch(step)
        return batch.part(*part(batch.bucket))

    def check_parts(self, count: Callable[[Bucket], int]) -> None:
        """Refuse to cut a batch into more parts than it has clips; see `check_parts` below."""
        check_parts(self.buckets, count)

    def first_step(self, epoch: int) -> int:
        """The first step that belongs to an epoch."""
        return int((self._rows_before(epoch) // self._sizes).sum())

    def num_steps(self, epoch: int) -> int:
        """How many steps belong to an epoch; none where the data does not fill a batch."""
        return self.first_step(epoch + 1) - self.first_step(epoch)

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to.

        Immediate where every epoch has the same rows; otherwise all epochs up to it are counted
        once.
        """
        low = self._recent if self.first_step(self._recent) <= step else 0
        stride = 1
        while self.first_step(low + stride) <= step:
            low += stride
            stride *= 2 if self._assign.is_constant else 1
        high = low + stride
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.first_step(middle) <= step else (low, middle)
        self._recent = low
        return low

    def _rows_before(self, epoch: int) -> np.ndarray:
        """int64 (number of buckets,): rows that each bucket has met before an epoch."""
        if self._assign.is_constant:
            return self._assign(0).counts * epoch
        while len(self._counted) <= epoch:
            counts = self._assign(len(self._counted) - 1).counts
            self._counted.append(self._counted[-1] + counts)
        return self._counted[epoch]

    def _build_epoch(self, epoch: int) -> _Epoch:
        before, after = self._rows_before(epoch), self._rows_before(epoch + 1)
        num_batches = after // self._sizes - before // self._sizes
        used = np.flatnonzero(num_batches).tolist()
        carried = {b: self._tail(b, epoch, int(before[b] % self._sizes[b])) for b in used}
        streams = {}
        for bucket in used:
            stream = np.concatenate([carried[bucket], self._order(bucket, epoch)])
            size = int(self._sizes[bucket])
            streams[bucket] = stream[: int(num_batches[bucket]) * size].reshape(-1, size)
        bucket_of_batch = np.repeat(np.arange(len(self.buckets)), num_batches)
        first = np.cumsum(num_batches) - num_batches
        batch_in_bucket = np.arange(len(bucket_of_batch)) - first[bucket_of_batch]
        draws = fractions(np.arange(len(bucket_of_batch)), self._seed, "batch order", epoch)
        order = np.argsort(draws, kind="stable")
        return _Epoch(bucket_of_batch[order], batch_in_bucket[order], streams)

    def _order(self, bucket: int, epoch: int) -> np.ndarray:
        """The rows of a bucket in the order of an epoch."""
        rows = self._assign(epoch).rows_of(bucket)
        draws = fractions(rows, self._seed, "sample order", epoch)
        return rows[np.argsort(draws, kind="stable")]

    def _tail(self, bucket: int, epoch: int, count: int) -> np.ndarray:
        """The last `count` rows that a bucket met before an epoch."""
        parts: list[np.ndarray] = [np.empty(0, np.int64)]
        while count > 0:
            epoch -= 1
            order = self._order(bucket, epoch)[-count:]
            parts.insert(0, order)
            count -= len(order)
        return np.concatenate(parts)


def check_parts(buckets: tuple[Bucket, ...], count: Callable[[Bucket], int]) -> None:
    """Refuse to cut a batch into more parts than it has clips.

    Args:
        count: into how many parts the batches of a bucket are cut.

    Raises:
        UsageError: naming the bucket.
    """
    smallest = min(buckets, key=lambda bucket: bucket.batch_size / count(bucket))
    if smallest.batch_size < count(smallest):
        raise UsageError(
            f"the bucket {smallest.shape} has a batch size of {smallest.batch_size}, too few "
            f"for {count(smallest)} data-parallel ranks; raise its batch_size or the "
            "token_budget"
        )


def spares_of(rows: np.ndarray, members: np.ndarray, *, seed: int, step: int) -> np.ndarray:
    """int64 (N, NUM_SPARES): which of `members`, the rows of their bucket, stand in for rows.

    They depend on the row, the step and the seed alone.
    """
    attempts = rows[:, None] * NUM_SPARES + np.arange(NUM_SPARES)
    draws = fractions(attempts, seed, "replacement", step)
    return members[(draws * len(members)).astype(np.int64)]


def once(assign: Assigner) -> list[Batch]:
    """Every row of epoch 0 exactly once, in order within its bucket, for encoding and evaluation.

    The last batch of a bucket may be short, and there are no spares.
    """
    assignment = assign(0)
    batches: list[Batch] = []
    for index, bucket in enumerate(assignment.buckets):
        rows = assignment.rows_of(index)
        for begin in range(0, len(rows), bucket.batch_size):
            part = rows[begin : begin + bucket.batch_size]
            batches.append(Batch(len(batches), 0, bucket, part, np.empty((len(part), 0), np.int64)))
    return batches


@dataclass(frozen=True)
class _Epoch:
    """The batches of one epoch in order; `streams` holds (batches, batch size) for each bucket."""

    bucket_of_batch: np.ndarray
    batch_in_bucket: np.ndarray
    streams: dict[int, np.ndarray]

    def batch(self, index: int) -> tuple[int, np.ndarray]:
        bucket = int(self.bucket_of_batch[index])
        return bucket, self.streams[bucket][self.batch_in_bucket[index]]
