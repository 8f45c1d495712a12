"""Curves as numbers: collected record by record, smoothed and thinned to what a screen can show.

Steps rise strictly, values may be non-finite; the chart leaves those out and the page counts them.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

MAX_POINTS = 600
LARGEST = 1e30
"""Values beyond this are as good as infinite for a chart, and would overflow its arithmetic."""


def drawable(values: np.ndarray) -> np.ndarray:
    """bool, like `values`: what is finite and not beyond `LARGEST`."""
    return np.abs(values) <= LARGEST


@dataclass(frozen=True)
class Series:
    """One metric over training.

    Attributes:
        steps: float64 (N,), strictly rising.
        values: float64 (N,), possibly non-finite.
    """

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> np.ndarray:
        """The values that a chart can show, alone."""
        return self.values[drawable(self.values)]

    def last(self) -> float | None:
        """The newest finite value, or None."""
        return float(self.finite[-1]) if len(self.finite) else None

    def scaled(self, factor: float) -> Series:
        """The same in another unit."""
        return Series(self.steps, self.values * factor)


@dataclass
class Collector:
    """Takes (step, value) pairs in any order; the pair that came last for a step wins."""

    steps: array = field(default_factory=lambda: array("d"))
    values: array = field(default_factory=lambda: array("d"))

    def add(self, step: float, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)

    def series(self) -> Series:
        steps, values = np.array(self.steps), np.array(self.values)
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
        last = np.append(steps[1:] != steps[:-1], True)[: len(steps)]
        return Series(steps[last], values[last])


def smooth(series: Series, *, window: int | None = None) -> Series:
    """A centred moving average, taken twice (a triangular kernel), over finite values only.

    Args:
        window: records an average spans; by default a thirtieth of the curve.
    """
    window = max(1, len(series) // 30) if window is None else window
    values = series.values
    for _ in range(2):
        values = _boxcar(values, window)
    return Series(series.steps, values)


def thin(series: Series, limit: int = MAX_POINTS) -> Series:
    """At most `limit` points that look the same: the lowest and highest of every stretch.

    Spikes survive, because what an average would hide is what one looks for. The first and the
    last point stay. A stretch without finite values keeps one of its points, the gap.

    Args:
        limit: points to keep, 4 or more.
    """
    count = len(series)
    if count <= limit:
        return series
    edges = np.linspace(1, count - 1, (limit - 2) // 2 + 1).astype(int)
    kept = {0, count - 1}
    usable = drawable(series.values)
    low = np.where(usable, series.values, math.inf)
    high = np.where(usable, series.values, -math.inf)
    for start, end in pairwise(edges.tolist()):
        kept.add(int(start + low[start:end].argmin()))
        kept.add(int(start + high[start:end].argmax()))
    chosen = np.array(sorted(kept))
    return Series(series.steps[chosen], series.values[chosen])


def _boxcar(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the finite values up to `window // 2` records away; nan where there is none."""
    usable = drawable(values)
    # Sums from a common offset keep the precision of small changes on a large level.
    level = float(np.median(values[usable])) if usable.any() else 0.0
    sums = np.concatenate([[0.0], np.cumsum(np.where(usable, values - level, 0.0))])
    counts = np.concatenate([[0], np.cumsum(usable)])
    here = np.arange(len(values))
    start = np.maximum(0, here - window // 2)
    end = np.minimum(len(values), here + window // 2 + 1)
    num = counts[end] - counts[start]
    mean = (sums[end] - sums[start]) / np.maximum(1, num) + level
    return np.where(num > 0, mean, math.nan)
