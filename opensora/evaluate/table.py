"""One row a checkpoint: the scores that lie in many folders, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.errors import UsageError
from opensora.evaluate.results import Result, find, read

LEADING = ("trained", "generated", "vae", "all")
"""Groups that speak of the checkpoint itself; the others are controls."""


@dataclass(frozen=True)
class Table:
    """Rows of estimates.

    Attributes:
        columns: (suite, group, metric).
        rows: (name, what it has of the columns: {mean, low, high, n}).
    """

    columns: tuple[tuple[str, str, str], ...]
    rows: tuple[tuple[str, dict[tuple[str, str, str], dict[str, float]]], ...]


def tabulate(
    folders: Sequence[str | Path],
    *,
    suite: str | None = None,
    metrics: Sequence[str] = (),
    controls: bool = False,
) -> Table:
    """Gather the scores under folders.

    Args:
        suite: only of this one.
        metrics: only these, in this order.
        controls: also the groups that are no checkpoint's own.

    Raises:
        UsageError: a folder has none, or none of them has the metrics.
        DataError: a score file is damaged.
    """
    rows: dict[str, dict[tuple[str, str, str], dict[str, float]]] = {}
    for folder in folders:
        found = [read(path) for path in find(folder)]
        found = [result for result in found if suite is None or result.suite == suite]
        if not found:
            wanted = f" of the suite '{suite}'" if suite else ""
            raise UsageError(
                f"{folder} has no scores.json{wanted}: run `opensora eval` on it first"
            )
        for result in found:
            rows.setdefault(_name(result), {}).update(_cells(result, metrics, controls))
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    if metrics:
        columns.sort(key=lambda column: metrics.index(column[2]))
    if not columns:
        raise UsageError(f"no result has the metrics {', '.join(metrics) or 'of a checkpoint'}")
    return Table(tuple(columns), tuple(rows.items()))


def text(table: Table) -> str:
    """Aligned columns for a terminal."""
    cells = _strings(table)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])  # noqa: B905
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown(table: Table) -> str:
    """A table of GitHub's markdown."""
    head, *body = [
        "| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in _strings(table)
    ]
    rule = "|---|" + "---:|" * len(table.columns)
    return "\n".join([head, rule, *body])


def as_json(table: Table) -> str:
    """Rows with every estimate in full."""
    tree = [
        {"name": name, "scores": {" ".join(column): cell for column, cell in cells.items()}}
        for name, cells in table.rows
    ]
    return json.dumps(tree, indent=1, ensure_ascii=False)


FORMATS: dict[str, Any] = {"text": text, "markdown": markdown, "json": as_json}


def _strings(table: Table) -> list[list[str]]:
    suites = {suite for suite, _, _ in table.columns}
    leading = {group for _, group, _ in table.columns}

    def title(column: tuple[str, str, str]) -> str:
        suite, group, metric = column
        parts = [suite if len(suites) > 1 else "", group if len(leading) > 1 else "", metric]
        return " ".join(part for part in parts if part)

    rows = [["", *map(title, table.columns)]]
    for name, cells in table.rows:
        rows.append([name, *(_figure(cells.get(column)) for column in table.columns)])
    return rows


def _figure(cell: dict[str, float] | None) -> str:
    if cell is None:
        return "-"
    return f"{cell['mean']:.4g} [{cell['low']:.4g}, {cell['high']:.4g}]"


def _name(result: Result) -> str:
    """What a row is called: the run, or the folder that was judged."""
    parts = result.path.parts
    if len(parts) > 2 and parts[-2] == "eval":
        return str(result.path.parent.parent)
    return str(result.path)


def _cells(
    result: Result, metrics: Sequence[str], controls: bool
) -> dict[tuple[str, str, str], dict[str, float]]:
    names = list(result.groups)
    if not controls:
        names = [name for name in names if name in LEADING] or names
        if result.suite == "arena":
            names = [name for name in names if name.startswith("trained")]
    return {
        (result.suite, group, metric): cell
        for group in names
        for metric, cell in result.groups[group].items()
        if not metrics or metric in metrics
    }
