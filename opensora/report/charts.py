"""Charts as SVG: curves over steps, and estimates with their intervals.

Colours and fonts come from the page's style sheet through classes (`c0` ... `c5`, `ramp0` ...
`ramp9`), so one drawing serves light and dark. Values can be read without a script: invisible
columns over a chart carry them as tooltips, which the page's script replaces by a finer one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opensora.report.markup import Markup, element, join
from opensora.report.scale import Axis, figure, fit_axis, labels, tight_axis
from opensora.report.series import Series, drawable, thin

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 10, 30
PLOT_WIDTH, PLOT_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

STEP = "step"
_NUM_TOOLTIPS = 48
_MAX_DOTS = 40
_MAX_MARKS = 200


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        name: as the legend calls it.
        look: CSS classes: a colour, and 'faint' for raw data behind its average.
    """

    name: str
    series: Series
    look: str = "c0"


@dataclass(frozen=True)
class _Frame:
    """Where steps and values lie in the drawing."""

    x: Axis
    y: Axis

    def places(self, series: Series) -> tuple[np.ndarray, np.ndarray]:
        across = LEFT + self.x.fraction(series.steps) * PLOT_WIDTH
        down = TOP + (1 - self.y.fraction(series.values)) * PLOT_HEIGHT
        return across, np.where(drawable(series.values), down, np.nan)

    def height_of(self, value: float) -> float:
        return float(TOP + (1 - self.y.fraction(np.array(value))) * PLOT_HEIGHT)


def line_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    unit: str = "",
    from_zero: bool = False,
    level: tuple[str, float] | None = None,
    marks: Sequence[float] = (),
    note: str = "",
    across: str = STEP,
) -> Markup:
    """Curves over training steps, or over something else that counts upwards.

    Args:
        curves: drawn in order, the last one on top; each is thinned to what a screen shows.
        unit: of the values, shown beside the title.
        from_zero: let the vertical axis begin at 0.
        level: a named value to draw as a dashed line, left out where it lies off the chart.
        marks: steps to tick in red along the bottom, such as skipped ones.
        note: a sentence below the title.
        across: what lies across; the last value is the newest only of steps.

    Returns:
        A <figure>; Markup("") when no curve has a finite value.
    """
    curves = [Curve(c.name, thin(c.series), c.look) for c in curves if len(c.series.finite)]
    if not curves:
        return Markup("")
    steps = np.concatenate([c.series.steps for c in curves])
    values = np.concatenate([c.series.finite for c in curves])
    frame = _Frame(
        tight_axis(min(0.0, float(steps.min())), float(steps.max())),
        fit_axis(values, from_zero=from_zero),
    )
    with_last = across == STEP
    summary = "; ".join(f"{c.name} ends at {figure(c.series.last())}" for c in curves)
    drawing = element(
        "svg",
        element("title", f"{title} over {'training ' * with_last}{across}s: {summary}"),
        _grid(frame),
        _level(frame, level),
        [_line(frame, curve) for curve in curves],
        _marks(frame, marks),
        _tooltips(frame, curves, across),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        class_="plot",
    )
    words = [title, element("span", f" {unit}", class_="unit") if unit else None]
    return element(
        "figure",
        element(
            "figcaption",
            element("h4", words),
            element("p", note, class_="note") if note else None,
            _legend(curves, with_last=with_last),
        ),
        drawing,
        class_="chart",
        data_chart=_hover_data(frame, curves, across),
    )


def interval(
    mean: float, low: float, high: float, axis: Axis, *, look: str, target: float | None = None
) -> Markup:
    """A dot on the interval around it, as wide as the cell that holds it.

    Args:
        axis: what the width of the cell stands for.
        look: CSS classes: a colour and a shape (`circle`, `square`, `triangle`, `diamond`).
        target: a value to mark with an upright line.
    """
    start, middle, end = (
        f"{100 * float(np.clip(axis.fraction(np.array(v)), 0, 1)):.2f}%" for v in (low, mean, high)
    )
    aim = None
    if target is not None and axis.low <= target <= axis.high:
        place = f"{100 * float(axis.fraction(np.array(target))):.2f}%"
        aim = element("line", x1=place, x2=place, y1=4, y2=24, class_="aim")
    return element(
        "svg",
        [
            element("line", x1=f"{p}%", x2=f"{p}%", y1=0, y2=28, class_="grid")
            for p in (0, 25, 50, 75, 100)
        ],
        aim,
        element("line", x1=start, x2=end, y1=14, y2=14, class_="whisker"),
        # A nested drawing is placed by percent and leaves its own units to the marker.
        element("svg", marker(look), x=middle, y=14, width=1, height=1, class_="anchor"),
        class_=f"interval {look.split()[0]}",
        height=28,
        width="100%",
        aria_hidden="true",
    )


def marker(look: str) -> Markup:
    """The outline of a group's marker around (0, 0); shape as well as colour tells groups apart."""
    outlines = {
        "square": "M-4.5-4.5h9v9h-9z",
        "triangle": "M0-6L5.6 4.4H-5.6z",
        "diamond": "M0-6.2L6.2 0L0 6.2L-6.2 0z",
    }
    outline = next((outlines[word] for word in look.split() if word in outlines), None)
    if outline is None:
        return element("circle", cx=0, cy=0, r=5, class_="marker")
    return element("path", d=outline, class_="marker")


def _grid(frame: _Frame) -> Markup:
    """Lines and labels of both axes."""
    parts = []
    for tick, label in zip(frame.y.ticks, labels(frame.y.ticks), strict=True):
        y = f"{frame.height_of(tick):.1f}"
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(
            element("text", label, x=LEFT - 8, y=y, class_="tick", text_anchor="end", dy=4)
        )
    for tick, label in zip(frame.x.ticks, labels(frame.x.ticks), strict=True):
        x = f"{LEFT + float(frame.x.fraction(np.array(tick))) * PLOT_WIDTH:.1f}"
        parts.append(
            element("text", label, x=x, y=HEIGHT - 10, class_="tick", text_anchor="middle")
        )
    base = TOP + PLOT_HEIGHT
    parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=base, y2=base, class_="base"))
    return element("g", parts, aria_hidden="true")


def _line(frame: _Frame, curve: Curve) -> Markup:
    across, down = frame.places(curve.series)
    there = np.isfinite(down)
    words = []
    pen_down = False
    for x, y, seen in zip(across.tolist(), down.tolist(), there.tolist(), strict=True):
        if seen:
            words.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
        pen_down = seen
    dots = []
    alone = there & ~np.append(False, there[:-1]) & ~np.append(there[1:], False)
    shown = there if len(there) <= _MAX_DOTS and "faint" not in curve.look else alone
    for x, y in zip(across[shown].tolist(), down[shown].tolist(), strict=True):
        dots.append(element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.5, class_="dot"))
    return element("g", element("path", d="".join(words), class_="line"), dots, class_=curve.look)


def _level(frame: _Frame, level: tuple[str, float] | None) -> Markup | None:
    if level is None or not frame.y.low <= level[1] <= frame.y.high:
        return None
    name, value = level
    y = frame.height_of(value)
    return join(
        element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="level"),
        element(
            "text",
            f"{name} {figure(value)}",
            x=WIDTH - RIGHT - 4,
            y=f"{y - 6:.1f}",
            class_="tick",
            text_anchor="end",
        ),
    )


def _marks(frame: _Frame, steps: Sequence[float]) -> list[Markup]:
    base = TOP + PLOT_HEIGHT
    parts = []
    for step in list(steps)[:_MAX_MARKS]:
        x = f"{LEFT + float(frame.x.fraction(np.array(step))) * PLOT_WIDTH:.1f}"
        parts.append(element("line", x1=x, x2=x, y1=base - 9, y2=base, class_="mark"))
    return parts


def _tooltips(frame: _Frame, curves: Sequence[Curve], across: str) -> Markup:
    """Invisible columns whose titles browsers show on hover, without any script."""
    span = frame.x.high - frame.x.low
    columns = []
    for index in range(_NUM_TOOLTIPS):
        middle = frame.x.low + (index + 0.5) / _NUM_TOOLTIPS * span
        lines = []
        for curve in curves:
            nearest = int(np.abs(curve.series.steps - middle).argmin())
            step, value = curve.series.steps[nearest], float(curve.series.values[nearest])
            place = f"{step:,.0f}" if step == round(step) else figure(step)
            lines.append(f"{across} {place}: {curve.name} {figure(value, 4)}")
        width = PLOT_WIDTH / _NUM_TOOLTIPS
        columns.append(
            element(
                "rect",
                element("title", "\n".join(lines)),
                x=f"{LEFT + index * width:.1f}",
                y=TOP,
                width=f"{width:.1f}",
                height=PLOT_HEIGHT,
            )
        )
    return element("g", columns, class_="columns")


def _legend(curves: Sequence[Curve], *, with_last: bool) -> Markup | None:
    """Names, and newest values of steps; a lone curve needs no name beside its title."""
    entries = []
    if not with_last and len(curves) == 1:
        return None
    for curve in curves:
        last = element("b", figure(curve.series.last(), 4)) if with_last else None
        name = [curve.name, " "] if len(curves) > 1 else "now "
        swatch = element("i", class_=f"swatch {curve.look}")
        entries.append(element("span", swatch, name, last))
    return element("p", entries, class_="legend")


def _hover_data(frame: _Frame, curves: Sequence[Curve], across: str) -> str:
    """What the page's script needs to find the nearest points, as JSON."""
    return json.dumps(
        {
            "across": across,
            "plot": [LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT],
            "x": [frame.x.low, frame.x.high],
            "y": [frame.y.low, frame.y.high, int(frame.y.log)],
            "curves": [
                {
                    "name": curve.name,
                    "look": curve.look,
                    "steps": [float(f"{s:.9g}") for s in curve.series.steps.tolist()],
                    "values": [
                        float(f"{v:.5g}") if ok else None
                        for v, ok in zip(
                            curve.series.values.tolist(),
                            drawable(curve.series.values).tolist(),
                            strict=True,
                        )
                    ],
                }
                for curve in curves
            ],
        },
        separators=(",", ":"),
    )
