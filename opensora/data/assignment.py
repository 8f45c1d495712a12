"""Which clip goes into which bucket in an epoch, and why the others are left out.

A row goes to the highest resolution and the greatest length that it is big and long enough for
and that the draw keeps (Open-Sora's cascade). Draws are addressed by (seed, epoch, row), so
neither the order of work nor the number of ranks changes them. Every row is counted once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from opensora.data.buckets import Bucket, BucketsConfig, Level, Triple, levels
from opensora.data.manifest import Manifest
from opensora.errors import DataError, did_you_mean
from opensora.runtime import fractions

SLOWEST = 0.9  # part of the wanted frame rate that a clip must have, lest frames be repeated


@dataclass(frozen=True)
class Census:
    """Where every row of a manifest went.

    Attributes:
        num_rows: rows in the manifest; `kept` and `left_out` add up to it.
        kept: bucket shape -> rows in it.
        left_out: reason -> rows.
        examples: reason -> the first five of those rows.
    """

    num_rows: int
    kept: dict[str, int]
    left_out: dict[str, int]
    examples: dict[str, list[int]]

    def __str__(self) -> str:
        lines = [f"{sum(self.kept.values())} of {self.num_rows} rows are used"]
        lines += [f"  {shape}: {count}" for shape, count in self.kept.items()]
        for reason, count in self.left_out.items():
            rows = ", ".join(map(str, self.examples[reason]))
            lines.append(f"  left out, {reason}: {count} (rows {rows}{', ...' * (count > 5)})")
        return "\n".join(lines)


@dataclass(frozen=True)
class Assignment:
    """The rows of one epoch by bucket.

    Attributes:
        buckets: every shape there can be, in a fixed order.
        bucket_of_row: int16 (N,), an index into `buckets`, or -1 where a row is left out.
        census: where every row went.
    """

    buckets: tuple[Bucket, ...]
    bucket_of_row: np.ndarray
    census: Census

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 (number of buckets,), rows in each."""
        return np.bincount(self.bucket_of_row + 1, minlength=len(self.buckets) + 1)[1:]

    def rows_of(self, bucket: int) -> np.ndarray:
        """int64, the rows of one bucket in ascending order."""
        end = int(self.counts[: bucket + 1].sum())
        return self._sorted_rows[end - int(self.counts[bucket]) : end]

    @cached_property
    def _sorted_rows(self) -> np.ndarray:
        num_left_out = len(self.bucket_of_row) - int(self.counts.sum())
        return np.argsort(self.bucket_of_row, kind="stable")[num_left_out:]


class BucketAssigner:
    """Rows -> buckets for any epoch; a pure function of what it is made of.

    Attributes:
        identity: SHA-256 of everything that the result depends on.
        is_constant: whether every epoch has the same assignment.

    Args:
        stride, patch: of the VAE and the model, as in `buckets.levels`.

    Raises:
        UsageError: lengths or the token budget do not suit stride and patch.
        DataError: a score column is missing, or no row is used in epoch 0 (with the census).
    """

    def __init__(
        self, manifest: Manifest, config: BucketsConfig, *, stride: Triple, patch: Triple, seed: int
    ) -> None:
        self._seed = seed
        self._levels = levels(config, stride=stride, patch=patch)
        self._buckets = tuple(b for level in self._levels for row in level.buckets for b in row)
        self._barred = _barred(manifest, config)
        self._allowed = np.ones(len(manifest), bool)
        for mask, _ in self._barred:
            self._allowed &= ~mask
        self._aspects = [_aspect_of_rows(manifest, level, config) for level in self._levels]
        self._is_still = manifest.num_frames == 1
        rate = config.fps or manifest.fps / config.frame_interval
        # The last frame stays on show for an interval; half of it is left for coarse clocks.
        reach = (manifest.seconds - 0.5 / manifest.fps) * rate
        self._longest = np.where(self._is_still, 1, 1 + np.floor(reach + 1e-6))
        rules = [rule for lengths in config.resolutions.values() for rule in lengths.values()]
        self.is_constant = all(rule.keep == rule.length_keep == 1 for rule in rules)
        content = f"{manifest.identity} {config.model_dump_json()} {stride} {patch} {seed}"
        self.identity = hashlib.sha256(content.encode()).hexdigest()
        self._last: tuple[int, Assignment] | None = None
        if not self(0).counts.any():
            raise DataError(f"there is nothing to train on: {self(0).census}")

    def __call__(self, epoch: int) -> Assignment:
        """Which rows an epoch uses, and in which bucket."""
        epoch = 0 if self.is_constant else epoch
        if self._last is None or self._last[0] != epoch:
            self._last = (epoch, self._assign(epoch))
        return self._last[1]

    def _assign(self, epoch: int) -> Assignment:
        num_rows = len(self._is_still)
        bucket_of_row = np.full(num_rows, -1, np.int16)
        is_big, is_long = np.zeros(num_rows, bool), np.zeros(num_rows, bool)
        first = 0
        for level, aspects in zip(self._levels, self._aspects, strict=True):
            rows = np.flatnonzero(self._allowed & (bucket_of_row < 0) & (aspects >= 0))
            is_big[rows] = True
            chosen, fits = self._choose_length(level, rows, epoch)
            is_long[rows[fits]] = True
            taken = rows[chosen >= 0]
            lengths = chosen[chosen >= 0]
            bucket_of_row[taken] = first + lengths * len(level.sizes) + aspects[taken]
            first += len(level.lengths) * len(level.sizes)
        census = self._census(bucket_of_row, is_big, is_long)
        return Assignment(self._buckets, bucket_of_row, census)

    def _choose_length(
        self, level: Level, rows: np.ndarray, epoch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """For each row the index of its length or -1, and whether any length fits it."""
        chosen = np.full(len(rows), -1)
        any_fits = np.zeros(len(rows), bool)
        keep = np.ones(len(rows))
        still, longest = self._is_still[rows], self._longest[rows]
        for index, (num_frames, rule) in enumerate(level.lengths):
            fits = (still == (num_frames == 1)) & (longest >= num_frames)
            any_fits |= fits
            fits &= chosen < 0
            if rule.length_keep < 1:
                purpose = f"bucket length {level.resolution} {num_frames}"
                fits &= fractions(rows, self._seed, purpose, epoch) < rule.length_keep
            chosen[fits], keep[fits] = index, rule.keep
        if (keep < 1).any():
            draws = fractions(rows, self._seed, f"bucket keep {level.resolution}", epoch)
            chosen[draws >= keep] = -1
        return chosen, any_fits

    def _census(self, bucket_of_row: np.ndarray, is_big: np.ndarray, is_long: np.ndarray) -> Census:
        kept = np.bincount(bucket_of_row + 1, minlength=len(self._buckets) + 1)[1:]
        remaining = bucket_of_row < 0
        reasons = [
            *self._barred,
            (~is_big, "smaller than every resolution"),
            (~is_long & self._is_still, "a still picture, and there is no bucket of 1 frame"),
            (~is_long, "shorter than every length"),
            (np.ones_like(remaining), "not drawn by the keep-probabilities of this epoch"),
        ]
        left_out, examples = {}, {}
        for mask, reason in reasons:
            count = int((remaining & mask).sum())
            if count:
                left_out[reason] = count
                examples[reason] = np.flatnonzero(remaining & mask)[:5].tolist()
            remaining &= ~mask
        shapes: dict[str, int] = {}
        for bucket, count in zip(self._buckets, kept.tolist(), strict=True):
            if count:
                shapes[bucket.shape] = shapes.get(bucket.shape, 0) + count
        return Census(len(bucket_of_row), shapes, left_out, examples)


def _barred(manifest: Manifest, config: BucketsConfig) -> list[tuple[np.ndarray, str]]:
    """Rows that no bucket may take, as masks with the reason."""
    barred = []
    for name, (lowest, highest) in config.scores.items():
        if name not in manifest.scores:
            raise DataError(
                f"the manifest has no column '{name}' to filter by."
                + did_you_mean(name, manifest.scores)
            )
        values = manifest.scores[name]
        low = -np.inf if lowest is None else lowest
        high = np.inf if highest is None else highest
        barred.append((~((values >= low) & (values <= high)), f"{name} not in [{low}, {high}]"))
    if config.fps is not None:
        slow = (manifest.fps < SLOWEST * config.fps) & (manifest.num_frames > 1)
        barred.append((slow, f"slower than {config.fps:g} frames per second"))
    return barred


def _aspect_of_rows(manifest: Manifest, level: Level, config: BucketsConfig) -> np.ndarray:
    """int16 (N,): the index of the nearest size in proportions, -1 where a row is too small."""
    heights, widths = (np.array(side) for side in zip(*level.sizes, strict=True))
    proportions = np.log(widths / heights)
    borders = (proportions[1:] + proportions[:-1]) / 2
    nearest = np.searchsorted(borders, np.log(manifest.width / manifest.height))
    upscale = np.maximum(heights[nearest] / manifest.height, widths[nearest] / manifest.width)
    return np.where(upscale <= config.max_upscale, nearest, -1).astype(np.int16)
