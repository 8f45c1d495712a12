"""Files that upstream's scripts accept, intervals, tables, and ranks that share the judging."""

import json
from pathlib import Path

import numpy as np
import pytest

from opensora.cli.main import invoke
from opensora.errors import DataError
from opensora.evaluate.suite import Subject, write_scores
from opensora.evaluate.vbench import results, table
from opensora.evaluate.vbench.aggregate import upstream_totals
from opensora.evaluate.vbench.judge import Row
from opensora.evaluate.vbench.measures import Measured
from opensora.evaluate.vbench.published import DIMENSIONS, PUBLISHED, raw_of
from opensora.evaluate.vbench.suite import SUITE
from opensora.evaluate.vbench.upstream import Delegated
from opensora.evaluate.vbench.videos import Video
from opensora.media.read import read_clip

from .conftest import ENTRIES, Painter, moving, slide
from .ranks import on_ranks


def rows(*pairs) -> list[Row]:
    videos = [Video(Path(f"v{i}.mp4"), f"v{i}") for i in range(len(pairs))]
    return [Row(video, Measured(*pair)) for video, pair in zip(videos, pairs, strict=True)]


def as_the_script_reads(path) -> dict[str, float]:
    """What scripts/cal_final_score.py of Vchitect/VBench takes from a results file."""
    tree = json.loads(path.read_text())
    return {key.replace("_", " "): tree[key][0] for key in tree}


def test_the_results_file_is_what_the_final_score_script_reads(tmp_path):
    findings = {name: Delegated(score, []) for name, score in raw_of("Mochi-1").items()}
    results.write_json(tmp_path / "x_eval_results.json", results.upstream_shape(findings))
    read = as_the_script_reads(tmp_path / "x_eval_results.json")
    assert read == {name.replace("_", " "): raw for name, raw in raw_of("Mochi-1").items()}
    assert all(isinstance(value, float) for value in read.values())


def test_an_overall_score_weighs_frames_where_upstream_does():
    shaped = results.upstream_shape({"subject_consistency": rows((1.0, 1), (0.5, 3))})
    assert shaped["subject_consistency"][0] == 0.625
    assert shaped["subject_consistency"][1] == [
        {"video_path": "v0.mp4", "video_results": 1.0},
        {"video_path": "v1.mp4", "video_results": 0.5},
    ]


def test_dynamic_degree_is_a_verdict_of_each_video():
    shaped = results.upstream_shape({"dynamic_degree": rows((1.0,), (0.0,))})
    assert shaped["dynamic_degree"][0] == 0.5
    assert [row["video_results"] for row in shaped["dynamic_degree"][1]] == [True, False]
    assert json.loads(json.dumps(shaped)) == shaped


def test_intervals_hold_the_mean_and_narrow_with_more_videos():
    chance = np.random.default_rng(0)
    few = rows(*((v,) for v in chance.random(10)))
    many = rows(*((v,) for v in chance.random(1000)))
    widths = []
    for finding in (few, many):
        found = results.groups({"color": finding}, {}, "v1")["vbench"]["color"]
        assert found["low"] <= found["mean"] <= found["high"]
        widths.append(found["high"] - found["low"])
    # Standard error of a uniform number: sqrt(1/12/n), times 2 x 1.96.
    assert widths[1] == pytest.approx(2 * 1.96 * (1 / 12 / 1000) ** 0.5, rel=0.15)
    assert widths[0] > 5 * widths[1]


def test_an_interval_lies_about_upstreams_own_score():
    videos = [{"video_path": f"v{i}", "video_results": value} for i, value in enumerate((20, 60))]
    found = results.groups({"imaging_quality": Delegated(0.5, videos)}, {}, "v1")
    # Resamples of 0.2 and 0.6 go from 0.2 to 0.6; upstream's score is 0.1 above their mean.
    expected = {"mean": 0.5, "low": 0.3, "high": 0.7, "n": 2}
    assert found["vbench"]["imaging_quality"] == pytest.approx(expected)


def test_one_video_has_an_interval_of_nothing():
    found = results.groups({"color": rows((0.3,))}, {}, "v1")["vbench"]["color"]
    assert found == {"mean": 0.3, "low": 0.3, "high": 0.3, "n": 1}


def test_totals_have_intervals_and_only_when_all_are_there():
    findings = {name: rows((0.4,), (0.8,)) for name in DIMENSIONS}
    found = results.groups(findings, {}, "v1")
    assert set(found) == {"vbench", "totals"}
    assert set(found["totals"]) == {"quality", "semantic", "total"}
    assert found["totals"]["total"]["n"] == 16
    assert found["totals"]["total"]["low"] < found["totals"]["total"]["mean"]
    mean = upstream_totals(dict.fromkeys(DIMENSIONS, 0.6))["total"]
    assert found["totals"]["total"]["mean"] == pytest.approx(mean)
    del findings["scene"]
    assert set(results.groups(findings, {}, "v1")["totals"]) == {"quality"}


def test_proxies_are_a_group_of_their_own_and_enter_no_total():
    proxies = {"proxy.motion": rows((3.0,))}
    found = results.groups({}, proxies, "v1")
    assert list(found) == ["proxy"]
    findings = {name: rows((0.4,)) for name in DIMENSIONS}
    with_them = results.groups(findings, proxies, "v1")
    assert with_them["totals"] == results.groups(findings, {}, "v1")["totals"]


def test_ranks_share_the_judging_and_find_what_one_finds(tmp_path, prompts_file):
    settings = {"prompts": str(prompts_file), "samples_per_prompt": 2, "flicker_samples": 3}
    config = SUITE.config.model_validate(settings)

    def judge(output, **kwargs):
        return SUITE.run(Subject(Painter(moving), **kwargs), config, output, lambda *s: None)

    one = judge(tmp_path / "out")
    answers = on_ranks(2, lambda place: judge(tmp_path / "out", place=place))
    assert answers == [one, one]


def test_a_table_has_runs_beside_published_models(tmp_path):
    findings = {name: Delegated(raw, []) for name, raw in raw_of("Mochi-1").items()}
    scores = results.groups(findings, {}, "v1")
    settings = {"suite": "vbench", "warnings": ["still pictures: none moves"]}
    whole, part = tmp_path / "whole", tmp_path / "part"
    for folder in (whole, part):
        folder.mkdir()
        write_scores(folder, {**scores, "settings": settings})
        scores["vbench"].pop("color", None)  # the second run lacks it
    text = table.markdown([whole, part])
    cells = {row.split(" | ")[0].strip("| "): row.split(" | ")[1:] for row in text.splitlines()}
    assert len(cells["total"]) == 2 + len(PUBLISHED)
    assert cells["total"][:2] == ["80.13", "-"]
    assert cells["quality"][:2] == ["82.64", "82.64"]
    assert cells["color"][:2] == ["79.73", "-"]
    assert f"{whole}: still pictures" in text
    assert "Mochi-1" not in table.markdown([whole], anchors=False)


def test_a_table_of_something_else_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        table.read(tmp_path)
    (tmp_path / "scores.json").write_text(json.dumps({"settings": {"suite": "arena"}}))
    with pytest.raises(DataError, match="not written by vbench"):
        table.read(tmp_path)
    for name, suite in (("a", "vbench"), ("b", "vbench-i2v")):
        (tmp_path / name).mkdir()
        settings = {"settings": {"suite": suite, "warnings": []}}
        (tmp_path / name / "scores.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="do not fit in one table"):
        table.markdown([tmp_path / "a", tmp_path / "b"])


def test_the_command_draws_for_a_tiny_model_and_judges_its_folder(world, tmp_path, capsys):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(ENTRIES))
    words = [
        "eval",
        str(world.generator),
        "--suite",
        "vbench",
        "-o",
        str(tmp_path / "out"),
        f"prompts={prompts}",
        "samples_per_prompt=1",
        "flicker_samples=1",
        "sampling.schedule.num_steps=2",
        "--device",
        "cpu",
    ]
    assert invoke(words) == 0
    samples = tmp_path / "out/samples"
    assert len(list(samples.glob("*.mp4"))) == 4
    assert "temporal_flickering" in capsys.readouterr().out
    again = [
        "eval",
        str(samples),
        "--suite",
        "vbench",
        "-o",
        str(tmp_path / "again"),
        f"prompts={prompts}",
        "samples_per_prompt=1",
        "flicker_samples=1",
        "--device",
        "cpu",
    ]
    assert invoke(again) == 0
    first, second = (
        json.loads((tmp_path / name / "scores.json").read_text()) for name in ("out", "again")
    )
    assert first["vbench"] == second["vbench"]
    assert first["settings"]["weights"] is not None
    assert second["settings"]["weights"] is None


def test_the_command_names_a_setting_that_there_is_not(tmp_path, capsys, fill):
    folder = fill(tmp_path / "v", {"x.mp4": slide(3, 32, 32, 4)})
    assert len(read_clip(folder / "x.mp4").frames) == 3
    assert invoke(["eval", str(folder), "--suite", "vbench", "sample_per_prompt=1"]) == 64
    assert "samples_per_prompt" in capsys.readouterr().err
