"""The suite from end to end: drawing, folders, skipped dimensions, warnings, files."""

import json
import logging
import math
import sys

import pytest

from opensora.cli.judging import SUITES
from opensora.errors import DataError, NumericsError, UsageError
from opensora.evaluate import results
from opensora.evaluate.compare import compare
from opensora.evaluate.suite import Subject
from opensora.evaluate.vbench.config import I2VConfig, VBenchConfig
from opensora.evaluate.vbench.judge import MOTION, PROXIES
from opensora.evaluate.vbench.suite import I2V_SUITE, SUITE
from opensora.media.read import read_clip
from opensora.media.write import write_image

from .conftest import ENTRIES, Painter, moving, slide, still


def judge(subject, output, suite=SUITE, **settings):
    config = suite.config.model_validate(settings)
    return suite.run(subject, config, output, lambda *stage: None)


@pytest.fixture
def standard(tmp_path, fill):
    """A folder with two samples of every prompt that moves, and a still one for flickering."""
    videos = {}
    for number, entry in enumerate(ENTRIES):
        paint = still if number == 0 else moving
        for i in range(2):
            videos[f"{entry['prompt_en']}-{i}.mp4"] = paint("", 10 * number + i)
    return fill(tmp_path / "videos", videos)


def test_a_model_is_drawn_for_and_judged(tmp_path, prompts_file):
    painter = Painter(moving)
    scores = judge(
        Subject(painter),
        tmp_path / "out",
        prompts=str(prompts_file),
        samples_per_prompt=2,
        flicker_samples=3,
    )
    assert len(painter.drawn) == 3 + 3 * 2
    assert sorted(p.name for p in (tmp_path / "out/samples").glob("*.mp4")) == sorted(
        [f"{ENTRIES[0]['prompt_en']}-{i}.mp4" for i in range(3)]
        + [f"{ENTRIES[k]['prompt_en']}-{i}.mp4" for k in (1, 2, 3) for i in range(2)]
    )
    assert set(scores["vbench"]) == {"temporal_flickering"}
    assert scores["vbench"]["temporal_flickering"]["n"] == 2
    assert "totals" not in scores
    assert set(scores["proxy"]) == {"proxy.motion", "proxy.smoothness"}
    assert scores["settings"]["weights"] == "painter"
    written = json.loads((tmp_path / "out/scores.json").read_text())
    assert written == json.loads(json.dumps(scores))


def test_the_same_call_again_draws_nothing_and_finds_the_same(tmp_path, prompts_file):
    settings = {"prompts": str(prompts_file), "samples_per_prompt": 1, "flicker_samples": 1}
    first = judge(Subject(Painter(moving)), tmp_path / "out", **settings)
    again = Painter(moving)
    assert judge(Subject(again), tmp_path / "out", **settings) == first
    assert again.drawn == []


def test_every_skipped_dimension_says_what_it_needs_and_where(tmp_path, standard):
    skipped = judge(Subject(videos=standard), tmp_path / "out")["settings"]["skipped"]
    assert len(skipped) == 15
    assert (
        "dino-vitb16 (343 MB, huggingface.co/facebook/dino-vitb16)"
        in (skipped["subject_consistency"])
    )
    assert "weights_dir, which is not set, or download=true" in skipped["subject_consistency"]
    assert "raft-things.pth (21 MB" in skipped["dynamic_degree"]
    assert "download" not in skipped["dynamic_degree"]
    assert "needs VBench's own package with grit_b" in skipped["object_class"]
    assert "has no package" not in skipped["object_class"], "nobody named an interpreter"
    upstream = {"python": sys.executable}
    named = judge(Subject(videos=standard), tmp_path / "named", upstream=upstream)
    assert "has no package vbench" in named["settings"]["skipped"]["object_class"]
    empty = tmp_path / "weights"
    empty.mkdir()
    again = judge(Subject(videos=standard), tmp_path / "out", weights_dir=str(empty))
    assert f"in '{empty}'" in again["settings"]["skipped"]["aesthetic_quality"]


def test_a_folder_in_vbench_names_is_judged_without_drawing(tmp_path, standard):
    scores = judge(Subject(videos=standard), tmp_path / "out", dimensions=["temporal_flickering"])
    value = scores["vbench"]["temporal_flickering"]
    assert value["n"] == 2
    assert value["mean"] > 0.999
    assert value["low"] <= value["mean"] <= value["high"]
    info = json.loads((tmp_path / "out/vbench_full_info.json").read_text())
    named = next(e for e in info if e["prompt_en"] == ENTRIES[0]["prompt_en"])
    assert [v.rsplit("/")[-1] for v in named["video_list"]] == [
        f"{ENTRIES[0]['prompt_en']}-{i}.mp4" for i in range(2)
    ]
    results = json.loads((tmp_path / "out/vbench_eval_results.json").read_text())
    overall, rows = results["temporal_flickering"]
    assert overall == value["mean"]
    assert [set(row) for row in rows] == [{"video_path", "video_results"}] * 2


def test_a_measure_that_is_no_number_is_refused_and_taken_again(tmp_path, fill, monkeypatch):
    folder = fill(tmp_path / "videos", {f"v{i}.mp4": slide(5, 32, 48, 4, seed=i) for i in (0, 1)})
    told = r"proxy\.motion of group 'proxy' is no finite number for 2 of 2 samples.* 'v0\.mp4'"
    with monkeypatch.context() as patch:
        patch.setitem(PROXIES, MOTION, lambda frames: math.nan)
        with pytest.raises(NumericsError, match=told):
            judge(Subject(videos=folder), tmp_path / "out", mode="custom")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["measures.jsonl"]
    scores = judge(Subject(videos=folder), tmp_path / "out", mode="custom")
    assert scores["proxy"][MOTION]["mean"] > 0


def test_still_pictures_are_called_out(tmp_path, fill, caplog):
    frames = {f"v{i}.mp4": slide(5, 32, 48, 0, seed=i) for i in range(3)}
    folder = fill(tmp_path / "still", frames)
    with caplog.at_level(logging.WARNING, logger="opensora"):
        scores = judge(Subject(videos=folder), tmp_path / "out", mode="custom")
    assert scores["settings"]["warnings"][0].startswith("still pictures: in 100% of the videos")
    assert "0.79" in scores["settings"]["warnings"][0]
    assert "still pictures" in caplog.text
    frames = {f"v{i}.mp4": slide(5, 32, 48, 4, seed=i) for i in range(3)}
    scores = judge(Subject(videos=fill(tmp_path / "go", frames)), tmp_path / "o2", mode="custom")
    assert not any("still" in text for text in scores["settings"]["warnings"])


def test_long_videos_are_called_out_also_when_nothing_is_measured_again(tmp_path, fill):
    folder = fill(tmp_path / "v", {"a.mp4": slide(10, 32, 48, 4), "b.mp4": slide(9, 32, 48, 4)}, 2)
    for _ in range(2):
        scores = judge(Subject(videos=folder), tmp_path / "out", mode="custom")
        text = " ".join(scores["settings"]["warnings"])
        assert "1 of 2 videos last 5 seconds or more ('a.mp4' 5.0)" in text
        assert "VBench-Long" in text


def test_stills_that_were_asked_for_are_no_trap(tmp_path, standard):
    scores = judge(Subject(videos=standard), tmp_path / "out")
    assert not any("still pictures" in text for text in scores["settings"]["warnings"])


def test_what_is_missing_is_counted_and_named(tmp_path, standard):
    settings = judge(Subject(videos=standard), tmp_path / "out")["settings"]
    # 869 distinct prompts at 5 and flickering's 75 at 25 are 6,220; eight are there.
    assert settings["missing"]["count"] == 6220 - 8
    assert len(settings["missing"]["first"]) == 10
    assert any("are missing" in text for text in settings["warnings"])


@pytest.mark.parametrize("samples", [1, 2])
def test_a_folder_without_the_samples_for_flickering_is_told_the_setting(
    samples, tmp_path, standard, prompts_file
):
    settings = {"prompts": str(prompts_file), "samples_per_prompt": samples}
    told = judge(Subject(videos=standard), tmp_path / "out", **settings)["settings"]["warnings"]
    (line,) = [text for text in told if "are missing" in text]
    assert line.endswith(
        "23 of them are more samples for temporal_flickering, of which the folder has 2 a prompt: "
        "set flicker_samples=2"
    )
    settings["flicker_samples"] = 2
    told = judge(Subject(videos=standard), tmp_path / "out", **settings)["settings"]["warnings"]
    assert not any("are missing" in text for text in told)


def test_a_stray_name_is_named_with_its_nearest_prompt(tmp_path, standard, fill):
    fill(standard, {"a person swimming in the ocean-0.mp4": moving("", 1)})
    warnings = judge(Subject(videos=standard), tmp_path / "out")["settings"]["warnings"]
    text = next(t for t in warnings if "belong to no prompt" in t)
    assert "nearest prompt: 'a person swimming in ocean'" in text


def test_a_folder_of_other_names_is_refused_with_the_nearest(tmp_path, fill):
    folder = fill(tmp_path / "v", {"In a still frame, stop sign-0.mp4": still("", 0)})
    with pytest.raises(DataError, match=r"nearest: 'In a still frame, a stop sign'.*mode=custom"):
        judge(Subject(videos=folder), tmp_path / "out")


def test_an_unreadable_video_is_named_and_left_out(tmp_path, standard):
    (standard / f"{ENTRIES[0]['prompt_en']}-0.mp4").write_bytes(b"not a video at all")
    scores = judge(Subject(videos=standard), tmp_path / "out", dimensions=["temporal_flickering"])
    assert scores["vbench"]["temporal_flickering"]["n"] == 1
    assert f"{ENTRIES[0]['prompt_en']}-0.mp4" in scores["settings"]["unusable"][0]
    assert any("could not be taken" in text for text in scores["settings"]["warnings"])


def test_a_dimension_without_a_single_usable_video_has_no_score(tmp_path, fill):
    folder = fill(tmp_path / "v", {"one.mp4": slide(1, 32, 48, 0)})
    scores = judge(Subject(videos=folder), tmp_path / "out", mode="custom")
    assert "vbench" not in scores
    assert "one frame is no video" in scores["settings"]["skipped"]["temporal_flickering"]


def test_what_lacks_the_same_is_told_in_one_line_and_no_total_is_explained(
    tmp_path, standard, caplog
):
    with caplog.at_level(logging.INFO, logger="opensora"):
        judge(Subject(videos=standard), tmp_path / "out")
    lines = [record.getMessage() for record in caplog.records]
    of = [line for line in lines if "grit_b" in line]
    assert len(of) == 1
    assert "object_class, multiple_objects, color, spatial_relationship: needs" in of[0]
    assert "no Total: it takes all of its dimensions, of which 1 were measured" in lines


def test_what_a_killed_call_left_half_written_is_cleared(tmp_path, standard):
    left = tmp_path / "out" / ".scores.json.0123abcd.tmp"
    left.parent.mkdir()
    left.write_text("{")
    judge(Subject(videos=standard), tmp_path / "out")
    assert [p.name for p in left.parent.iterdir() if p.name.startswith(".")] == []


def test_subsets_say_that_they_are_no_protocol(tmp_path, prompts_file):
    settings = {"prompts": str(prompts_file), "samples_per_prompt": 1, "flicker_samples": 1}
    scores = judge(Subject(Painter(moving)), tmp_path / "out", num_prompts=1, **settings)
    (text,) = [t for t in scores["settings"]["warnings"] if "protocol" in t]
    assert "1 prompts a dimension" in text
    assert "1 of 5 samples" in text


def test_a_static_list_decides_which_videos_count_for_flickering(tmp_path, standard):
    prompt = ENTRIES[0]["prompt_en"]
    for number, tree in enumerate(
        ([f"{prompt}-1.mp4"], {prompt: {"static_count": 1, "static_path": [f"x/{prompt}-1.mp4"]}})
    ):
        listed = tmp_path / f"static{number}.json"
        listed.write_text(json.dumps(tree))
        out = tmp_path / f"out{number}"
        scores = judge(
            Subject(videos=standard),
            out,
            dimensions=["temporal_flickering"],
            static_list=str(listed),
        )
        assert scores["vbench"]["temporal_flickering"]["n"] == 1
        info = json.loads((out / "vbench_full_info.json").read_text())
        assert info[0]["video_list"] == [str(standard / f"{prompt}-1.mp4")]
        assert not any("without the static filter" in t for t in scores["settings"]["warnings"])
        assert any("fewer than 5" in t for t in scores["settings"]["warnings"])


def test_a_static_list_with_a_wrong_name_is_refused(tmp_path, standard):
    listed = tmp_path / "static.json"
    listed.write_text(json.dumps(["In a still frame, a stop sgn-1.mp4"]))
    with pytest.raises(UsageError, match=r"static_list .* names .*Did you mean 'In a still"):
        judge(Subject(videos=standard), tmp_path / "out", static_list=str(listed))
    listed.write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        judge(Subject(videos=standard), tmp_path / "out", static_list=str(listed))


def test_settings_that_would_do_nothing_are_refused(tmp_path, standard):
    with pytest.raises(UsageError, match="seed means nothing for finished videos"):
        judge(Subject(videos=standard), tmp_path / "out", seed=3)
    with pytest.raises(UsageError, match="leave out num_prompts"):
        judge(Subject(videos=standard), tmp_path / "out", mode="custom", num_prompts=3)
    with pytest.raises(UsageError, match="color depends on VBench's prompts"):
        judge(Subject(videos=standard), tmp_path / "out", mode="custom", dimensions=["color"])
    with pytest.raises(UsageError, match="mode=custom judges finished videos"):
        judge(Subject(Painter(moving)), tmp_path / "out", mode="custom")
    with pytest.raises(ValueError, match="Did you mean 'dynamic_degree'"):
        VBenchConfig(dimensions=("dynamic_degre",))
    with pytest.raises(ValueError, match="i2v_subject"):
        I2VConfig(dimensions=("i2v_subjct",))
    with pytest.raises(ValueError, match="twice"):
        VBenchConfig(dimensions=("color", "color"))


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.mp4 or \.gif"):
        judge(Subject(videos=tmp_path / "empty"), tmp_path / "out")


def test_i2v_judges_a_folder(tmp_path, fill):
    name = "a close up of a blue and orange liquid-0.mp4"
    folder = fill(tmp_path / "v", {name: moving("", 1)})
    scores = judge(Subject(videos=folder), tmp_path / "out", suite=I2V_SUITE)
    assert set(scores["vbench"]) == {"temporal_flickering"}
    assert "DreamSim" in scores["settings"]["skipped"]["i2v_background"]
    assert scores["settings"]["suite"] == "vbench-i2v"
    with pytest.raises(UsageError, match="give their folder as pictures"):
        judge(Subject(Painter(moving)), tmp_path / "out", suite=I2V_SUITE)


def test_i2v_draws_videos_that_begin_with_the_pictures(tmp_path):
    entries = [
        {
            "prompt_en": f"a cup {i}",
            "dimension": ["i2v_subject", "temporal_flickering"],
            "image_name": f"cup {i}.png",
        }
        for i in range(2)
    ]
    prompts, pictures = tmp_path / "p.json", tmp_path / "pictures"
    prompts.write_text(json.dumps(entries))
    write_image(pictures / "cup 0.png", slide(1, 32, 48, 0, seed=7)[0])
    settings = {"prompts": str(prompts), "samples_per_prompt": 1, "pictures": str(pictures)}
    painter = Painter(moving)
    with pytest.raises(DataError, match=r"'cup 1\.png' of 'a cup 1' is not in"):
        judge(Subject(painter), tmp_path / "out", suite=I2V_SUITE, **settings)
    assert painter.drawn == []
    write_image(pictures / "cup 1.png", slide(1, 32, 48, 0, seed=8)[0])
    judge(Subject(painter), tmp_path / "out", suite=I2V_SUITE, **settings)
    assert {p.name for p in (tmp_path / "out/samples").glob("*.mp4")} == {
        "a cup 0-0.mp4",
        "a cup 1-0.mp4",
    }
    for number, (given,) in enumerate(painter.given):
        assert (given.frames == slide(1, 32, 48, 0, seed=7 + number)).all()
        assert given.at == 0


def test_rewritten_prompts_are_told_and_files_keep_the_old_names(tmp_path, prompts_file):
    told = [f"a long story of {i}" for i in range(len(ENTRIES))]
    text = tmp_path / "longer.txt"
    text.write_text("\n".join(told) + "\n")
    listed = tmp_path / "longer.json"
    listed.write_text(
        json.dumps({e["prompt_en"]: t for e, t in zip(ENTRIES[:4], told, strict=False)})
    )
    for path in (text, listed):
        painter = Painter(moving)
        out = tmp_path / path.suffix
        scores = judge(
            Subject(painter),
            out,
            prompts=str(prompts_file),
            samples_per_prompt=1,
            flicker_samples=1,
            rewritten=str(path),
        )
        assert [prompt for prompt, _ in painter.drawn] == told[:4]
        names = {p.stem for p in (out / "samples").glob("*.mp4")}
        assert names == {f"{e['prompt_en']}-0" for e in ENTRIES}
        assert any("rewritten prompts" in text for text in scores["settings"]["warnings"])


def test_rewritten_prompts_that_do_not_fit_are_refused(tmp_path, prompts_file):
    path = tmp_path / "longer.txt"
    settings = {"prompts": str(prompts_file), "samples_per_prompt": 1}
    for content, message in (
        ("one\ntwo\n", "has 2 lines and the prompt file 5 entries"),
        ("one\n\ntwo\nthree\nfour\n", "no text for the prompt 'a person swimming"),
    ):
        path.write_text(content)
        with pytest.raises(UsageError, match=message):
            judge(Subject(Painter(moving)), tmp_path / "o", rewritten=str(path), **settings)
    path = tmp_path / "longer.json"
    path.write_text(json.dumps({ENTRIES[0]["prompt_en"]: "x"}))
    with pytest.raises(UsageError, match="no text for the prompt 'a person swimming"):
        judge(Subject(Painter(moving)), tmp_path / "o", rewritten=str(path), **settings)


def test_the_command_line_knows_both_suites():
    assert SUITES["vbench"] is SUITE
    assert SUITES["vbench-i2v"] is I2V_SUITE


def test_gifs_are_judged_as_well(tmp_path, fill):
    folder = fill(tmp_path / "v", {"anything.gif": moving("", 1)})
    scores = judge(Subject(videos=folder), tmp_path / "out", mode="custom")
    assert scores["vbench"]["temporal_flickering"]["n"] == 1
    assert len(read_clip(folder / "anything.gif").frames) == 5


def test_two_results_are_compared_video_by_video(tmp_path, prompts_file):
    """A still model against one that moves: flicker is measured on the same prompts."""
    settings = {"prompts": str(prompts_file), "samples_per_prompt": 2, "flicker_samples": 2}
    for name, paint in (("a", moving), ("b", still)):
        judge(Subject(Painter(paint)), tmp_path / name, **settings)
    a, b = (results.read(tmp_path / name) for name in "ab")
    found = {(d.group, d.metric): d for d in compare(a, b)}
    flicker = found["vbench", "temporal_flickering"]
    assert flicker.n == 2
    assert flicker.first < flicker.second
    assert flicker.second == pytest.approx(1, abs=0.01)
    assert found["proxy", "proxy.motion"].mean < 0
