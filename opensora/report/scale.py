"""From numbers to places and words: axes with round ticks, linear or logarithmic, and figures.

Pure functions; nothing here knows HTML.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LOG_RATIO = 12.0
"""Largest to smallest value from which an axis is logarithmic: a decade and a bit."""

TINIEST = 1e-30
"""Below this, differences and logarithms are not worth showing and their arithmetic underflows."""


@dataclass(frozen=True)
class Axis:
    """A range of values and the ticks on it.

    Attributes:
        low, high: values at the ends; low < high.
        ticks: values to label, rising, inside the range.
        log: whether equal ratios, rather than differences, are equally far.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def fraction(self, values: np.ndarray) -> np.ndarray:
        """Places on the axis, 0 at `low` and 1 at `high`; nan stays nan."""
        if self.log:
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.log(values / self.low) / math.log(self.high / self.low)
        return (values - self.low) / (self.high - self.low)


def fit_axis(values: np.ndarray, *, from_zero: bool = False) -> Axis:
    """The axis from tick to tick that shows all `values`, logarithmic where they span a decade.

    Args:
        values: finite, any number of them.
        from_zero: begin at 0, for quantities whose size matters more than their change.
    """
    if not len(values):
        return Axis(0.0, 1.0, (0.0, 0.5, 1.0))
    low, high = float(values.min()), float(values.max())
    if not from_zero and low > TINIEST and high / low >= LOG_RATIO:
        return _log_axis(low, high)
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
        high = 1.0 if low == high else high
    low, high = _apart(low, high)
    step = round_step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = _multiples(step, first, last)
    return Axis(ticks[0], ticks[-1], ticks)


def tight_axis(low: float, high: float) -> Axis:
    """A linear axis that ends exactly at `low` and `high`, with the round ticks between them."""
    low, high = _apart(low, high)
    step = round_step((high - low) / 5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, _multiples(step, first, last))


def round_step(length: float) -> float:
    """The smallest of 1, 2, 2.5, 5, 10 times a power of ten that is no less than `length` > 0."""
    power = 10.0 ** math.floor(math.log10(length))
    return power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= length * (1 - 1e-9))


def _apart(low: float, high: float) -> tuple[float, float]:
    """The ends of a range that is wide enough to divide by."""
    if high - low > max(TINIEST, 1e-9 * max(abs(low), abs(high))):
        return low, high
    room = 0.5 * max(abs(high), abs(low)) or 0.5
    return low - max(room, TINIEST), high + max(room, TINIEST)


def _multiples(step: float, first: int, last: int) -> tuple[float, ...]:
    decimals = 12 - math.floor(math.log10(step))
    return tuple(round(i * step, decimals) for i in range(first, last + 1))


def _log_axis(low: float, high: float) -> Axis:
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    few = math.log10(high / low) <= 2.5
    marks = [m * 10.0**d for d in decades for m in ((1, 2, 5) if few else (1,))]
    start = max((m for m in marks if m <= low * 1.001), default=low)
    end = min((m for m in marks if m >= high * 0.999), default=high)
    ticks = [m for m in marks if start <= m <= end]
    stride = math.ceil(len(ticks) / 7)
    return Axis(start, end, tuple(ticks[::stride]), log=True)


def figure(value: float | None, digits: int = 3, *, unit: str = "") -> str:
    """A number for people: `digits` significant digits, thousands as k, M, G, T.

    0.0312 -> '0.0312', 12345 -> '12.3k', 0.00001 -> '1e-05', None -> '–'. With a unit, the
    prefix goes to it: (1.31e11, unit='FLOP/s') -> '131 GFLOP/s'.
    """
    if unit and value is not None:
        text = figure(value, digits)
        digits_only = text.rstrip("kMGT")
        return f"{digits_only} {text[len(digits_only) :]}{unit}"
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "nan" if value != value else ("∞" if value > 0 else "−∞")
    size = abs(value)
    if size and size < 1e-3:
        return f"{value:.{digits - 1}g}".replace("-", "−", 1 if value < 0 else 0)
    for large, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= large * (1 - 0.5 * 10.0**-digits):  # what would be rounded up to it
            return _significant(value / large, digits) + prefix
    return _significant(value, digits)


def labels(ticks: Sequence[float]) -> list[str]:
    """The ticks of an axis with as many digits as none of them needs to be rounded at."""
    for digits in range(3, 12):
        shortened = (float(f"{tick:.{digits}g}") for tick in ticks)
        if all(math.isclose(s, t, rel_tol=1e-11) for s, t in zip(shortened, ticks, strict=True)):
            return [figure(tick, digits) for tick in ticks]
    return [figure(tick, 12) for tick in ticks]


def duration(seconds: float | None) -> str:
    """Seconds for people: '41 s', '12 min 20 s', '3 h 05 min', '2 d 4 h'."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if 0 < seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour} h"
    if hours:
        return f"{hours} h {minute:02d} min"
    return f"{minutes} min {second:02d} s" if minutes else f"{whole} s"


def size(num_bytes: float | None) -> str:
    """Bytes for people: '812 B', '1.4 MiB'."""
    if num_bytes is None or not math.isfinite(num_bytes):
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1023.5:
            return f"{_significant(num_bytes, 3)} {unit}"
        num_bytes /= 1024
    return f"{_significant(num_bytes, 3)} TiB"


def _significant(value: float, digits: int) -> str:
    """A number of ordinary size with `digits` significant digits and no trailing zeros."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", "−")
