"""A dataset on disk is complete, resumable, honest about what it holds, and can grow."""

import csv
import json
import os
from collections import Counter

import numpy as np
import pytest

from opensora.arena.dataset import COLUMNS, prompts, write_dataset
from opensora.arena.draw import render
from opensora.arena.grammar import promise
from opensora.arena.scenes import HELD_OUT, SceneConfig, sample
from opensora.errors import DataError, UsageError

CONFIG = SceneConfig()


def rows(manifest):
    with open(manifest, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def manifest(tmp_path):
    return write_dataset(tmp_path / "scenes", CONFIG, seed=3, count=4)


def test_the_manifest_names_real_videos_of_the_scenes(manifest):
    av = pytest.importorskip("av")
    found = rows(manifest)
    assert tuple(found[0]) == COLUMNS
    for index, row in enumerate(found):
        scene = sample(CONFIG, 3, index)
        assert row["text"] == scene.caption
        with av.open(str(manifest.parent / row["path"])) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert float(stream.average_rate) == float(row["fps"]) == 8.0
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
        assert len(frames) == int(row["num_frames"]) == 17
        assert frames[0].shape == (int(row["height"]), int(row["width"]), 3)


def test_the_videos_show_the_scenes(manifest):
    from opensora.media.read import read_clip

    for index, row in enumerate(rows(manifest)):
        decoded = read_clip(manifest.parent / row["path"]).frames.astype(float)
        error = np.square(decoded - render(sample(CONFIG, 3, index))).mean()
        # Half the chroma resolution alone costs about this much at saturated edges.
        assert 10 * np.log10(255**2 / error) > 30


def test_the_truth_has_one_line_a_video(manifest):
    lines = (manifest.parent / "truth.jsonl").read_text(encoding="utf-8").splitlines()
    told = [json.loads(line) for line in lines]
    assert [t["id"] for t in told] == [row["id"] for row in rows(manifest)]
    assert [t["caption"] for t in told] == [row["text"] for row in rows(manifest)]
    scene = sample(CONFIG, 3, 1)
    np.testing.assert_allclose(
        told[1]["objects"][0]["position"], scene.positions[:, 0], atol=5.1e-4
    )


def test_a_second_call_adds_only_what_is_missing(manifest):
    videos = manifest.parent / "videos"
    before = {path.name: path.stat().st_mtime_ns for path in videos.iterdir()}
    (videos / "train-000002.mp4").unlink()
    seen = []
    write_dataset(
        manifest.parent,
        CONFIG,
        seed=3,
        count=6,
        progress=lambda done, count: seen.append((done, count)),
    )
    after = {path.name: path.stat().st_mtime_ns for path in videos.iterdir()}
    assert seen == [(3, 6), (4, 6), (5, 6), (6, 6)]
    assert len(after) == len(rows(manifest)) == 6
    kept = set(before) - {"train-000002.mp4"}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_the_first_scenes_do_not_depend_on_the_count(manifest, tmp_path):
    larger = write_dataset(tmp_path / "larger", CONFIG, seed=3, count=5)
    assert rows(larger)[:4] == rows(manifest)
    for row in rows(manifest):
        first, second = manifest.parent / row["path"], larger.parent / row["path"]
        assert first.read_bytes() == second.read_bytes()


def test_workers_write_the_same_files(manifest, tmp_path):
    apart = write_dataset(tmp_path / "apart", CONFIG, seed=3, count=4, workers=2)
    assert apart.read_bytes() == manifest.read_bytes()
    for row in rows(manifest):
        assert (apart.parent / row["path"]).read_bytes() == (
            manifest.parent / row["path"]
        ).read_bytes()


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"split": "heldout"}, {"config": SceneConfig(fps=10.0)}]
)
def test_a_folder_never_mixes_two_distributions(manifest, change):
    before = manifest.read_bytes()
    arguments = {"config": CONFIG, "seed": 3, "count": 4, **change}
    with pytest.raises(UsageError, match="another config, seed, split"):
        write_dataset(manifest.parent, **arguments)
    assert manifest.read_bytes() == before


def test_a_damaged_note_is_reported(manifest):
    (manifest.parent / "scenes.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        write_dataset(manifest.parent, CONFIG, seed=3, count=4)


def test_nothing_temporary_is_left(manifest):
    names = {name for _, _, files in os.walk(manifest.parent) for name in files}
    videos = {f"train-{index:06d}.mp4" for index in range(4)}
    assert names == {"manifest.csv", "truth.jsonl", "scenes.json"} | videos


def test_prompts_are_distinct_heldout_and_balanced():
    texts = prompts(SceneConfig(speed_words=0.5), 0, 64)
    assert len(set(texts)) == 64
    things = [promise(text).objects[0] for text in texts]
    assert all((thing.colour, thing.shape) in HELD_OUT for thing in things)
    for trait, options in (("colour", 8), ("motion", 4), ("shape", 3)):
        counts = Counter(getattr(thing, trait) for thing in things)
        assert len(counts) == options
        # The held-out pairs have two squares for three circles and triangles.
        assert max(counts.values()) - min(counts.values()) <= 64 / options / 2


def test_prompts_come_again_when_the_grammar_has_no_more():
    texts = prompts(SceneConfig(), 0, 64)
    assert len(set(texts)) == 8 * 4
    assert texts[:32] == texts[32:]


def test_prompts_have_the_number_of_objects_asked_for():
    for count in (1, 2, 3):
        texts = prompts(SceneConfig(), 1, 6, num_objects=count, split="train")
        assert len(set(texts)) == 6
        assert all(len(promise(text).objects) == count for text in texts)
    with pytest.raises(UsageError, match="this config has"):
        prompts(SceneConfig(num_objects={1: 1}), 0, 4, num_objects=2)
