"""Drawings hold their data, with and without a script."""

import json
import math
import re

import numpy as np

from opensora.report.charts import (
    HEIGHT,
    LEFT,
    PLOT_HEIGHT,
    PLOT_WIDTH,
    TOP,
    WIDTH,
    Curve,
    interval,
    line_chart,
    marker,
)
from opensora.report.scale import Axis
from opensora.report.series import MAX_POINTS, Series
from tests.report.conftest import parse


def curve(values, name="loss", look="c0"):
    return Curve(name, Series(np.arange(len(values)) * 10.0, np.array(values, float)), look)


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](\S+) ([\d.]+)", path)]


def test_a_line_runs_through_its_values():
    page = parse(line_chart("Loss", [curve([0.0, 0.5, 1.0])]))
    (path,) = page.all("path", class_="line")
    middle, right, bottom = LEFT + PLOT_WIDTH / 2, LEFT + PLOT_WIDTH, TOP + PLOT_HEIGHT
    assert points(path.attributes["d"]) == [
        (LEFT, bottom),
        (middle, TOP + PLOT_HEIGHT / 2),
        (right, TOP),
    ]


def test_non_finite_values_are_gaps_and_lone_points_are_dots():
    values = [1.0, 2.0, math.nan, 3.0, math.inf, *[2.0] * 60]
    page = parse(line_chart("Loss", [curve(values)]))
    (path,) = page.all("path", class_="line")
    assert path.attributes["d"].count("M") == 3
    assert len(page.all("circle", class_="dot")) == 1
    assert "nan" not in path.attributes["d"]
    data = json.loads(page.one("figure").attributes["data-chart"])
    assert data["curves"][0]["values"][:5] == [1.0, 2.0, None, 3.0, None]


def test_nothing_finite_draws_nothing():
    assert line_chart("Loss", [curve([math.nan]), curve([])]) == ""


def test_everything_stays_inside_the_drawing_whatever_the_values():
    for values in ([1e29, -1e29, 1e200], [5.0], [0.0, 0.0], [1e-200, 1.0], [-1e-310, 1e-310]):
        page = parse(line_chart("x", [curve(values)], level=("limit", 1e31)))
        (path,) = page.all("path", class_="line")
        for x, y in points(path.attributes["d"]):
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT


def test_a_long_curve_costs_a_bounded_page():
    chart = line_chart("Loss", [curve(np.random.default_rng(0).random(200_000))])
    data = json.loads(parse(chart).one("figure").attributes["data-chart"])
    assert len(data["curves"][0]["steps"]) <= MAX_POINTS
    assert len(chart) < 60_000


def test_values_can_be_read_without_a_script():
    page = parse(line_chart("Loss", [curve([0.25, 0.125], "raw"), curve([0.5, 0.75], "smoothed")]))
    titles = [column.one("title").text for column in page.all("rect")]
    assert titles[0] == "step 0: raw 0.25\nstep 0: smoothed 0.5"
    assert titles[-1] == "step 10: raw 0.125\nstep 10: smoothed 0.75"


def test_the_drawing_names_itself_for_those_who_cannot_see_it():
    page = parse(line_chart("Loss", [curve([4.0, 0.125], "raw")]))
    assert page.one("svg").attributes["role"] == "img"
    assert page.one("svg").children[0].text == "Loss over training steps: raw ends at 0.125"


def test_levels_and_marks_are_drawn_where_they_belong():
    page = parse(line_chart("Norm", [curve([0.0, 2.0])], level=("limit", 1.0), marks=[5.0]))
    assert float(page.one("line", class_="level").attributes["y1"]) == TOP + PLOT_HEIGHT / 2
    assert float(page.one("line", class_="mark").attributes["x1"]) == LEFT + PLOT_WIDTH / 2
    outside = parse(line_chart("Norm", [curve([0.0, 2.0])], level=("limit", 9.0)))
    assert not outside.all("line", class_="level")


def test_hostile_names_stay_text():
    evil = '"><script>alert(1)</script>'
    page = parse(line_chart(evil, [curve([1.0, 2.0], evil)], note=evil, unit=evil))
    assert not page.all("script")
    assert json.loads(page.one("figure").attributes["data-chart"])["curves"][0]["name"] == evil


def test_an_interval_spans_from_low_to_high_with_its_dot_at_the_mean():
    axis = Axis(0.0, 1.0, ())
    page = parse(interval(0.5, 0.25, 2.0, axis, look="c1 square", target=0.75))
    whisker = page.one("line", class_="whisker").attributes
    assert (whisker["x1"], whisker["x2"]) == ("25.00%", "100.00%")
    assert page.one("svg", class_="anchor").attributes["x"] == "50.00%"
    assert page.one("line", class_="aim").attributes["x1"] == "75.00%"


def test_groups_differ_in_shape_and_not_only_in_colour():
    looks = ("circle", "square", "triangle", "diamond")
    assert len({marker(f"c0 {look}") for look in looks}) == 4


def test_what_lies_across_is_said_and_only_steps_have_a_newest_value():
    levels = Curve("all", Series(np.array([0.25, 0.75]), np.array([0.5, 0.125])))
    page = parse(line_chart("Loss", [levels], across="noise level"))
    assert page.one("svg").children[0].text == "Loss over noise levels: all ends at 0.125"
    columns = page.one("g", class_="columns")
    assert columns.all("title")[0].text == "noise level 0.25: all 0.5"
    assert json.loads(page.one("figure").attributes["data-chart"])["across"] == "noise level"
    assert not page.all("p", class_="legend")
    assert page.text.count("now") == 0
