"""The prompts of the benchmark, as published, and the traps in them."""

import json
from pathlib import Path

import pytest

from opensora.errors import DataError, UsageError
from opensora.evaluate.vbench import prompts
from opensora.evaluate.vbench.dimensions import names
from opensora.evaluate.vbench.generate import jobs, samples_of, seed_of
from opensora.evaluate.vbench.prompts import case_collisions, file_name, load, prompt_of, select

V1, I2V = load("v1"), load("i2v")


def test_the_numbers_are_those_of_the_benchmark():
    assert len(V1) == 946
    assert len({entry.prompt for entry in V1}) == 944
    assert sum(len(entry.dimensions) for entry in V1) == 1362
    assert {name for entry in V1 for name in entry.dimensions} == set(names("v1"))
    assert len(I2V) == 1118
    assert {name for entry in I2V for name in entry.dimensions} == set(names("i2v"))


def test_the_licence_and_the_source_lie_beside_the_prompts():
    folder = Path(prompts.__file__).parent / "data"
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert "github.com/Vchitect/VBench" in (folder / "NOTICE").read_text()


def test_what_a_prompt_is_about_is_wrapped_once():
    about = {name: value for entry in V1 for name, value in entry.about.items()}
    assert set(about["spatial_relationship"]) == {"object_a", "object_b", "relationship"}
    scenes = [entry.about["scene"] for entry in V1 if "scene" in entry.about]
    assert len(scenes) == 86
    assert all(isinstance(scene["scene"], str) for scene in scenes)
    for name in ("object_class", "multiple_objects", "color", "appearance_style"):
        asked = [entry for entry in V1 if name in entry.dimensions]
        assert asked
        assert all(isinstance(v, str) for e in asked for v in e.about[name].values())


def test_one_pair_of_prompts_differs_by_case_only():
    assert case_collisions(entry.prompt for entry in V1) == [
        ("a fantasy landscape", "A fantasy landscape")
    ]


def test_colliding_names_are_refused_where_case_is_ignored(tmp_path, monkeypatch):
    both = ["a fantasy landscape", "A fantasy landscape"]
    assert not prompts.ignores_case(tmp_path)
    prompts.refuse_collisions(both, tmp_path)
    monkeypatch.setattr(prompts, "ignores_case", lambda folder: True)
    with pytest.raises(DataError, match=r"'a fantasy landscape' and 'A fantasy landscape' are one"):
        prompts.refuse_collisions(both, tmp_path)
    prompts.refuse_collisions(both[:1], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_name_can_be_a_file_and_leads_back_to_its_prompt():
    for entry in (*V1, *I2V):
        name = file_name(entry.prompt, 24)
        assert len(name.encode()) <= 255
        assert prompt_of(name) == (entry.prompt, 24)
    assert prompt_of("no number.mp4") == ("no number", None)
    assert prompt_of("a 3-0.gif") == ("a 3", 0)


def test_the_whole_protocol_is_6220_videos_with_seeds_of_their_own():
    counts = samples_of(V1, names("v1"), samples=5, flicker_samples=25)
    work = jobs(V1, counts, seed=0)
    assert len(work) == 6220
    for numbers in ([job.index for job in work], [job.seed for job in work]):
        assert len(set(numbers)) == 6220
    assert max(job.seed for job in work) < 2**53
    without = samples_of(V1, names("v1"), samples=5, flicker_samples=5)
    assert sum(without.values()) == 4720


def test_a_subset_draws_the_same_videos_as_the_whole():
    whole = {
        job.index: job
        for job in jobs(V1, samples_of(V1, names("v1"), samples=5, flicker_samples=25), seed=7)
    }
    some = select(V1, ["color", "scene"], limit=3)
    part = jobs(V1, samples_of(some, ["color", "scene"], samples=2, flicker_samples=9), seed=7)
    assert len(part) == 12
    assert all(whole[job.index] == job for job in part)
    assert seed_of(7, part[0].prompt, 0) == part[0].seed
    assert len({seed_of(s, p, i) for s in (0, 1) for p in "ab" for i in (0, 1)}) == 8


def test_a_limit_counts_prompts_of_each_dimension():
    chosen = select(V1, ["color", "scene", "background_consistency"], limit=2)
    counts = {n: sum(n in e.dimensions for e in chosen) for n in ("color", "scene")}
    assert counts == {"color": 2, "scene": 2}
    assert select(V1, ["scene"]) == [e for e in V1 if "scene" in e.dimensions]
    assert select(V1, []) == []


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "holds no prompts"),
        ([3], "entry 0 is no object"),
        ([{"prompt_en": " ", "dimension": []}], "no text under 'prompt_en'"),
        ([{"prompt_en": "a", "dimension": "color"}], "no list under 'dimension'"),
        ([{"prompt_en": "a/b", "dimension": []}], "cannot be a file's name"),
        ([{"prompt_en": "ä" * 130, "dimension": []}], "cannot be a file's name"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, tree, message):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(UsageError, match=message):
        load("v1", path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        load("v1", tmp_path / "none.json")
