"""The part of the page that judges: every estimate with its interval, next to what was aimed at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from opensora.report import charts, score_curves
from opensora.report.findings import QUESTIONS, Estimate, Scores, Target
from opensora.report.json_text import pretty
from opensora.report.markup import Markup, element, join
from opensora.report.reading import mapping
from opensora.report.scale import Axis, figure, fit_axis
from opensora.report.words import plain, plural, relative, title

HEADLINES = ("colour", "direction", "count", "shape")
ORDER = ("trained", "generated", "still", "shuffled", "untrained", "vae", "truth")
FIRST = ("score", "fvd", "rfvd", "loss")
"""What a suite is asked for, before its other measures."""
SHAPES = ("circle", "square", "triangle", "diamond")
NUM_COLOURS = 6


def section(found: Sequence[Scores], root: Path) -> Markup | None:
    """All score files, each as a table whose rows draw their interval."""
    if not found:
        return None
    return join(_file(scores, root, single=len(found) == 1) for scores in found)


def headlines(scores: Scores) -> list[tuple[str, Estimate, Target | None]]:
    """The first group's answers to the main questions, for the top of the page."""
    group = _ordered(scores.groups)[0]
    whose = "" if group == ORDER[0] else f" ({plain(group)})"
    return [
        (f"{title(name)} right{whose}", estimate, scores.targets.get((group, name)))
        for name in HEADLINES
        if (estimate := scores.groups[group].get(name)) is not None
    ]


def _file(scores: Scores, root: Path, *, single: bool) -> Markup:
    groups = _ordered(scores.groups)
    looks = {group: _look(i) for i, group in enumerate(groups)}
    metrics = _metrics(scores)
    main = [m for m in metrics if m in HEADLINES or any((g, m) in scores.targets for g in groups)]
    main = main or [metric for metric in metrics if not score_curves.is_level(metric)][:4]
    rest = [metric for metric in metrics if metric not in main]
    return element(
        "article",
        None if single else element("h3", relative(scores.path.parent, root)),
        _verdict(scores),
        _warnings(scores),
        _table(scores, main, groups, looks),
        score_curves.drawn(scores),
        element(
            "details",
            element("summary", plural(len(rest), "more measure")),
            _table(scores, rest, groups, looks),
            class_="more",
        )
        if rest
        else None,
        _facts(scores),
    )


def _ordered(groups: dict[str, dict[str, Estimate]]) -> list[str]:
    """Known groups first; 'trained_two_objects' and 'trained / 2' stay behind 'trained'."""

    def rank(item: tuple[int, str]) -> tuple[int, bool, int]:
        position, name = item
        known = [i for i, first in enumerate(ORDER) if name.startswith(first)]
        return (known[0] if known else len(ORDER), name not in ORDER, position)

    return [name for _, name in sorted(enumerate(groups), key=rank)]


def _metrics(scores: Scores) -> list[str]:
    """Every metric once: the questions in their order, then the others by name."""
    names = {name for metrics in scores.groups.values() for name in metrics}
    known = [name for name in (*QUESTIONS, *FIRST) if name in names]
    return known + sorted(names - set(known))


def _table(
    scores: Scores, metrics: Sequence[str], groups: Sequence[str], looks: dict[str, str]
) -> Markup:
    shares = element("span", [element("span", tick) for tick in ("0", "½", "1")], class_="scale")
    names = ("mean", "95 % interval", "videos", "target")
    head = element(
        "tr",
        element("td", colspan=2),
        element("td", shares, class_="drawn"),
        [element("th", name, scope="col") for name in names],
    )
    bodies = []
    for metric in metrics:
        having = [group for group in groups if metric in scores.groups[group]]
        aims = [
            scores.targets[group, metric] for group in having if (group, metric) in scores.targets
        ]
        axis = _axis([scores.groups[group][metric] for group in having], aims)
        rows = []
        for group in having:
            name = None
            if group == having[0]:
                name = _metric_cell(metric, axis, len(having))
            target = scores.targets.get((group, metric))
            estimate = scores.groups[group][metric]
            rows.append(_row(name, group, estimate, target, axis, looks[group]))
        bodies.append(element("tbody", rows))
    return element(
        "div",
        element("table", element("thead", head), bodies, class_="scores"),
        class_="scroll",
    )


def _metric_cell(metric: str, axis: Axis, span: int) -> Markup:
    ends = None
    if (axis.low, axis.high) != (0.0, 1.0):
        ends = element("small", f"{figure(axis.low)} to {figure(axis.high)}")
    return element("th", title(metric), ends, scope="rowgroup", rowspan=span, class_="metric")


def _row(
    metric: Markup | None,
    group: str,
    estimate: Estimate,
    target: Target | None,
    axis: Axis,
    look: str,
) -> Markup:
    low = estimate.mean if estimate.low is None else estimate.low
    high = estimate.mean if estimate.high is None else estimate.high
    known = estimate.low is not None and estimate.high is not None
    return element(
        "tr",
        metric,
        element("th", _key(look), plain(group), scope="row", class_="group"),
        element(
            "td",
            charts.interval(estimate.mean, low, high, axis, look=look, target=_aim(target)),
            class_="drawn",
        ),
        element("td", element("b", _value(estimate.mean)), class_="number"),
        element("td", f"{_value(low)} – {_value(high)}" if known else "–", class_="number quiet"),
        element("td", "–" if estimate.n is None else f"{estimate.n:,}", class_="number quiet"),
        element("td", _target(estimate, target), class_="number"),
    )


def _look(index: int) -> str:
    """Colour and shape of a group; the first 24 all differ."""
    shape = SHAPES[(index + index // NUM_COLOURS) % len(SHAPES)]
    return f"c{index % NUM_COLOURS} {shape}"


def _key(look: str) -> Markup:
    return element(
        "svg",
        charts.marker(look),
        viewBox="-8 -8 16 16",
        width=14,
        height=14,
        class_=look.split()[0],
        aria_hidden="true",
    )


def _aim(target: Target | None) -> float | None:
    """The one value of a target that a chart can mark."""
    if target is None:
        return None
    return target.at_most if target.at_least is None else target.at_least


def _axis(estimates: Sequence[Estimate], targets: Sequence[Target]) -> Axis:
    """From 0 to 1 for shares; otherwise whatever holds all the intervals and targets."""
    ends = [value for e in estimates for value in (e.mean, e.low, e.high)]
    ends += [_aim(target) for target in targets]
    values = np.array([value for value in ends if value is not None], np.float64)
    if values.min() >= 0 and values.max() <= 1:
        return Axis(0.0, 1.0, ())
    return fit_axis(values)


def _target(estimate: Estimate, target: Target | None) -> Markup | None:
    if target is None:
        return None
    bounds = []
    if target.at_least is not None:
        bounds.append(f"≥ {figure(target.at_least)}")
    if target.at_most is not None:
        bounds.append(f"≤ {figure(target.at_most)}")
    met = target.met(estimate.mean)
    mark = element(
        "span", "✓ pass" if met else "✗ fail", class_=f"badge {'good' if met else 'bad'}"
    )
    return join(element("span", ", ".join(bounds), class_="quiet"), " ", mark)


def _verdict(scores: Scores) -> Markup | None:
    """One sentence: how many targets are met, and which are not."""
    judged = [
        (group, metric, target.met(scores.groups[group][metric].mean))
        for (group, metric), target in scores.targets.items()
        if metric in scores.groups.get(group, {})
    ]
    unmeasured = len(scores.targets) - len(judged)
    if not scores.targets:
        return None
    missed = [f"{plain(group)} {plain(metric)}" for group, metric, met in judged if not met]
    words = f"{len(judged) - len(missed)} of {len(scores.targets)} targets are met"
    words += f"; missed: {', '.join(missed)}" if missed else ""
    words += f"; {unmeasured} not measured" if unmeasured else ""
    return element("p", words + ".", class_="lead")


def _warnings(scores: Scores) -> Markup | None:
    """What the suite says a reader must know, such as that the videos are still pictures."""
    found = mapping(scores.facts.get("settings")).get("warnings")
    found = [str(line) for line in found] if isinstance(found, list) else []
    if not found:
        return None
    return element("ul", [element("li", line) for line in found], class_="warnings")


def _facts(scores: Scores) -> Markup | None:
    """Whatever else the file says, such as the protocol of the suite."""
    facts = {name: fact for name, fact in scores.facts.items() if name != "curves"}
    if not facts:
        return None
    return element(
        "details",
        element("summary", "How it was measured"),
        element("pre", pretty(facts)),
        class_="more",
    )


def _value(value: float) -> str:
    """Shares with three decimals, so that columns line up; others with three digits."""
    return f"{value:.3f}" if 0 <= value <= 1 else figure(value)
