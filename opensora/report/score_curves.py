"""Scores that are curves: a loss over noise levels, a likeness over the frames of a clip."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from opensora.report.charts import Curve, line_chart
from opensora.report.findings import Scores
from opensora.report.markup import Markup, element
from opensora.report.reading import finite, mapping
from opensora.report.series import Series
from opensora.report.words import plain, title

_LEVEL = re.compile(r"^loss_(\d+(?:\.\d+)?)$")


def drawn(scores: Scores) -> Markup | None:
    """The curves of a score file, if it has any."""
    charts = [chart for chart in (_by_level(scores), *_by_frame(scores)) if chart]
    return element("div", charts, class_="charts") if charts else None


def is_level(metric: str) -> bool:
    """Whether a metric is the loss at one noise level, which is a point of a curve."""
    return _LEVEL.match(metric) is not None


def _by_level(scores: Scores) -> Markup:
    """The loss of each group, and the interval where there is a single one."""
    curves = []
    for look, (group, metrics) in enumerate(scores.groups.items()):
        found = [(float(m[1]), e) for name, e in metrics.items() if (m := _LEVEL.match(name))]
        found.sort(key=lambda pair: pair[0])
        levels, colour = [level for level, _ in found], f"c{look % 6}"
        if len(scores.groups) == 1 and all(e.low is not None for _, e in found):
            lows, highs = [e.low for _, e in found], [e.high for _, e in found]
            curves.append(_curve("95 % interval from", levels, lows, f"{colour} faint"))
            curves.append(_curve("to", levels, highs, f"{colour} faint"))
        curves.append(_curve(plain(group), levels, [e.mean for _, e in found], colour))
    note = "0 is clean, 1 is pure noise."
    return line_chart("Loss by noise level", curves, note=note, across="noise level")


def _by_frame(scores: Scores) -> Iterable[Markup]:
    """One chart a metric of `curves`, whose groups have a value for each frame of a clip."""
    charts: dict[str, list[Curve]] = {}
    for look, (group, metrics) in enumerate(mapping(scores.facts.get("curves")).items()):
        for name, values in mapping(metrics).items():
            values = values if isinstance(values, list) else []
            frames = list(range(1, len(values) + 1))
            curve = _curve(plain(str(group)), frames, map(finite, values), f"c{look % 6}")
            charts.setdefault(str(name), []).append(curve)
    for name, curves in charts.items():
        unit = "dB" if name == "psnr" else ""
        yield line_chart(f"{title(name)} by frame", curves, unit=unit, across="frame")


def _curve(name: str, places: Iterable[float], values: Iterable[float | None], look: str) -> Curve:
    known = [np.nan if value is None else value for value in values]
    return Curve(name, Series(np.array(list(places), float), np.array(known, float)), look)
