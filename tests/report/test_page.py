"""The page as a whole: complete, offline, inert to hostile input, honest about what it lacks."""

import base64
import hashlib
import json
import os
import re

import pytest

from opensora.errors import DataError, UsageError
from opensora.report.page import write_report
from opensora.report.reading import MAX_NOTES
from tests.report.conftest import (
    moving_square,
    read_page,
    write_json,
    write_lines,
    write_run,
    write_samples,
    write_tree,
    write_video,
)

EVIL = "</p></title></style></script><script>alert('x')</script><img src=x onerror=alert(1)>\"'&"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return read_page(write_report(write_tree(tmp_path_factory.mktemp("page") / "quickstart")))


def section(page, anchor):
    return page.one("section", id=anchor)


def tiles(node):
    found = [tile for tiles in node.all("dl") for tile in tiles.all("div")]
    return {tile.one("dt").text: tile.one("dd").text for tile in found}


def test_it_lies_in_the_folder_it_tells_about_unless_another_place_is_named(tree, tmp_path):
    assert write_report(tree) == tree / "report.html"
    elsewhere = tmp_path / "new" / "page.html"
    assert write_report(tree, elsewhere) == elsewhere
    assert elsewhere.is_file()


def test_all_sections_are_there_and_the_navigation_leads_to_them(page):
    anchors = [node.attributes["id"] for node in page.all("section")]
    assert anchors == ["samples", "scores", "training", "data", "again"]
    assert [a.attributes["href"] for a in page.one("nav").all("a")] == [f"#{a}" for a in anchors]


def test_nothing_is_fetched_from_anywhere(tree):
    text = write_report(tree).read_text(encoding="utf-8")
    page = read_page(tree / "report.html")
    addresses = [
        value
        for node in page.all()
        for name, value in node.attributes.items()
        if name in ("src", "href", "poster", "data", "action", "srcset")
    ]
    assert addresses
    assert all(re.match(r"data:(video|image)/|#", address) for address in addresses)
    assert not page.all("link")
    assert not page.all("iframe")
    styles = page.one("style").text
    assert "url(" not in styles
    assert "@import" not in styles
    # The one address in the text is the name of SVG's vocabulary, which nobody visits.
    assert set(re.findall(r"https?://[^\s\"']*", text)) == {"http://www.w3.org/2000/svg"}


def test_the_policy_allows_its_own_style_and_script_and_no_other(page):
    policy = page.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    for directive, node in (("style-src", page.one("style")), ("script-src", page.one("script"))):
        digest = base64.b64encode(hashlib.sha256(node.text.encode()).digest()).decode()
        assert rules[directive] == f"'sha256-{digest}'"
    assert not [n for n in page.all() for name in n.attributes if name == "style"]
    assert not [n for n in page.all() for name in n.attributes if name.startswith("on")]
    head = page.one("head")
    assert [n.attributes.get("http-equiv") for n in head.children].index(
        "Content-Security-Policy"
    ) < [n.tag for n in head.children].index("style")


def test_every_sample_has_a_player_its_prompt_its_seed_and_its_scores(page):
    cards = section(page, "samples").all("figure", class_="card")
    assert [card.one("video").attributes["aria-label"] for card in cards] == [
        "prompt 0",
        "prompt 1",
        "prompt 2",
    ]
    assert [c.attributes.get("data-right") for c in cards] == ["true", "false", None]
    assert cards[1].attributes["data-wrong"] == "shape"
    assert [b.text for b in cards[1].all("span", class_="badge good")] == ["✓ colour"]
    assert [b.text for b in cards[1].all("span", class_="badge bad")] == ["✗ shape 50%"]
    assert cards[1].one("span", class_="seed").text == "seed 1"
    assert [b.text for b in section(page, "samples").all("button")] == [
        "all 3",
        "all right 1",
        "✗ shape 1",
    ]
    settings = {"sampler": "euler", "schedule": {"num_steps": 30}}
    assert json.loads(section(page, "samples").one("pre").text) == settings


def test_scores_are_in_the_table_with_their_interval_and_verdict(page):
    node = section(page, "scores")
    rows = [[cell.text for cell in row.children] for row in node.all("tr")]
    assert any(row[-5:] == ["", "0.500", "0.400 – 0.600", "64", "≥ 0.7 ✗ fail"] for row in rows)
    assert any(row[-5:] == ["", "0.970", "0.950 – 0.990", "64", "≥ 0.95 ✓ pass"] for row in rows)
    assert any(row[-5:] == ["", "0.050", "0.000 – 0.100", "64", "≤ 0.1 ✓ pass"] for row in rows)
    assert "2 of 3 targets are met; missed: trained shape." in node.text
    assert len(node.all("svg", role="img")) == 0
    assert [summary.text for summary in node.all("summary")] == [
        "1 more measure",
        "How it was measured",
    ]
    assert json.loads(node.one("pre").text) == {"settings": {"suite": "arena", "seed": 1}}


def test_the_top_shows_what_a_visitor_came_for(page):
    header = page.one("header")
    assert tiles(header) == {
        "Colour right": "97%✓ on target",
        "Shape right": "50%✗ off target",
        "Training time": "1 min 20 s",
    }
    summary = header.one("p", class_="summary").text
    assert summary.startswith("1 training run, 3 generated videos and 3 clips of data, on Abacus")


def test_it_is_dated_by_the_newest_file_and_not_by_the_clock(tmp_path):
    write_json(tmp_path / "scores.json", {"model": {"colour": {"mean": 0.5}}})
    write_lines(tmp_path / "run" / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    os.utime(tmp_path / "scores.json", (1.7e9, 1.7e9))
    os.utime(tmp_path / "run" / "metrics.jsonl", (1.6e9, 1.6e9))
    summary = read_page(write_report(tmp_path)).one("p", class_="summary").text
    assert summary == "1 training run. Last written 14 November 2023, 22:13 UTC."


def test_a_run_shows_its_figures_curves_samples_and_incidents(page):
    node = section(page, "training")
    figures = tiles(node)
    assert figures["steps"] == "40"
    assert figures["parameters"] == "1.23M"
    assert figures["PSNR, validation"] == "27.5 dB"
    assert figures["of matmul rate"] == "50%"
    assert figures["peak memory"] == "1 GiB"
    headings = [heading.text.strip() for heading in node.all("h4")]
    for heading in (
        "Training loss",
        "Loss on validation data",
        "PSNR on validation data dB",
        "Loss by noise level",
        "Gradient norm",
        "Tokens per second",
        "Odd metric",
        "Drawn while training",
    ):
        assert heading in headings
    assert node.one("line", class_="mark")
    levels = node.one("figure", data_chart=_chart(node, "Loss by noise level"))
    assert len(levels.all("path", class_="line")) == 3
    table = node.one("table", class_="learning")
    assert [th.text for th in table.all("th")] == [
        "prompt",
        "step 20",
        "step 40",
        "a red circle",
        "a blue square",
    ]
    assert len(table.all("video")) == 4
    assert "7 “a fish”" in node.text


def _chart(node, heading):
    (figure,) = [
        f for f in node.all("figure") if f.all("h4") and f.all("h4")[0].text.strip() == heading
    ]
    return figure.attributes["data-chart"]


def test_data_commands_machine_and_config_are_there(page):
    data = section(page, "data")
    assert "3 clips" in data.one("p", class_="facts").text
    assert "16 × 16 px" in data.text
    assert [v.attributes["aria-label"] for v in data.all("video")] == [
        f"clip number {i}" for i in range(3)
    ]
    again = section(page, "again")
    assert [code.text for code in again.one("ol").all("code")] == [
        "opensora train t2v.yaml",
        "opensora eval 'a b'",
    ]
    assert "exit 65" in again.text
    assert "1 min 34 s in all." in again.text
    assert "131 GFLOP/s" in again.text
    assert "bf16" in again.one("table").text
    config = json.loads(again.one("details").one("pre").text)
    assert config["task"] == {"kind": "text_to_video"}


def test_the_same_files_give_the_same_bytes(tree, tmp_path):
    first = write_report(tree, tmp_path / "a.html").read_bytes()
    assert write_report(tree, tmp_path / "b.html").read_bytes() == first


def test_the_report_does_not_report_itself(tree):
    first = write_report(tree).read_bytes()
    assert write_report(tree).read_bytes() == first


def test_hostile_text_from_anywhere_stays_text(tmp_path):
    root = tmp_path / "<b>root & co"
    write_run(root / "<i>run")
    write_lines(
        root / "<i>run" / "incidents.jsonl",
        [{"step": 1, "reason": EVIL, "samples": [{"id": EVIL, "text": EVIL, "loss": EVIL}]}],
    )
    metric = {"kind": "train", "step": 50, EVIL: 1.0, "loss": 1.0}
    write_lines(root / "<i>run" / "metrics.jsonl", [metric, {"kind": EVIL, "step": 1, EVIL: 2}])
    write_json(root / "<i>run" / "environment.json", {EVIL: EVIL, "processor": EVIL})
    write_json(root / "<i>run" / "config.json", {EVIL: EVIL, "task": {"kind": EVIL}})
    row = {"file": "a.mp4", "prompt": EVIL, "seed": 0, "checkpoint": EVIL, "sampling": {EVIL: EVIL}}
    write_samples(root / "samples", [{**row, "scores": {EVIL: 0.5}}])
    write_lines(
        root / "more" / "samples.jsonl",
        [{"file": f"{EVIL}.mp4", "prompt": EVIL}, {"file": "../../../etc/passwd", "prompt": EVIL}],
    )
    write_json(root / "scores.json", {EVIL: {EVIL: {"mean": 0.5}}, "x": EVIL})
    write_json(root / "commands.json", [{"command": EVIL}])
    page = read_page(write_report(root))
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert not page.all("img")
    assert not [n for n in page.all() for name in n.attributes if name.startswith("on")]
    prompts = [p.text for p in page.all("p", class_="prompt")]
    assert prompts == [EVIL] * 3
    assert page.one("h1").text == "<b>root & co"
    assert "etc/passwd" in section(page, "missing").text
    assert "root:" not in page.text


def test_what_could_not_be_read_is_listed(tree):
    (tree / "samples" / "1.mp4").write_bytes(b"not a video")
    (tree / "samples" / "2.mp4").unlink()
    with open(tree / "runs" / "t2v" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "tr')
    page = read_page(write_report(tree))
    cells = [row.all("td") for row in section(page, "missing").all("tr")]
    rows = {name.text: reason.text for name, reason in cells}
    assert rows.keys() == {"samples/1.mp4", "samples/2.mp4", "runs/t2v/metrics.jsonl"}
    assert rows["samples/2.mp4"] == "does not exist"
    assert len(section(page, "samples").all("div", class_="missing")) == 2


def test_beyond_the_budget_clips_are_linked_and_the_page_says_so(tree):
    page = read_page(write_report(tree, max_bytes=0))
    sources = [video.attributes["src"] for video in page.all("video")]
    assert "samples/0.mp4" in sources
    assert all((tree / source).is_file() for source in sources)
    assert f"{len(sources)} did not fit the page's size limit" in section(page, "missing").text


def test_clips_outside_the_folder_are_linked_and_the_page_says_so(tree, tmp_path):
    (tree / "data" / "videos").rename(tmp_path / "footage")
    table = (tree / "data" / "manifest.csv").read_text().replace("videos/", f"{tmp_path}/footage/")
    (tree / "data" / "manifest.csv").write_text(table)
    page = read_page(write_report(tree))
    videos = section(page, "data").all("video")
    assert [v.attributes["src"] for v in videos] == [f"../footage/{i}.mp4" for i in range(3)]
    assert "3 lie outside the reported folder" in section(page, "missing").text


def test_a_list_of_troubles_ends_somewhere(tmp_path):
    rows = [{"file": f"{i}.mp4", "prompt": "x"} for i in range(MAX_NOTES + 3)]
    write_lines(tmp_path / "samples.jsonl", rows)
    node = section(read_page(write_report(tmp_path)), "missing")
    assert len(node.all("tr")) == MAX_NOTES
    assert "3 more." in node.text


def test_only_what_exists_is_shown(tmp_path):
    write_json(tmp_path / "scores.json", {"model": {"colour": {"mean": 0.5}}})
    page = read_page(write_report(tmp_path))
    assert [node.attributes["id"] for node in page.all("section")] == ["scores"]
    assert tiles(page.one("header")) == {"Colour right (model)": "50%"}
    assert not page.all("video")


def test_a_run_that_has_only_begun_can_be_shown(tmp_path):
    write_json(tmp_path / "config.json", {"steps": 100})
    write_json(tmp_path / "environment.json", {})
    page = read_page(write_report(tmp_path))
    assert "No finite figures were recorded yet." in section(page, "training").text


def test_skips_and_non_finite_losses_are_told(tmp_path):
    rows = [{"step": s, "loss": "nan" if s == 3 else 1.0, "skipped": s == 3} for s in range(1, 9)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    node = section(read_page(write_report(tmp_path)), "training")
    assert "1 record not finite, left out of the curve; 1 skipped step in red" in node.text


def test_many_samples_fold_and_many_steps_are_spread(tmp_path):
    rows = [{"file": f"{i}.mp4", "prompt": str(i)} for i in range(26)]
    write_samples(tmp_path / "samples", rows)
    write_lines(tmp_path / "run" / "metrics.jsonl", [{"step": 1, "loss": 1}])
    for step in range(10, 110, 10):
        path = tmp_path / "run" / "samples" / f"step-{step:06d}" / "0000-x.mp4"
        write_video(path, moving_square(), fps=8)
    page = read_page(write_report(tmp_path))
    gallery = section(page, "samples")
    assert [summary.text for summary in gallery.all("summary")] == ["2 more"]
    assert len(gallery.all("video")) == 26
    assert len(gallery.one("details").all("video")) == 2
    assert not gallery.all("button")
    steps = [th.text for th in page.one("table", class_="learning").all("th")]
    assert steps == ["prompt", *(f"step {step}" for step in (10, 30, 50, 60, 80, 100)), "x"]
    assert "Shown: 6 of 10 steps." in section(page, "training").text


def test_impossible_calls_are_refused(tmp_path):
    with pytest.raises(UsageError, match="is not a folder"):
        write_report(tmp_path / "missing")
    with pytest.raises(UsageError, match="max_bytes is -1"):
        write_report(tmp_path, max_bytes=-1)
    with pytest.raises(DataError, match="nothing to report"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_of_text_and_lines_stand_out_from_the_paper(page, scheme):
    """WCAG 2.2: contrast of 4.5 for text (1.4.3) and 3 for graphics (1.4.11)."""
    css = page.one("style").text
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", blocks[scheme == "dark"]))
    for name, bound in [("ink", 7), ("quiet", 4.5), ("accent", 4.5), ("good", 4.5), ("bad", 4.5)]:
        assert _contrast(colours[name], colours["paper"]) >= bound, name
    for name in [f"c{i}" for i in range(6)] + [f"ramp{i}" for i in range(10)]:
        assert _contrast(colours[name], colours["paper"]) >= 3, name
    assert _contrast(colours["good"], colours["good-paper"]) >= 4.5
    assert _contrast(colours["bad"], colours["bad-paper"]) >= 4.5


def _contrast(first: str, second: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
