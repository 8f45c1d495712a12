"""Videos to rows of measures: each is decoded once, by one rank, for all of its dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opensora.errors import DataError
from opensora.evaluate.vbench import proxies
from opensora.evaluate.vbench.dimensions import Dimension, Footage
from opensora.evaluate.vbench.measures import Measured
from opensora.evaluate.vbench.prompts import Entry
from opensora.evaluate.vbench.tools import Tools
from opensora.evaluate.vbench.videos import Video
from opensora.media.read import read_clip
from opensora.runtime import Runtime

MOTION, SMOOTHNESS = "proxy.motion", "proxy.smoothness"


@dataclass(frozen=True)
class Task:
    """One video in one dimension; `about` is what its prompt's entry says about the dimension."""

    video: Video
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """What one video has in one dimension."""

    video: Video
    measured: Measured


@dataclass(frozen=True)
class Judgement:
    """What was measured.

    Attributes:
        rows: dimension (or proxy) -> rows in the order of its tasks.
        unusable: (file, dimension or '' for all of them, reason).
    """

    rows: dict[str, list[Row]]
    unusable: list[tuple[str, str, str]]


def tasks_of(
    entries: Sequence[Entry],
    dimensions: Sequence[str],
    videos: Mapping[str, Sequence[Video]],
    samples: int,
) -> dict[str, list[Task]]:
    """Dimension -> its videos, in the order of the entries; the first `samples` of each prompt."""
    return {
        dimension: [
            Task(video, entry.about.get(dimension, {}))
            for entry in entries
            if dimension in entry.dimensions
            for video in videos.get(entry.prompt, ())
            if video.sample is None or video.sample < samples
        ]
        for dimension in dimensions
    }


def measure(
    tasks: Mapping[str, Sequence[Task]],
    table: Mapping[str, Dimension],
    tools: Tools,
    place: Runtime,
    progress: Callable[[int, int], None],
    *,
    with_proxies: bool,
) -> Judgement:
    """Measure every task of the dimensions that are measured here; ranks share the videos.

    A video that cannot be read, or not in one dimension, is named and left out of the mean.
    """
    plan: dict[Path, list[tuple[str, int, Task]]] = {}
    for dimension, of_dimension in tasks.items():
        for order, task in enumerate(of_dimension):
            plan.setdefault(task.video.path, []).append((dimension, order, task))
    mine = list(plan.items())[place.rank :: place.world_size]
    found: list[tuple[str, int, Row]] = []
    unusable: list[tuple[str, str, str]] = []
    for number, (path, wanted) in enumerate(mine):
        try:
            clip = read_clip(path)
        except DataError as error:
            unusable.append((path.name, "", str(error)))
        else:
            footage = Footage(clip.frames, clip.fps, {})
            for dimension, order, task in wanted:
                if dimension not in table:
                    continue
                try:
                    one = _measured(table[dimension], footage, task, tools)
                    found.append((dimension, order, Row(task.video, one)))
                except DataError as error:
                    unusable.append((path.name, dimension, str(error)))
            if with_proxies:
                rank_order = number * place.world_size + place.rank
                found += _proxies(footage, wanted[0][2].video, rank_order)
        progress(number + 1, len(mine))
    gathered = place.gather_objects((found, unusable))
    everything = [one for part, _ in gathered for one in part]
    rows: dict[str, list[Row]] = {}
    for dimension, _, row in sorted(everything, key=lambda one: one[:2]):
        rows.setdefault(dimension, []).append(row)
    return Judgement(rows, [one for _, part in gathered for one in part])


def _measured(dimension: Dimension, footage: Footage, task: Task, tools: Tools) -> Measured:
    assert dimension.measure is not None, "only dimensions that are measured here are given"
    return dimension.measure(Footage(footage.frames, footage.fps, task.about), tools)


def _proxies(footage: Footage, video: Video, order: int) -> list[tuple[str, int, Row]]:
    """Measures without weights; a single picture has none."""
    if len(footage.frames) < 2:
        return []
    rows = [(MOTION, order, Row(video, Measured(proxies.motion(footage.frames))))]
    smooth = proxies.smoothness(footage.frames)
    if smooth is not None:
        rows.append((SMOOTHNESS, order, Row(video, Measured(smooth))))
    return rows
