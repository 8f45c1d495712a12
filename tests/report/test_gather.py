"""Everything below a folder is found, in whatever state it was left."""

import json
from pathlib import Path

import pytest

from opensora import store
from opensora.report.estimates import parse
from opensora.report.findings import Estimate, Target
from opensora.report.gather import MAX_INCIDENTS, MAX_METRICS, gather, natural_key
from opensora.report.page import write_report
from tests.report.conftest import (
    SCORES,
    moving_square,
    read_page,
    write_json,
    write_lines,
    write_run,
    write_samples,
    write_video,
)


def test_a_whole_tree_is_found(tree):
    found = gather(tree)
    (run,) = found.runs
    assert run.path == tree / "runs" / "t2v"
    assert set(run.samples) == {20, 40}
    assert [s.prompt for s in run.samples[40]] == ["a red circle", "a blue square"]
    assert run.curves["train"]["loss"].values.tolist() == [10, 5, 100 / 30, 2.5]
    assert run.curves["validation"]["psnr"].last() == 27.5
    (gallery,) = found.galleries
    assert [s.is_right for s in gallery.samples] == [True, False, None]
    (scores,) = found.scores
    assert set(scores.groups) == {"trained", "untrained"}
    (dataset,) = found.datasets
    assert (dataset.num_clips, dataset.facts["in all"]) == (3, "1.1 s")
    assert [c["exit"] for c in found.commands] == [0, 65]
    assert found.notes.entries == []
    assert found.newest > 1.7e9


def test_a_run_folder_alone_is_found(tmp_path):
    write_run(tmp_path)
    assert [run.path for run in gather(tmp_path).runs] == [tmp_path]


def test_nothing_is_found_in_nothing(tmp_path):
    assert gather(tmp_path).is_empty


def test_empty_files_are_told_and_hide_nothing_else(tree):
    empty = ["runs/t2v/metrics.jsonl", "runs/t2v/config.json", "scores.json", "commands.json"]
    for name in (*empty, "data/manifest.csv", "samples/samples.jsonl"):
        (tree / name).write_text("")
    found = gather(tree)
    assert len(found.runs) == 1
    told = {name for name, _ in found.notes.entries}
    assert {"runs/t2v/config.json", "scores.json", "commands.json", "data/manifest.csv"} <= told
    assert not found.scores
    assert not found.datasets


@pytest.mark.parametrize("junk", ["null", "[]", '"x"', "7", '{"a": [{"b": null}]}', "{", "\0", "é"])
def test_files_of_any_shape_raise_nothing(tree, junk):
    for path in [p for p in tree.rglob("*") if p.suffix in (".json", ".jsonl", ".csv")]:
        path.write_text(junk, encoding="utf-8")
    found = gather(tree)
    assert all(not run.curves for run in found.runs)
    assert found.scores == ()
    assert all(isinstance(command, dict) for command in found.commands)
    assert sum(dataset.num_clips or 0 for dataset in found.datasets) == 0
    assert "data/manifest.csv" in {name for name, _ in found.notes.entries}


def test_records_without_a_step_are_counted_and_strings_become_numbers(tmp_path):
    rows = [
        {"kind": "train", "step": 1, "loss": "nan", "note": "hello"},
        {"kind": "train", "loss": 1.0},
        {"step": "inf", "loss": 1.0},
        {"step": 1e300, "loss": 1.0},
        {"step": -1, "loss": 1.0},
        {"step": 2, "loss": 0.5, "skipped": True},
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    found = gather(tmp_path)
    (run,) = found.runs
    assert run.curves["train"]["loss"].finite.tolist() == [0.5]
    assert len(run.curves["train"]["loss"]) == 2
    assert "note" not in run.curves["train"]
    assert found.notes.entries == [
        ("metrics.jsonl", "4 records have no usable 'step', and are left out")
    ]


def test_the_number_of_metrics_is_bounded(tmp_path):
    rows = [{"step": 1, **{f"metric_{i}": i for i in range(MAX_METRICS + 7)}}]
    write_lines(tmp_path / "metrics.jsonl", rows)
    found = gather(tmp_path)
    assert len(found.runs[0].curves["train"]) == MAX_METRICS
    assert "7 values" in found.notes.entries[0][1]


def test_incidents_are_counted_beyond_those_kept(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1}])
    write_lines(tmp_path / "incidents.jsonl", [{"step": i} for i in range(MAX_INCIDENTS + 3)])
    (run,) = gather(tmp_path).runs
    assert (len(run.incidents), run.num_incidents) == (MAX_INCIDENTS, MAX_INCIDENTS + 3)


def test_checkpoints_are_listed_with_their_size_and_torn_ones_are_told_apart(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1}])
    for name in ("step-9", "step-10"):
        with store.write(tmp_path / "checkpoints" / name, kind="checkpoint", meta={}) as folder:
            (folder / "config.json").write_text("x" * 100)
            (folder / "metrics.jsonl").write_text("")
    (tmp_path / "checkpoints" / "step-11").mkdir()
    with store.write(tmp_path / "checkpoints" / "step-12", kind="checkpoint", meta={}) as folder:
        (folder / "weights").write_text("x")
    (tmp_path / "checkpoints" / "step-12" / "weights").unlink()
    (run,) = gather(tmp_path).runs
    assert [(c.name, c.num_bytes) for c in run.checkpoints] == [
        ("step-9", 100),
        ("step-10", 100),
        ("step-11", None),
        ("step-12", None),
    ]


def test_a_samples_folder_without_a_list_is_shown_by_its_file_names(tmp_path):
    for name in ("0010-a-red-circle.mp4", "0002-two_fish.mp4", "strange.mp4"):
        write_video(tmp_path / "samples" / name, moving_square(), fps=8)
    write_video(tmp_path / "samples" / "strange.png", moving_square(), fps=8)
    (gallery,) = gather(tmp_path).galleries
    assert [s.prompt for s in gallery.samples] == ["two fish", "a red circle", "strange"]


def test_rows_without_a_file_are_told(tmp_path):
    rows = [{"prompt": "x"}, {"file": 3}, {"file": "a\0b"}, {"file": "a.mp4", "seed": "nan"}]
    write_lines(tmp_path / "samples.jsonl", rows)
    found = gather(tmp_path)
    assert [s.file.name for s in found.galleries[0].samples] == ["a.mp4"]
    assert found.galleries[0].samples[0].seed is None
    assert len(found.notes.entries) == 3


def test_samples_of_a_step_are_part_of_their_run_and_no_gallery(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1}])
    row = {"file": "0000-x.mp4", "prompt": "a fish", "weights": "step 10"}
    write_lines(tmp_path / "samples" / "step-000010" / "samples.jsonl", [row])
    found = gather(tmp_path)
    assert found.galleries == ()
    assert found.runs[0].samples[10][0].prompt == "a fish"


def test_judged_samples_come_first_and_untrained_ones_last(tmp_path):
    for name in ("a", "b_untrained", "c"):
        write_lines(tmp_path / name / "samples.jsonl", [{"file": "x.mp4"}])
    write_lines(tmp_path / "z" / "samples.jsonl", [{"file": "x.mp4", "scores": {"count": 1}}])
    assert [g.path.name for g in gather(tmp_path).galleries] == ["z", "a", "c", "b_untrained"]


def test_tables_that_a_run_was_trained_on_are_found_by_its_config(tree, tmp_path):
    (tree / "data" / "manifest.csv").rename(tree / "data" / "train.csv")
    (tmp_path / "other.csv").write_text("path\n")
    places = {"manifest": f"{tree}/data/train.csv", "validation": f"{tmp_path}/other.csv"}
    write_json(tree / "runs" / "t2v" / "config.json", {"data": places})
    found = gather(tree)
    assert [d.folder_or_file for d in found.datasets] == [tree / "data" / "train.csv"]
    assert found.notes.entries == []


def test_links_to_folders_are_not_followed(tmp_path):
    write_run(tmp_path / "outside")
    root = tmp_path / "root"
    root.mkdir()
    (root / "run").symlink_to(tmp_path / "outside")
    assert gather(root).is_empty


def test_scores_of_any_depth_become_groups():
    nested = {"2": {"colour": {"mean": 0.9}, "seed": 3}, "3": {"colour": {"mean": 0.8, "n": 2}}}
    settings = {"scenes": {"height": 64}, "seed": 1}
    document = {**SCORES, "trained_many": nested, "seed": 3, "settings": settings}
    document["targets"] = {**SCORES["targets"], "trained_many": {"2": {"colour": 0.8}}}
    scores = parse(Path(), document)
    assert scores.groups["trained_many / 2"] == {"colour": Estimate(0.9)}
    assert scores.groups["trained_many / 3"] == {"colour": Estimate(0.8, n=2)}
    assert scores.groups["trained"]["shape"] == Estimate(0.5, 0.4, 0.6, 64)
    assert scores.targets[("trained_many / 2", "colour")] == Target(at_least=0.8)
    assert scores.targets[("untrained", "colour")] == Target(at_most=0.1)
    assert scores.facts == {"seed": 3, "settings": settings}
    assert len(scores.groups) == 4


def test_scores_that_are_no_numbers_are_left_out():
    values = ("NaN", '"inf"', "1e300", '"0.5"', "null", "[]")
    cells = ", ".join(f'"m{i}": {{"mean": {value}}}' for i, value in enumerate(values))
    assert parse(Path(), json.loads(f'{{"a": {{{cells}, "bare": 1}}}}')).groups == {}


def test_targets_are_met_at_their_bound():
    assert Target(at_least=0.95).met(0.95)
    assert not Target(at_least=0.95).met(0.949)
    assert Target(at_most=0.1).met(0.1)
    assert not Target(at_most=0.1).met(0.11)


def test_names_sort_as_people_count():
    assert sorted(["step-10", "step-9", "a"], key=natural_key) == ["a", "step-9", "step-10"]


def test_unreadable_scores_are_told_once(tmp_path):
    write_json(tmp_path / "scores.json", {"seed": "x"})
    assert gather(tmp_path).notes.entries == [("scores.json", "holds no scores")]


def test_given_frames_are_named_beside_the_seed(tmp_path):
    references = [{"path": "/a/b/first.png", "at": 0}, {"path": "/a/b/first.png", "at": -1}]
    rows = [
        {"file": "a.mp4", "prompt": "a", "seed": 3, "references": references},
        {"file": "b.mp4", "prompt": "b", "seed": 4, "references": "none"},
    ]
    write_samples(tmp_path / "samples", rows)
    given, free = gather(tmp_path).galleries[0].samples
    assert given.given == ("first.png",)
    assert free.given == ()
    page = read_page(write_report(tmp_path))
    assert [span.text for span in page.all("span", class_="seed")] == [
        "seed 3 · given first.png",
        "seed 4",
    ]


def test_what_a_suite_found_during_training_is_one_chart(tmp_path):
    rows = [
        {"kind": "evaluation", "step": step, "trained/colour": step / 8, "trained/speed": 0.5}
        for step in (4, 8)
    ]
    write_run(tmp_path / "run")
    write_lines(tmp_path / "run" / "metrics.jsonl", rows)
    text = read_page(write_report(tmp_path)).text
    assert "Judged during training" in text
    assert "speed (evaluation)" in text
    assert "colour (evaluation)" not in text
