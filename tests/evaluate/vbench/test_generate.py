"""Drawing: VBench's names, resumable, shared by ranks, every file decoded."""

import json

import numpy as np
import pytest

from opensora.errors import DataError, UsageError
from opensora.evaluate.vbench.config import VBenchConfig
from opensora.evaluate.vbench.generate import draw, jobs, samples_of
from opensora.evaluate.vbench.prompts import load
from opensora.infer.records import RECORD_NAME, read_records
from opensora.media.read import read_clip

from .conftest import ENTRIES, Painter, moving
from .ranks import on_ranks

CONFIG = VBenchConfig(batch_size=2)


@pytest.fixture
def work(prompts_file):
    entries = load("v1", prompts_file)
    dimensions = {name for entry in entries for name in entry.dimensions}
    counts = samples_of(entries, sorted(dimensions), samples=2, flicker_samples=4)
    return jobs(entries, counts, seed=5)


def contents(folder):
    return {p.name: read_clip(p).frames.astype(int) for p in folder.glob("*.mp4")}


def alike(found, expected):
    """The same videos under the same names; an encoder may differ by a few levels from itself,
    where videos of different seeds differ by 80 on average."""
    assert found.keys() == expected.keys()
    return all(np.abs(found[name] - expected[name]).mean() < 4 for name in expected)


def test_names_are_the_prompt_and_the_sample(tmp_path, work):
    records = draw(Painter(moving), work, tmp_path, CONFIG)
    flickering = ENTRIES[0]["prompt_en"]
    assert {p.name for p in tmp_path.glob("*.mp4")} == {r["file"] for r in records}
    assert [r["file"] for r in records][:4] == [f"{flickering}-{i}.mp4" for i in range(4)]
    assert len(records) == 4 + 3 * 2


def test_the_record_has_seed_settings_and_weights(tmp_path, work):
    draw(Painter(moving), work, tmp_path, CONFIG)
    lines = [json.loads(line) for line in (tmp_path / RECORD_NAME).read_text().splitlines()]
    assert [(r["prompt"], r["seed"]) for r in lines] == [(job.prompt, job.seed) for job in work]
    for record in lines:
        assert record["weights"] == "painter"
        assert record["sampling"] == CONFIG.sampling.model_dump(mode="json")
        assert record["negative_prompt"] == ""
        assert record["shape"]["num_frames"] == 5


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4])
def test_killed_on_the_way_it_goes_on_with_nothing_redone_or_lost(tmp_path, work, stop):
    whole = tmp_path / "whole"
    draw(Painter(moving), work, whole, CONFIG)
    folder = tmp_path / "killed"
    first = Painter(moving, stop_after=2 * stop)
    with pytest.raises(KeyboardInterrupt):
        draw(first, work, folder, CONFIG)
    second = Painter(moving)
    draw(second, work, folder, CONFIG)
    assert first.drawn + second.drawn == [(job.prompt, job.seed) for job in work]
    assert alike(contents(folder), contents(whole))
    assert read_records(folder) == read_records(whole)


def test_a_torn_record_and_a_lost_file_are_drawn_again(tmp_path, work):
    draw(Painter(moving), work, tmp_path, CONFIG)
    before = contents(tmp_path)
    log = tmp_path / RECORD_NAME
    log.write_bytes(log.read_bytes()[:-20])
    (tmp_path / f"{work[0].prompt}-0.mp4").unlink()
    again = Painter(moving)
    draw(again, work, tmp_path, CONFIG)
    assert again.drawn == [(job.prompt, job.seed) for job in (*work[:2], *work[-2:])]
    assert alike(contents(tmp_path), before)


def test_a_file_that_does_not_decode_is_drawn_again(tmp_path, work):
    draw(Painter(moving), work, tmp_path, CONFIG)
    before = contents(tmp_path)
    damaged = tmp_path / f"{work[3].prompt}-3.mp4"
    damaged.write_bytes(damaged.read_bytes()[:200])
    again = Painter(moving)
    draw(again, work, tmp_path, CONFIG)
    assert again.drawn == [(job.prompt, job.seed) for job in work[2:4]]  # its batch
    assert alike(contents(tmp_path), before)


def test_a_model_whose_videos_have_another_length_is_refused(tmp_path, work):
    short = Painter(lambda prompt, seed: moving(prompt, seed)[:3])
    with pytest.raises(DataError, match=r"10 of 10 drawn videos .*decodes to 3x32x48"):
        draw(short, work, tmp_path, CONFIG)


def test_other_weights_or_seeds_in_the_folder_are_refused(tmp_path, work):
    draw(Painter(moving), work, tmp_path, CONFIG)
    with pytest.raises(UsageError, match=r"drawn differently \(weights\)"):
        draw(Painter(moving, fingerprint="other"), work, tmp_path, CONFIG)
    other = VBenchConfig.model_validate({"negative_prompt": "blurry"})
    with pytest.raises(UsageError, match=r"drawn differently \(negative_prompt\)"):
        draw(Painter(moving), work, tmp_path, other)


def test_odd_sizes_count_as_whole(tmp_path, work):
    painter = Painter(lambda p, s: np.zeros((5, 33, 47, 3), np.uint8), size=(5, 33, 47))
    assert len(draw(painter, work[:2], tmp_path, CONFIG)) == 2


def test_ranks_share_the_work_and_draw_the_same_videos_as_one(tmp_path, work):
    draw(Painter(moving), work, tmp_path / "one", CONFIG)
    painters = [Painter(moving) for _ in range(3)]
    answers = on_ranks(
        3, lambda place: draw(painters[place.rank], work, tmp_path / "three", CONFIG, place=place)
    )
    assert answers[0] == answers[1] == answers[2] == read_records(tmp_path / "one")
    assert alike(contents(tmp_path / "three"), contents(tmp_path / "one"))
    assert [len(p.drawn) for p in painters] == [4, 4, 2]  # batches of two
    together = {pair for painter in painters for pair in painter.drawn}
    assert together == {(job.prompt, job.seed) for job in work}


def test_what_one_rank_left_behind_is_shared_by_all_the_next_time(tmp_path, work):
    draw(Painter(moving), work[:2], tmp_path, CONFIG)
    painters = [Painter(moving) for _ in range(2)]
    on_ranks(2, lambda place: draw(painters[place.rank], work, tmp_path, CONFIG, place=place))
    assert [len(painter.drawn) for painter in painters] == [4, 4]


def test_ranks_without_a_common_file_system_are_told(tmp_path, work):
    answers = on_ranks(
        2,
        lambda place: draw(Painter(moving), work, tmp_path / str(place.rank), CONFIG, place=place),
    )
    assert any("same file system" in str(answer) for answer in answers)
