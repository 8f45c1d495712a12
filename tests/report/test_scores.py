"""The order and the looks of groups."""

import json

import pytest

from opensora.report.findings import Estimate, Scores
from opensora.report.page import write_report
from opensora.report.scores import _look, _ordered, headlines
from tests.report.conftest import read_page, write_json


def test_no_two_groups_look_alike():
    assert len({_look(index) for index in range(24)}) == 24


def test_variants_follow_the_group_they_vary():
    names = ["vae", "odd", "untrained", "trained_two_objects", "truth", "trained", "shuffled"]
    wanted = ["trained", "trained_two_objects", "shuffled", "untrained", "vae", "truth", "odd"]
    assert _ordered({name: {} for name in names}) == wanted


@pytest.mark.parametrize("group", ["trained", "model"])
def test_headlines_say_whose_they_are_unless_it_is_the_trained_model(tmp_path, group):
    groups = {"untrained": {"colour": Estimate(0.0)}, group: {"count": Estimate(0.5)}}
    if group == "model":
        del groups["untrained"]
    ((name, estimate, target),) = headlines(Scores(tmp_path, groups, {}, {}))
    assert name == ("Count right" if group == "trained" else "Count right (model)")
    assert (estimate.mean, target) == (0.5, None)


def test_what_a_suite_warns_of_stands_above_its_figures(tmp_path):
    """A still picture has a Quality of 0.79: the page must not show that alone."""
    scores = {
        "totals": {"quality": {"mean": 0.79, "n": 3}},
        "settings": {"suite": "vbench", "warnings": ["still pictures: <nothing> moves", 3]},
    }
    write_json(tmp_path / "eval" / "scores.json", scores)
    page = read_page(write_report(tmp_path))
    (listed,) = page.all("ul", class_="warnings")
    assert [item.text for item in listed.all("li")] == ["still pictures: <nothing> moves", "3"]
    text = page.text
    assert text.index("still pictures") < text.index("0.790")


def test_a_loss_by_level_is_a_curve_with_its_interval(tmp_path):
    estimate = lambda mean: {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 4}  # noqa: E731
    group = {"loss": estimate(0.5), "loss_0.75": estimate(0.7), "loss_0.25": estimate(0.3)}
    write_json(tmp_path / "eval/loss/scores.json", {"all": group, "settings": {"suite": "loss"}})
    page = read_page(write_report(tmp_path))
    data = json.loads(page.one("figure", class_="chart").attributes["data-chart"])
    assert [curve["values"] for curve in data["curves"]] == [[0.2, 0.6], [0.4, 0.8], [0.3, 0.7]]
    assert data["curves"][2]["steps"] == [0.25, 0.75]
    first = page.all("table", class_="scores")[0]
    assert [cell.text for cell in first.all("th", class_="metric")] == ["Loss"]


def test_frames_of_a_vae_are_curves_and_what_is_no_number_is_a_gap(tmp_path):
    scores = {
        "vae": {"psnr": {"mean": 30.0, "low": 29.0, "high": 31.0, "n": 2}},
        "curves": {"vae": {"psnr": [31.0, "x", 29.5], "ssim": "none", "odd": 3}, "no": [1]},
    }
    write_json(tmp_path / "eval/vae/scores.json", scores)
    page = read_page(write_report(tmp_path))
    (chart,) = page.all("figure", class_="chart")
    assert "PSNR by frame dB" in chart.text
    data = json.loads(chart.attributes["data-chart"])
    assert data["curves"][0]["steps"] == [1, 2, 3]
    assert data["curves"][0]["values"] == [31.0, None, 29.5]
