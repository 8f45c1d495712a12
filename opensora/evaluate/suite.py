"""What a suite of evaluation is: something to judge, settings, and scores that are written down.

`scores.json` is what every suite leaves: group -> metric -> {mean, low, high, n} with 95 %
bootstrap intervals, beside `targets` and `settings`, which are no groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.config import Config
from opensora.errors import UsageError
from opensora.infer.pipeline import VideoPipeline
from opensora.runtime import ALONE, Runtime

Progress = Callable[[str, int, int], None]
Results = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What is judged: a model that draws, or a folder of videos that are there already.

    Attributes:
        pipeline: None where finished videos are judged.
        videos: a folder of them; None where the pipeline draws.
        fresh: makes the same architecture with weights as they were before training.
        place: ranks share the drawing where a suite allows it.
    """

    pipeline: VideoPipeline | None = None
    videos: Path | None = None
    fresh: Callable[[], VideoPipeline] | None = None
    place: Runtime = ALONE

    @property
    def model(self) -> VideoPipeline:
        """The pipeline.

        Raises:
            UsageError: a folder of videos was given.
        """
        if self.pipeline is None:
            raise UsageError(f"this suite draws its videos: give a checkpoint, not {self.videos}")
        return self.pipeline


@dataclass(frozen=True)
class Suite:
    """One line of the table of suites.

    Attributes:
        config: its settings, each with a default.
        run: (subject, config, output folder, progress) -> what it wrote to `scores.json`.
        columns: metrics that the printed table shows, in order; none shows all.
    """

    config: type[Config]
    run: Callable[[Subject, Any, Path, Progress], Results]
    columns: tuple[str, ...] = ()


def groups(results: Results) -> dict[str, dict[str, dict[str, float]]]:
    """The groups of metrics in what a suite found."""
    return {name: group for name, group in results.items() if name not in ("targets", "settings")}
