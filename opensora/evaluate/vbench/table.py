"""Checkpoints side by side: rows of several runs, with published models as anchors.

Percentages, as papers print them. What a run does not have is '-'; no total is made up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.errors import DataError
from opensora.evaluate.vbench import aggregate
from opensora.evaluate.vbench.prompts import Version
from opensora.evaluate.vbench.published import PUBLISHED, raw_of

SUITES: dict[str, Version] = {"vbench": "v1", "vbench-i2v": "i2v"}


@dataclass(frozen=True)
class Line:
    """One run.

    Attributes:
        scores: total or dimension -> score between 0 and 1, as far as it is there.
        notes: the warnings of the run.
    """

    name: str
    scores: dict[str, float]
    notes: tuple[str, ...] = ()


def read(folder: str | Path) -> tuple[Version, Line]:
    """A run of a suite of this room, from its `scores.json`.

    Raises:
        DataError: there is none, or it is of another suite.
    """
    path = Path(folder) / "scores.json"
    try:
        tree: Any = json.loads(path.read_text(encoding="utf-8"))
        settings: Mapping[str, Any] = tree["settings"]
        version = SUITES[settings["suite"]]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    except (KeyError, TypeError):
        raise DataError(f"{path} was not written by vbench or vbench-i2v") from None
    found = {name: value["mean"] for name, value in tree.get("vbench", {}).items()}
    return version, Line(
        str(folder), aggregate.totals(found, version) | found, tuple(settings["warnings"])
    )


def published() -> list[Line]:
    """The published models of v1, with the totals that their dimensions give."""
    return [Line(name, aggregate.totals(raw_of(name)) | raw_of(name)) for name in PUBLISHED]


def columns(version: Version) -> list[str]:
    """Total first, then each part of it and its dimensions."""
    parts = aggregate.PARTS[version]
    return ["total", *parts, *(name for scales, _ in parts.values() for name in scales)]


def markdown(folders: Sequence[str | Path], *, anchors: bool = True) -> str:
    """A Markdown table, a row a score and a column a run: sixteen columns would fit no page.

    Args:
        folders: outputs of one suite.
        anchors: with the published models, which exist for v1.

    Raises:
        DataError: a folder has no scores, or the runs are of two suites.
    """
    runs = [read(folder) for folder in folders]
    versions: set[Version] = {version for version, _ in runs} or {"v1"}
    if len(versions) > 1:
        raise DataError("runs of vbench and of vbench-i2v do not fit in one table")
    version = versions.pop()
    lines = [line for _, line in runs] + (published() if anchors and version == "v1" else [])
    head = ["", *(line.name for line in lines)]
    rows = [head, ["---"] * len(head)]
    for name in columns(version):
        cells = [f"{100 * one.scores[name]:.2f}" if name in one.scores else "-" for one in lines]
        rows.append([name, *cells])
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    notes = [f"{line.name}: {note}" for line in lines for note in line.notes]
    return "\n".join([text, "", *notes]).rstrip() + "\n"
