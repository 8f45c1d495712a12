"""Is one checkpoint better than another? Both met the same samples, so differences are paired.

The interval is a percentile bootstrap over the paired differences; the p-value a sign-flip
permutation test of their mean (Fisher 1935; Good, Permutation Tests, 2000, section 3.2). The
shared part of each sample's difficulty cancels, which two intervals side by side do not show.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from opensora.errors import DataError, UsageError
from opensora.evaluate.results import Result, Values, values

RESAMPLES = 10_000
_EXACT = 14
"""Differences up to which all sign patterns are tried rather than drawn."""

_FREE = (
    *("weights", "batch_size", "name"),
    *("videos", "warnings", "skipped", "missing", "unusable"),
)
"""Settings that may differ: what is compared, what changes no value, and what was found."""

SMALLER_IS_BETTER = (
    *("loss", "mse", "mmd", "fvd", "rfvd", "lpips", "flicker", "flicker_added"),
    *("newton_residual", "momentum_error", "energy_error", "reappearance_error", "area_variation"),
)
"""Metrics, or their beginnings before '_', whose smaller values are better."""


@dataclass(frozen=True)
class Difference:
    """B against A on one metric of one group.

    Attributes:
        first, second: means of A and of B over the `n` samples that both have.
        mean, low, high: of B - A, with its 95 % interval.
        p: two-sided, of no difference.
        verdict: 'A better', 'B better', or that n samples show no difference.
    """

    group: str
    metric: str
    n: int
    first: float
    second: float
    mean: float
    low: float
    high: float
    p: float
    verdict: str


def compare(a: Result, b: Result, *, seed: int = 0) -> list[Difference]:
    """Every metric that samples of both have, group by group.

    Raises:
        UsageError: the suites or their settings differ, or no sample is in both.
        DataError: a result has no values of samples, or one that is no number.
    """
    check_same(a, b)
    first, second = values(a), values(b)
    _check_samples(first, second, a, b)
    found = []
    for group in dict.fromkeys(group for group, _ in first):
        shared = [key for key in first if key[0] == group and key in second]
        metrics = dict.fromkeys(m for key in shared for m in first[key] if m in second[key])
        for metric in metrics:
            keys = [k for k in shared if metric in first[k] and metric in second[k]]
            pairs = np.array([[first[k][metric], second[k][metric]] for k in keys], float)
            if not np.isfinite(pairs).all():
                row, side = np.argwhere(~np.isfinite(pairs))[0]
                raise DataError(
                    f"{metric} of '{' '.join(keys[row])}' in {(a, b)[side].path} is "
                    f"{pairs[row, side]}: a model that gives no numbers cannot be compared"
                )
            found.append(_difference(group, metric, pairs, seed))
    return found


def check_same(a: Result, b: Result) -> None:
    """Refuse results that were not made in the same way.

    Raises:
        UsageError: naming the differing keys.
    """
    if a.suite != b.suite:
        raise UsageError(f"{a.path} is of the suite '{a.suite}', {b.path} of '{b.suite}'")
    mine, theirs = ({k: v for k, v in r.settings.items() if k not in _FREE} for r in (a, b))
    differing = sorted(_differing(mine, theirs, ""))
    if differing:
        raise UsageError(
            f"{a.path} and {b.path} were not made alike: {', '.join(differing[:6])} differ; "
            "evaluate both with the same settings"
        )


def paired_bootstrap(differences: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of (n,) differences, by resampling samples."""
    chance = np.random.Generator(np.random.Philox(key=seed))
    means = [
        differences[chance.integers(0, len(differences), (block, len(differences)))].mean(1)
        for block in _blocks(RESAMPLES, len(differences))
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def sign_flip(differences: np.ndarray, *, seed: int = 0) -> float:
    """Two-sided p-value of a mean of zero: how often signs at random make it as far from zero.

    All 2^n sign patterns where n <= 14; else 10,000 at random, with the pattern that was seen
    counted among them, so that it is never 0 (Phipson and Smyth 2010).
    """
    n = len(differences)
    seen = abs(differences.mean())
    tie = 1e-12 * np.abs(differences).max(initial=0.0)  # the same sum in another order of addition
    if n <= _EXACT:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs((signs * differences).mean(1)) >= seen - tie).mean())
    chance, far = np.random.Generator(np.random.Philox(key=seed + 1)), 0
    for block in _blocks(RESAMPLES, n):
        signs = 1 - 2 * chance.integers(0, 2, (block, n))
        far += int((np.abs((signs * differences).mean(1)) >= seen - tie).sum())
    return (far + 1) / (RESAMPLES + 1)


def smaller_is_better(metric: str) -> bool:
    """Whether a metric is an error or a distance."""
    return metric in SMALLER_IS_BETTER or metric.split("_")[0] in SMALLER_IS_BETTER


def text(a: Result, b: Result, differences: list[Difference]) -> str:
    """The comparison for a terminal."""
    lines = [f"A  {a.path}", f"B  {b.path}", ""]
    head = f"{'':32}{'A':>10}{'B':>10}{'B - A':>10}  {'95 % interval':>20}{'p':>8}{'n':>6}"
    lines.append(head)
    for d in differences:
        interval = f"[{d.low:.4g}, {d.high:.4g}]"
        figures = f"{d.first:>10.4g}{d.second:>10.4g}{d.mean:>+10.3g}  {interval:>20}"
        lines.append(f"{d.group + ' ' + d.metric:32}{figures}{d.p:>8.3f}{d.n:>6}  {d.verdict}")
    return "\n".join(lines)


def as_json(a: Result, b: Result, differences: list[Difference]) -> str:
    """The comparison as JSON."""
    tree = {"a": str(a.path), "b": str(b.path), "suite": a.suite}
    return json.dumps({**tree, "differences": [asdict(d) for d in differences]}, indent=1)


def _difference(group: str, metric: str, pairs: np.ndarray, seed: int) -> Difference:
    differences = pairs[:, 1] - pairs[:, 0]
    low, high = paired_bootstrap(differences, seed=seed)
    p, mean, n = sign_flip(differences, seed=seed), float(differences.mean()), len(differences)
    verdict = f"no difference that n={n} can show"
    if p < 0.05 and (low > 0 or high < 0):
        verdict = "B better" if (mean < 0) == smaller_is_better(metric) else "A better"
    first, second = pairs.mean(0).tolist()
    return Difference(group, metric, n, first, second, mean, low, high, p, verdict)


def _check_samples(first: Values, second: Values, a: Result, b: Result) -> None:
    groups = {group for group, _ in first} & {group for group, _ in second}
    strangers = [key for key in {*first} ^ {*second} if key[0] in groups]
    if strangers or not groups:
        example = f", such as {' '.join(min(strangers))}" if strangers else ""
        raise UsageError(
            f"{a.path} and {b.path} do not hold the same samples ({len(strangers)} are in one of "
            f"them only{example}): evaluate both with the same settings"
        )


def _differing(first: Any, second: Any, path: str) -> list[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        keys = {*first, *second}
        nested = (_differing(first.get(k), second.get(k), f"{path}.{k}".lstrip(".")) for k in keys)
        return [key for part in nested for key in part]
    return [] if first == second else [path]


def _blocks(total: int, width: int) -> list[int]:
    """Sizes that add up to `total`, each of at most 4 million numbers of `width` a row."""
    size = max(1, min(total, 4_000_000 // max(1, width)))
    return [min(size, total - begin) for begin in range(0, total, size)]
