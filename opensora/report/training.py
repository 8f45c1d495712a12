"""The part of the page about training runs: figures, curves, incidents, checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from opensora.report import gallery
from opensora.report.charts import Curve, line_chart
from opensora.report.clips import Shelf
from opensora.report.findings import QUESTIONS, Run, Tree
from opensora.report.markup import Markup, element, join
from opensora.report.reading import finite, mapping, number
from opensora.report.scale import duration, figure, size
from opensora.report.series import smooth
from opensora.report.words import plain, plural, relative, title

LEVEL = "loss/level_"
_JUDGED = "trained/"
_RAMP = 10

# Bookkeeping that a curve would not make clearer: it is in the tiles, or a multiple of another.
_NOT_DRAWN = {
    "loss",
    "gradient_norm",
    "skipped",
    "tokens_per_second",
    "steps_per_second",
    "flops_per_second",
    "matmul_share",
    "tokens_seen",
    "train_seconds",
    "eta_seconds",
}
_FROM_ZERO = {"peak_memory_bytes", "lr_factor", "replaced_samples"}


def section(runs: Sequence[Run], shelf: Shelf) -> Markup | None:
    """All runs, one after another."""
    if not runs:
        return None
    return join(_run(run, shelf) for run in runs)


def seconds(run: Run) -> float | None:
    """How long the run has trained, as its last record says."""
    series = run.curve("train", "train_seconds")
    return series.last() if series is not None else None


def _run(run: Run, shelf: Shelf) -> Markup:
    task = mapping(run.config.get("task")).get("kind")
    name = relative(run.path, shelf.root)
    tag = element("span", plain(str(task)), class_="tag") if task else None
    return element(
        "article",
        element("h3", name, " ", tag),
        _tiles(run),
        _charts(run),
        gallery.learning(run, shelf),
        _incidents(run, shelf.root),
        _checkpoints(run),
        class_="run",
    )


def _tiles(run: Run) -> Markup:
    """The figures of a run, largest first in importance."""
    train = run.curves.get("train", {})

    def last(name: str) -> float | None:
        return train[name].last() if name in train else None

    def typical(name: str) -> float | None:
        values = train[name].finite if name in train else np.empty(0)
        return float(np.median(values)) if len(values) else None

    done = max((s.steps[-1] for s in train.values() if len(s)), default=0)
    planned = finite(run.config.get("steps"))
    of = f" of {planned:,.0f}" if planned and planned != done else ""
    share = typical("matmul_share")
    tiles = [("steps", f"{done:,.0f}{of}"), ("training time", duration(seconds(run)))]
    for name, series in run.curves.get("validation", {}).items():
        if "/" not in name and series.last() is not None:
            tiles.append(
                (f"{title(name)}, validation", figure(series.last(), 4) + _unit(name, " "))
            )
    tiles += [
        ("parameters", figure(finite(run.environment.get("parameters")))),
        ("tokens seen", figure(last("tokens_seen"))),
        ("tokens a second", figure(typical("tokens_per_second"))),
        ("of matmul rate", "–" if share is None else f"{share:.0%}"),
        ("peak memory", size(last("peak_memory_bytes"))),
    ]
    return element(
        "dl",
        [
            element("div", element("dt", name), element("dd", value))
            for name, value in tiles
            if value != "–"
        ],
        class_="tiles",
    )


def _charts(run: Run) -> Markup | None:
    charts = [_training_loss(run), *_validation(run), _levels(run), _judged(run)]
    charts += _steadiness(run)
    charts = [chart for chart in charts if chart]
    more = [chart for chart in _more(run) if chart]
    if not charts and not more:
        return element("p", "No finite figures were recorded yet.", class_="note")
    return join(
        element("div", charts, class_="charts"),
        element(
            "details",
            element("summary", f"{plural(len(more), 'more curve')}"),
            element("div", more, class_="charts"),
            class_="more",
        )
        if more
        else None,
    )


def _training_loss(run: Run) -> Markup | None:
    loss = run.curve("train", "loss")
    if loss is None:
        return None
    skipped = _skipped_steps(run)
    notes = []
    broken = len(loss) - len(loss.finite)
    if broken:
        notes.append(f"{plural(broken, 'record')} not finite, left out of the curve")
    if len(skipped):
        notes.append(f"{plural(len(skipped), 'skipped step')} in red")
    return line_chart(
        "Training loss",
        [Curve("as recorded", loss, "c0 faint"), Curve("smoothed", smooth(loss), "c0")],
        marks=skipped,
        note="; ".join(notes),
    )


def _skipped_steps(run: Run) -> list[float]:
    """From the incidents, which name every skipped step, and the records, which see some."""
    steps = {number(incident.get("step")) for incident in run.incidents}
    skipped = run.curve("train", "skipped")
    if skipped is not None:
        steps |= set(skipped.steps[skipped.values > 0].tolist())
    loss = run.curve("train", "loss")
    end = float(loss.steps[-1]) if loss is not None else 0.0
    return sorted(step for step in steps if step is not None and 0 <= step <= end)


def _validation(run: Run) -> list[Markup]:
    charts = []
    for name, series in run.curves.get("validation", {}).items():
        if name.startswith(LEVEL):
            continue
        heading = f"{title(name)} on validation data"
        charts.append(line_chart(heading, [Curve(name, series, "c1")], unit=_unit(name)))
    return charts


def _levels(run: Run) -> Markup | None:
    """The validation loss at each noise level: 0 is nearly data, 1 nearly noise."""
    levels = []
    for name, series in run.curves.get("validation", {}).items():
        level = finite_level(name)
        if level is not None and len(series.finite):
            levels.append((level, series))
    levels.sort(key=lambda pair: pair[0])
    curves = [
        Curve(f"{level:g}", series, f"ramp{round(i * (_RAMP - 1) / max(1, len(levels) - 1))}")
        for i, (level, series) in enumerate(levels)
    ]
    note = "On validation data; 0 is clean, 1 is pure noise."
    return line_chart("Loss by noise level", curves, note=note)


def _judged(run: Run) -> Markup | None:
    """What a suite's main questions gave during training."""
    found = run.curves.get("evaluation", {})
    curves = [
        Curve(plain(name), found[f"{_JUDGED}{name}"], f"c{look}")
        for look, name in enumerate(QUESTIONS[:6])
        if f"{_JUDGED}{name}" in found
    ]
    note = "On videos that the averaged weights drew; 1 is all right."
    return line_chart("Judged during training", curves, note=note, from_zero=True)


def finite_level(name: str) -> float | None:
    """The level in 'loss/level_0.05', or None for another metric."""
    try:
        return float(name.removeprefix(LEVEL)) if name.startswith(LEVEL) else None
    except ValueError:
        return None


def _steadiness(run: Run) -> list[Markup]:
    """Whether the run was calm, and how fast it went."""
    charts = []
    norm = run.curve("train", "gradient_norm")
    if norm is not None:
        limit = finite(run.config.get("max_grad_norm"))
        curves = [Curve("as recorded", norm, "c2 faint"), Curve("smoothed", smooth(norm), "c2")]
        level = None if limit is None else ("clipped above", limit)
        charts.append(line_chart("Gradient norm", curves, level=level))
    for name, look, factor, unit in (
        ("tokens_per_second", "c3", 1.0, ""),
        ("matmul_share", "c4", 100.0, "%"),
    ):
        series = run.curve("train", name)
        if series is not None:
            curve = Curve(name, series.scaled(factor), look)
            charts.append(line_chart(title(name), [curve], unit=unit, from_zero=True))
    return charts


def _more(run: Run) -> list[Markup]:
    """Every metric that has no chart yet, so that nothing recorded is hidden."""
    charts = []
    for kind, metrics in run.curves.items():
        for name, series in metrics.items():
            known = name in _NOT_DRAWN if kind == "train" else kind == "validation"
            if kind == "evaluation":
                known = name.removeprefix(_JUDGED) in QUESTIONS[:6]
            if known and not (kind == "validation" and _is_lost_level(name)):
                continue
            words = title(name) if kind == "train" else f"{title(name)} ({plain(kind)})"
            factor, unit = (2.0**-30, "GiB") if name == "peak_memory_bytes" else (1.0, _unit(name))
            curve = Curve(name, series.scaled(factor), "c5")
            charts.append(line_chart(words, [curve], unit=unit, from_zero=name in _FROM_ZERO))
    return charts


def _is_lost_level(name: str) -> bool:
    return name.startswith(LEVEL) and finite_level(name) is None


def _unit(name: str, space: str = "") -> str:
    return f"{space}dB" if name == "psnr" else ""


def _incidents(run: Run, root: Path) -> Markup | None:
    if not run.incidents:
        return None
    rows = [
        element(
            "tr",
            element("td", _step(incident), class_="number"),
            element("td", str(incident.get("reason", "–"))),
            element("td", _culprits(incident)),
        )
        for incident in run.incidents
    ]
    head = element(
        "tr", [element("th", n, scope="col") for n in ("step", "reason", "worst samples")]
    )
    more = run.num_incidents - len(run.incidents)
    return element(
        "details",
        element("summary", f"{plural(run.num_incidents, 'incident')}"),
        element("p", "Steps that the guard kept away from the weights.", class_="note"),
        element(
            "div",
            element("table", element("thead", head), element("tbody", rows), class_="plain"),
            class_="scroll",
        ),
        element(
            "p",
            f"{more:,} more in {relative(run.path, root)}/incidents.jsonl.",
            class_="note",
        )
        if more
        else None,
        class_="more",
    )


def _step(incident: Tree) -> str:
    step = finite(incident.get("step"))
    return "–" if step is None else f"{step:,.0f}"


def _culprits(incident: Tree) -> str:
    samples = incident.get("samples")
    samples = [mapping(s) for s in samples[:3]] if isinstance(samples, list) else []
    words = [
        f"{s.get('id', '?')} “{s.get('text', '')}” (loss {s.get('loss', '?')})" for s in samples
    ]
    return "; ".join(words) or "–"


def _checkpoints(run: Run) -> Markup | None:
    if not run.checkpoints:
        return None
    words = []
    for checkpoint in run.checkpoints:
        if checkpoint.num_bytes is None:
            words.append(f"{checkpoint.name} (not complete)")
        else:
            words.append(f"{checkpoint.name} ({size(checkpoint.num_bytes)})")
    return element("p", f"Checkpoints on disk: {', '.join(words)}.", class_="note")
