"""What a run leaves: upstream's two JSON files, and the groups of our scores with intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opensora.disk import replace_file
from opensora.evaluate import suite
from opensora.evaluate.vbench import aggregate
from opensora.evaluate.vbench.judge import Row
from opensora.evaluate.vbench.measures import mean
from opensora.evaluate.vbench.prompts import Entry, Version
from opensora.evaluate.vbench.upstream import Delegated
from opensora.evaluate.vbench.videos import Video

RESAMPLES = 2000

Finding = Delegated | Sequence[Row]
"""Of a dimension: measured here, or by upstream."""


def overall(finding: Finding) -> float:
    """The raw score of a dimension."""
    if isinstance(finding, Delegated):
        return finding.overall
    return mean([row.measured for row in finding])


def upstream_shape(findings: Mapping[str, Finding]) -> dict[str, list[Any]]:
    """{dimension: [overall, [{"video_path", "video_results"}, ...]]}, as VBench writes it."""
    shaped: dict[str, list[Any]] = {}
    for name, finding in findings.items():
        if isinstance(finding, Delegated):
            rows = finding.videos
        else:
            rows = [
                {
                    "video_path": str(row.video.path),
                    "video_results": bool(row.measured.value)
                    if name == "dynamic_degree"
                    else row.measured.value,
                }
                for row in finding
            ]
        shaped[name] = [overall(finding), rows]
    return shaped


def full_info(entries: Sequence[Entry], videos: Mapping[int, Sequence[Video]]) -> list[Any]:
    """The prompt file's entries with the videos of each, as upstream's functions read them.

    Args:
        videos: index of an entry -> its videos.
    """
    return [
        {**entry.raw, "video_list": [str(video.path) for video in videos.get(entry.index, ())]}
        for entry in entries
    ]


def write_json(path: Path, tree: Any) -> None:
    """A JSON file, whole or not at all, indented as upstream does it."""
    text = json.dumps(tree, indent=4, ensure_ascii=False, allow_nan=False) + "\n"
    replace_file(path, text.encode())


def resampled(finding: Finding, name: str) -> np.ndarray:
    """Means of resamples of the videos, float64 (RESAMPLES,): the percentile bootstrap.

    Of an upstream dimension only the videos' own results are known, not their weights: equal
    weights are taken and the whole is moved to upstream's mean.
    """
    if isinstance(finding, Delegated):
        # imaging_quality lists 0..100 for videos and averages to 0..1.
        scale = 100.0 if name == "imaging_quality" else 1.0
        found = [float(row["video_results"]) / scale for row in finding.videos]
        values, weights = np.array(found), np.ones(len(found))
    else:
        values = np.array([row.measured.value for row in finding], float)
        weights = np.array([row.measured.weight for row in finding], float)
    if not len(values):
        return np.full(RESAMPLES, overall(finding))
    chance = np.random.Generator(np.random.Philox(key=0))
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 100):  # 100 at a time: thousands of videos fit in memory
        rows = (chance.random((100, len(values))) * len(values)).astype(int)
        means[start : start + 100] = (values * weights)[rows].sum(1) / weights[rows].sum(1)
    if isinstance(finding, Delegated):
        means += finding.overall - values.mean()
    return means


def samples(
    findings: Mapping[str, Finding], proxies: Mapping[str, Sequence[Row]]
) -> list[suite.Row]:
    """The rows of `values.jsonl`, by which two results are compared video by video.

    Upstream's own results are among them where it tells those of videos.
    """
    lines: dict[tuple[str, str], dict[str, float]] = {}
    for name, finding in findings.items():
        for row in upstream_shape({name: finding})[name][1]:
            video = Path(row["video_path"]).name
            lines.setdefault(("vbench", video), {})[name] = float(row["video_results"])
    for name, rows in proxies.items():
        for row in rows:
            lines.setdefault(("proxy", row.video.path.name), {})[name] = row.measured.value
    return [suite.Row(group, video, found) for (group, video), found in lines.items()]


def estimate(value: float, means: np.ndarray, count: int) -> dict[str, float]:
    """A line of `scores.json`: mean, 95 % interval, number of videos (or of dimensions)."""
    low, high = np.quantile(means, [0.025, 0.975])
    # A total of few videos may be skewed, and rounding may put the mean an ulp outside.
    return {
        "mean": float(value),
        "low": float(min(low, value)),
        "high": float(max(high, value)),
        "n": count,
    }


def groups(
    findings: Mapping[str, Finding], proxies: Mapping[str, Sequence[Row]], version: Version
) -> dict[str, dict[str, dict[str, float]]]:
    """'vbench' (raw dimensions), 'totals' where all of their dimensions are there, 'proxy'."""
    means = {name: resampled(finding, name) for name, finding in findings.items()}
    counts = {n: len(f.videos if isinstance(f, Delegated) else f) for n, f in findings.items()}
    raw = {name: overall(finding) for name, finding in findings.items()}
    found = {"vbench": {name: estimate(raw[name], means[name], counts[name]) for name in findings}}
    values, spreads = aggregate.totals(raw, version), aggregate.totals(means, version)
    parts = aggregate.PARTS[version]
    sizes = {name: len(scales) for name, (scales, _) in parts.items()}
    sizes["total"] = sum(sizes.values())
    found["totals"] = {name: estimate(values[name], spreads[name], sizes[name]) for name in values}
    found["proxy"] = {
        name: estimate(overall(rows), resampled(rows, name), len(rows))
        for name, rows in proxies.items()
    }
    return {name: group for name, group in found.items() if group}
