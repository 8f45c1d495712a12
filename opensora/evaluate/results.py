"""What suites left on disk, read back: scores, and the values of every sample."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.errors import DataError, UsageError
from opensora.evaluate.arena import TRAINED_GROUPS
from opensora.evaluate.suite import SCORES_NAME, VALUES_NAME, Estimates, groups

Values = dict[tuple[str, str], dict[str, float]]
"""(group, sample) -> metric -> value."""


@dataclass(frozen=True)
class Result:
    """One `scores.json`.

    Attributes:
        path: the folder of it.
        suite: its name.
    """

    path: Path
    suite: str
    settings: dict[str, Any]
    groups: dict[str, Estimates]


def find(path: str | Path, suite: str | None = None) -> list[Path]:
    """The folders with scores that a path means: one itself, those of a run, or all below it.

    A checkpoint stands for its run, beside which `opensora eval` writes.

    Args:
        suite: only those in a folder of this name.
    """
    path = Path(path)
    if path.name == SCORES_NAME and path.is_file():
        path = path.parent
    if (path / SCORES_NAME).is_file():
        return [path]
    if path.name.startswith("step-"):
        path = path.parent
    if path.name == "checkpoints":
        path = path.parent
    if (path / "eval").is_dir():
        path = path / "eval"
    found = sorted(file.parent for file in path.rglob(SCORES_NAME)) if path.is_dir() else []
    return [folder for folder in found if suite is None or folder.name == suite]


def read(folder: Path) -> Result:
    """Read the scores in a folder.

    Raises:
        DataError: they are no scores of a suite.
    """
    path = folder / SCORES_NAME
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        settings = tree["settings"]
        return Result(folder, settings["suite"], settings, groups(tree))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = "it says no suite" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} holds no scores of a suite ({reason}): run `opensora eval`") from (
            None
        )


def only(path: str | Path, suite: str | None = None) -> Result:
    """The one result that a path means.

    Raises:
        UsageError: there are several, or none.
    """
    found = find(path, suite)
    if len(found) == 1:
        return read(found[0])
    if not found:
        wanted = f" of the suite '{suite}'" if suite else ""
        raise UsageError(f"{path} has no {SCORES_NAME}{wanted}: run `opensora eval` on it first")
    names = ", ".join(folder.name for folder in found)
    raise UsageError(f"{path} has the scores of {len(found)} suites ({names}): choose with --suite")


def values(result: Result) -> Values:
    """The values of every sample; the arena's lie in the records of its samples.

    Raises:
        DataError: there are none, or a line is damaged.
    """
    file = result.path / VALUES_NAME
    found: Values = {}
    if file.is_file():
        for line in _lines(file):
            found[line["group"], line["id"]] = line["values"]
    for folder in ("samples", "samples_untrained"):
        for line in _lines(result.path / folder / "samples.jsonl"):
            if "scores" in line:
                group = (
                    _trained_group(result, line["index"]) if folder == "samples" else "untrained"
                )
                found[group, f"{line['index']} {line['seed']} {line['prompt']}"] = line["scores"]
    if not found:
        raise DataError(f"{result.path} has no values of samples ({VALUES_NAME}): evaluate again")
    return found


def _trained_group(result: Result, index: int) -> str:
    """The group of the arena's `scores.json` that a video of the trained model counts in: its
    prompts are numbered from those with fewest objects on."""
    edge = 0
    counts = result.settings.get("num_prompts", {})
    for number, count in sorted((int(number), count) for number, count in counts.items()):
        edge += count
        if index < edge:
            return TRAINED_GROUPS[number]
    raise DataError(f"{result.path} has more samples than prompts in its settings: evaluate again")


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): evaluate again") from None
