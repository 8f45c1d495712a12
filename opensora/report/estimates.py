"""`scores.json` as groups of estimates, however deep they are nested."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opensora.report.findings import Estimate, Scores, Target
from opensora.report.reading import finite, mapping
from opensora.report.series import LARGEST

MAX_DEPTH = 6
NESTING = " / "


def parse(path: Path, document: dict[str, Any]) -> Scores:
    """The groups, targets and remaining facts of a score file.

    An estimate is an object with 'mean'. `targets` mirrors the groups; a number there is to be
    reached, and {"min": ..., "max": ...} also bounds from above.
    """
    groups: dict[str, dict[str, Estimate]] = {}
    facts: dict[str, Any] = {}
    for name, node in document.items():
        if name == "targets":
            continue
        if not isinstance(node, dict) or not list(_estimates(node, (name,))):
            facts[name] = node
            continue
        for group, metric, estimate in _estimates(node, (name,)):
            groups.setdefault(group, {})[metric] = estimate
    targets = {
        (group, metric): target
        for group, metric, target in _targets(mapping(document.get("targets")), ())
    }
    return Scores(path, groups, targets, facts)


def _estimates(node: dict[str, Any], names: tuple[str, ...]) -> Iterator[tuple[str, str, Estimate]]:
    for key, value in node.items():
        if not isinstance(value, dict):
            continue
        if len(names) < MAX_DEPTH:
            yield from _estimates(value, (*names, key))
        estimate = _estimate(value)
        if estimate is not None:
            yield NESTING.join(names), key, estimate


def _estimate(parts: dict[str, Any]) -> Estimate | None:
    mean, low, high, n = (_usable(parts.get(name)) for name in ("mean", "low", "high", "n"))
    if mean is None:
        return None
    return Estimate(mean, low, high, None if n is None else int(n))


def _targets(node: dict[str, Any], names: tuple[str, ...]) -> Iterator[tuple[str, str, Target]]:
    for key, value in node.items():
        if isinstance(value, dict) and not value.keys() & {"min", "max"}:
            if len(names) < MAX_DEPTH:
                yield from _targets(value, (*names, key))
            continue
        bounds = value if isinstance(value, dict) else {"min": value}
        target = Target(_usable(bounds.get("min")), _usable(bounds.get("max")))
        if target != Target():
            yield NESTING.join(names), key, target


def _usable(value: Any) -> float | None:
    found = finite(value)
    return found if found is not None and abs(found) <= LARGEST else None
