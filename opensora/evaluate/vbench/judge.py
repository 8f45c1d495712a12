"""Videos to rows of measures: each is decoded once, by one rank, for all of its dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opensora.errors import DataError
from opensora.evaluate.vbench import proxies
from opensora.evaluate.vbench.dimensions import Dimension, Footage
from opensora.evaluate.vbench.ledger import Ledger
from opensora.evaluate.vbench.measures import Measured
from opensora.evaluate.vbench.prompts import Entry
from opensora.evaluate.vbench.tools import Tools
from opensora.evaluate.vbench.videos import Video
from opensora.media.read import read_clip
from opensora.runtime import Runtime
from opensora.types import Clip

MOTION, SMOOTHNESS = "proxy.motion", "proxy.smoothness"
PROXIES = {MOTION: proxies.motion, SMOOTHNESS: proxies.smoothness}
LENGTH = "seconds"
"""What is written down of every video besides, because long ones belong to another benchmark."""

Progress = Callable[[int, int], None]


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
        rows: dimension (or proxy, or LENGTH) -> rows in the order of its tasks.
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


class Judge:
    """Measures videos, unless the ledger has what is asked."""

    def __init__(
        self, table: Mapping[str, Dimension], tools: Tools, ledger: Ledger, *, with_proxies: bool
    ):
        self.table, self.tools, self.ledger = table, tools, ledger
        self.proxies = PROXIES if with_proxies else {}

    def judge(
        self, tasks: Mapping[str, Sequence[Task]], place: Runtime, progress: Progress
    ) -> Judgement:
        """Every task of the dimensions that are measured here; ranks share the videos.

        A video that cannot be read, or not in one dimension, is named and left out of the mean.
        """
        plan: dict[Path, list[tuple[str, int, Task]]] = {}
        for dimension, of_dimension in tasks.items():
            for order, task in enumerate(of_dimension):
                plan.setdefault(task.video.path, []).append((dimension, order, task))
        mine = list(enumerate(plan.values()))[place.rank :: place.world_size]
        found: list[tuple[str, int, Row]] = []
        unusable: list[tuple[str, str, str]] = []
        for number, (order, wanted) in enumerate(mine):
            about = [(name, order, Task(wanted[0][2].video)) for name in (LENGTH, *self.proxies)]
            asked = [*about, *(one for one in wanted if one[0] in self.table)]
            try:
                self._video(asked, found, unusable)
            except DataError as error:
                unusable.append((wanted[0][2].video.path.name, "", str(error)))
            progress(number + 1, len(mine))
        gathered = place.gather_objects((found, unusable))
        rows: dict[str, list[Row]] = {}
        for name, _, row in sorted((one for part, _ in gathered for one in part), key=_place):
            rows.setdefault(name, []).append(row)
        return Judgement(rows, [one for _, part in gathered for one in part])

    def _video(
        self,
        asked: Sequence[tuple[str, int, Task]],
        found: list[tuple[str, int, Row]],
        unusable: list[tuple[str, str, str]],
    ) -> None:
        """All measures of one video, which is decoded when one of them is new."""
        clip: Clip | None = None
        for name, order, task in asked:
            path = task.video.path
            try:
                key = self._key(name, task)
                measured = self.ledger.get(key)
                if measured is None:
                    clip = clip or read_clip(path)
                    measured = self._measure(name, clip, task)
                    self.ledger.put(key, measured)
            except DataError as error:
                if clip is None:
                    raise
                if name not in self.proxies:  # a proxy that does not apply is no loss
                    unusable.append((path.name, name, str(error)))
            else:
                found.append((name, order, Row(task.video, measured)))

    def _key(self, name: str, task: Task) -> str:
        weights = self.table[name].weights if name in self.table else ()
        return self.ledger.key(task.video.path, name, weights, task.about)

    def _measure(self, name: str, clip: Clip, task: Task) -> Measured:
        if name == LENGTH:
            return Measured(len(clip.frames) / clip.fps)
        if name in self.proxies:
            return Measured(self.proxies[name](clip.frames))
        measure = self.table[name].measure
        assert measure is not None, "only dimensions that are measured here are given"
        return measure(Footage(clip.frames, clip.fps, task.about), self.tools)


def _place(one: tuple[str, int, Row]) -> tuple[str, int]:
    return one[:2]
