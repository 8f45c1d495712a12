"""What a suite of evaluation is: something to judge, settings, and scores that are written down.

`scores.json` is what every suite leaves: group -> metric -> {mean, low, high, n} with 95 %
bootstrap intervals, beside `targets`, `settings` and `curves`, which are no groups. `values.jsonl`
beside it has the values of every sample, so that two results can be compared pair by pair. Where
a value is no finite number, neither is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from opensora.arena.score import aggregate
from opensora.config import Config
from opensora.disk import replace_file
from opensora.errors import NumericsError, UsageError
from opensora.infer.pipeline import Shape, VideoPipeline
from opensora.runtime import ALONE, Runtime
from opensora.vae.causal import CausalVAE

Found = TypeVar("Found")
Progress = Callable[[str, int, int], None]
Results = dict[str, Any]
Estimates = dict[str, dict[str, float]]

SCORES_NAME = "scores.json"
VALUES_NAME = "values.jsonl"
NO_GROUPS = ("targets", "settings", "curves")
"""Keys of `scores.json` that hold no group of metrics."""


@dataclass(frozen=True)
class Autoencoder:
    """A VAE by itself.

    Attributes:
        shape: what it was trained on.
        fingerprint: digest of its weights.
    """

    vae: CausalVAE
    shape: Shape
    fingerprint: str


@dataclass(frozen=True)
class Subject:
    """What is judged: a model that draws, a VAE, or a folder of videos that are there already.

    Attributes:
        pipeline: None where finished videos are judged, or a VAE.
        videos: a folder of them; None where the pipeline draws.
        fresh: makes the same architecture with weights as they were before training.
        place: its ranks share the drawing and the judging; the first one writes.
        alone: the VAE of a checkpoint of the task autoencoder.
    """

    pipeline: VideoPipeline | None = None
    videos: Path | None = None
    fresh: Callable[[], VideoPipeline] | None = None
    place: Runtime = ALONE
    alone: Autoencoder | None = None

    @property
    def model(self) -> VideoPipeline:
        """The pipeline.

        Raises:
            UsageError: a folder of videos was given, or a checkpoint that draws nothing.
        """
        if self.pipeline is None:
            given = "one of a VAE alone" if self.alone else str(self.videos)
            raise UsageError(
                f"this suite draws its videos: give a checkpoint of the task text_to_video, not "
                f"{given}"
            )
        return self.pipeline

    @property
    def autoencoder(self) -> Autoencoder:
        """The VAE, by itself or of the pipeline.

        Raises:
            UsageError: a folder of videos was given.
        """
        if self.alone is not None:
            return self.alone
        if self.pipeline is None:
            raise UsageError(f"this suite judges a VAE: give a checkpoint, not {self.videos}")
        return Autoencoder(self.pipeline.vae, self.pipeline.shape, self.pipeline.fingerprint)


@dataclass(frozen=True)
class Suite:
    """One line of the table of suites.

    Attributes:
        config: its settings, each with a default.
        run: (subject, config, output folder, progress) -> what the first rank wrote to
            `scores.json`; the others may return {}.
        columns: metrics that the printed table shows, in order; none shows all.
    """

    config: type[Config]
    run: Callable[[Subject, Any, Path, Progress], Results]
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """The values of one sample; `sample` names it within its group, the same in every run."""

    group: str
    sample: str
    values: Mapping[str, float]


def groups(results: Results) -> dict[str, dict[str, dict[str, float]]]:
    """The groups of metrics in what a suite found."""
    return {name: group for name, group in results.items() if name not in NO_GROUPS}


def write(
    output: Path,
    rows: Sequence[Row],
    *,
    settings: Mapping[str, Any],
    estimates: Mapping[str, Estimates] | None = None,
    curves: Mapping[str, Any] | None = None,
) -> Results:
    """Write `values.jsonl` and then `scores.json`.

    Args:
        rows: whose means with bootstrap intervals become the groups, in the order of their names.
        settings: the suite, the digest of the weights, and whatever the numbers depend on (JSON).
        estimates: groups -> metrics that are no means over samples; added to those of the rows.
        curves: whatever else a reader should see.

    Returns:
        What `scores.json` holds.

    Raises:
        NumericsError: a value is no finite number; nothing was written.
    """
    check_finite(rows, estimates)
    found: dict[str, Any] = {}
    for name in dict.fromkeys(row.group for row in rows):
        found[name] = aggregate([row.values for row in rows if row.group == name])
    for name, group in (estimates or {}).items():
        found[name] = {**found.get(name, {}), **group}
    results: Results = {**found, **({"curves": dict(curves)} if curves else {})}
    results["settings"] = dict(settings)
    write_values(output, rows)
    return write_scores(output, results)


def write_values(output: Path, rows: Sequence[Row]) -> None:
    """Write `values.jsonl`."""
    trees = [{"group": r.group, "id": r.sample, "values": dict(r.values)} for r in rows]
    lines = [json.dumps(tree, ensure_ascii=False, allow_nan=False) + "\n" for tree in trees]
    output.mkdir(parents=True, exist_ok=True)
    replace_file(output / VALUES_NAME, "".join(lines).encode())


def write_scores(output: Path, results: Mapping[str, Any]) -> Results:
    """Write `scores.json`, and give back what it holds."""
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    output.mkdir(parents=True, exist_ok=True)
    replace_file(output / SCORES_NAME, text.encode())
    return json.loads(text)


def check_finite(rows: Sequence[Row], estimates: Mapping[str, Estimates] | None = None) -> None:
    """Refuse what neither JSON nor a mean has a place for.

    Raises:
        NumericsError: a value is no finite number; names its group, metric and first sample.
    """
    values: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for row in rows:
        for metric, value in row.values.items():
            values.setdefault((row.group, metric), []).append((row.sample, value))
    for (group, metric), of in values.items():
        broken = [(sample, value) for sample, value in of if not math.isfinite(value)]
        if broken:
            sample, value = broken[0]
            told = f"no finite number for {len(broken)} of {len(of)} samples"
            _refuse(group, metric, f"{told}, the first '{sample}' ({value})")
    for group, metrics in (estimates or {}).items():
        for metric, estimate in metrics.items():
            if not all(map(math.isfinite, estimate.values())):
                _refuse(group, metric, f"no finite number ({estimate})")


def _refuse(group: str, metric: str, told: str) -> NoReturn:
    raise NumericsError(
        f"{metric} of group '{group}' is {told}; {SCORES_NAME} was not written. The model "
        "has diverged, or weights are damaged: judge an earlier checkpoint"
    )


def shared(
    place: Runtime, count: int, work: Callable[[int], Found], progress: Callable[[int, int], None]
) -> list[Found]:
    """work(0), ..., work(count - 1), in this order on every rank; ranks share the calls.

    Args:
        work: gives something that can be pickled, whichever rank calls it.
        progress: called with (done, total) of this rank.
    """
    mine = range(place.rank, count, place.world_size)
    found = []
    for done, index in enumerate(mine, 1):
        found.append(work(index))
        progress(done, len(mine))
    parts = place.gather_objects(found)
    return [parts[i % place.world_size][i // place.world_size] for i in range(count)]
