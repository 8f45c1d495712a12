"""What a report is made of, as it was found under one folder. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opensora.report.reading import Notes
from opensora.report.series import Series

Tree = dict[str, Any]
MEDIA_SUFFIXES = (".mp4", ".webm", ".gif", ".png")

QUESTIONS = (
    "colour",
    "direction",
    "count",
    "shape",
    "binding",
    "motion",
    "relation",
    "camera",
    "reappearance",
    "speed",
    "size",
)
"""Scores of a sample that answer a yes-or-no question of its prompt, where 1 is right; the rest
(errors in px, stabilities) have no right and wrong. In the order in which they are shown."""


@dataclass(frozen=True)
class Sample:
    """One video or picture that a model made, or a clip that it learned from.

    Attributes:
        file: an existing or missing file; `None` seed, checkpoint and step are unknown.
        scores: name -> finite number.
        given: names of the files whose frames it was given.
    """

    file: Path
    prompt: str
    seed: int | None = None
    checkpoint: str = ""
    sampling: Tree = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    given: tuple[str, ...] = ()

    @property
    def answers(self) -> dict[str, float]:
        """The scores that have a right and a wrong, in the order of `QUESTIONS`."""
        return {name: self.scores[name] for name in QUESTIONS if name in self.scores}

    @property
    def is_right(self) -> bool | None:
        """Whether every answer is right; None where the sample was not judged."""
        return all(v >= 1 for v in self.answers.values()) if self.answers else None


@dataclass(frozen=True)
class Gallery:
    """A folder of samples."""

    path: Path
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A folder under a run's `checkpoints`: its size in bytes, or None where it is not complete."""

    name: str
    num_bytes: int | None


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        curves: kind of record ('train', 'validation') -> metric -> its values over steps.
        incidents: records of skipped steps; `num_incidents` counts those beyond the list too.
        samples: step -> what was drawn at it.
    """

    path: Path
    config: Tree
    environment: Tree
    curves: dict[str, dict[str, Series]]
    incidents: tuple[Tree, ...]
    num_incidents: int
    samples: dict[int, tuple[Sample, ...]]
    checkpoints: tuple[Checkpoint, ...]

    def curve(self, kind: str, name: str) -> Series | None:
        """The curve of one metric, or None where there is none with a finite value."""
        series = self.curves.get(kind, {}).get(name)
        return series if series is not None and len(series.finite) else None


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` videos with its interval; unknown parts are None."""

    mean: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Target:
    """What a mean should reach, or not exceed."""

    at_least: float | None = None
    at_most: float | None = None

    def met(self, value: float) -> bool:
        low = self.at_least is None or value >= self.at_least
        return low and (self.at_most is None or value <= self.at_most)


@dataclass(frozen=True)
class Scores:
    """A `scores.json`.

    Attributes:
        groups: 'trained', 'vae', 'trained_many / 2' ... -> metric -> estimate.
        targets: (group, metric) -> target.
        facts: whatever else the file says.
    """

    path: Path
    groups: dict[str, dict[str, Estimate]]
    targets: dict[tuple[str, str], Target]
    facts: Tree


@dataclass(frozen=True)
class Dataset:
    """A manifest: how many clips, of which sizes and rates, and some of them."""

    path: Path
    num_clips: int
    facts: dict[str, str]
    examples: tuple[Sample, ...]

    @property
    def folder_or_file(self) -> Path:
        """What people call it: the folder of a `manifest.csv`, or the table of another name."""
        return self.path.parent if self.path.stem == "manifest" else self.path


@dataclass(frozen=True)
class Findings:
    """Everything that was found under `root`."""

    root: Path
    runs: tuple[Run, ...]
    galleries: tuple[Gallery, ...]
    scores: tuple[Scores, ...]
    datasets: tuple[Dataset, ...]
    commands: tuple[Tree, ...]
    environment: Tree
    newest: float
    notes: Notes

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show, not even something that could not be read."""
        parts = (self.runs, self.galleries, self.scores, self.datasets, self.commands)
        return not any(parts) and not self.notes.entries
