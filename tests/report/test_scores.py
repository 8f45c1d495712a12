"""The order and the looks of groups."""

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
