"""A stopped judging goes on: what was measured is kept as long as it holds."""

import os

import pytest

from opensora.evaluate.suite import Subject
from opensora.evaluate.vbench import measures
from opensora.evaluate.vbench.ledger import FILE, Ledger
from opensora.evaluate.vbench.measures import Measured
from opensora.evaluate.vbench.suite import SUITE
from opensora.evaluate.vbench.weights import RAFT_THINGS, Shelf

from .conftest import slide

SETTINGS = {"mode": "custom", "dimensions": ["temporal_flickering"]}


@pytest.fixture
def folder(tmp_path, fill):
    return fill(tmp_path / "v", {f"v{i}.mp4": slide(3, 32, 48, 4, seed=i) for i in range(4)})


@pytest.fixture
def counted(monkeypatch):
    """Lengths of the videos whose flickering was really measured; `stop` ends the next one."""
    seen = []
    real = measures.flickering

    def flickering(frames):
        if seen and seen[0] == "stop" and len(seen) > 2:
            raise KeyboardInterrupt
        seen.append(len(frames))
        return real(frames)

    monkeypatch.setattr(measures, "flickering", flickering)
    return seen


def judge(folder, output, **settings):
    config = SUITE.config.model_validate(SETTINGS | settings)
    return SUITE.run(Subject(videos=folder), config, output, lambda *stage: None)


def test_a_killed_judging_goes_on_where_it_was(tmp_path, folder, counted):
    expected = judge(folder, tmp_path / "whole")
    counted[:] = ["stop"]
    with pytest.raises(KeyboardInterrupt):
        judge(folder, tmp_path / "out")
    assert counted == ["stop", 3, 3]
    counted.clear()
    assert judge(folder, tmp_path / "out") | {"settings": 0} == expected | {"settings": 0}
    assert counted == [3, 3]


def test_the_same_call_measures_nothing_again(tmp_path, folder, counted):
    first = judge(folder, tmp_path / "out")
    counted.clear()
    assert judge(folder, tmp_path / "out") == first
    assert counted == []


def test_a_changed_video_is_measured_again(tmp_path, folder, counted, fill):
    first = judge(folder, tmp_path / "out")
    counted.clear()
    fill(folder, {"v2.mp4": slide(4, 32, 48, 8)})
    second = judge(folder, tmp_path / "out")
    assert counted == [4]
    assert second["vbench"] != first["vbench"]


def test_a_torn_line_is_measured_again_and_harms_no_other(tmp_path, folder, counted):
    first = judge(folder, tmp_path / "out", proxies=False)
    path = tmp_path / "out" / FILE
    path.write_bytes(path.read_bytes()[:-7])
    counted.clear()
    assert judge(folder, tmp_path / "out", proxies=False) == first
    assert counted == [3]
    counted.clear()
    judge(folder, tmp_path / "out", proxies=False)
    assert counted == []


def test_other_weights_questions_or_files_have_other_keys(tmp_path):
    video, other = tmp_path / "a.mp4", tmp_path / "b.mp4"
    video.write_bytes(b"12")
    other.write_bytes(b"12")
    weights = tmp_path / RAFT_THINGS.name
    weights.write_bytes(b"1")
    ledger = Ledger(tmp_path, Shelf(tmp_path))
    key = ledger.key(video, "dynamic_degree", (RAFT_THINGS,))
    assert Ledger(tmp_path, Shelf(tmp_path)).key(video, "dynamic_degree", (RAFT_THINGS,)) == key
    weights.write_bytes(b"22")
    fresh = Ledger(tmp_path, Shelf(tmp_path))
    again = fresh.key(video, "dynamic_degree", (RAFT_THINGS,))
    os.utime(video, (1, 1))
    keys = [
        key,
        again,
        fresh.key(video, "dynamic_degree", (RAFT_THINGS,)),
        fresh.key(video, "appearance_style", (RAFT_THINGS,)),
        fresh.key(video, "appearance_style", (RAFT_THINGS,), {"appearance_style": "cubism"}),
        fresh.key(other, "dynamic_degree", (RAFT_THINGS,)),
    ]
    assert len(set(keys)) == len(keys)


def test_what_is_put_down_is_there_for_the_next_process(tmp_path):
    ledger = Ledger(tmp_path, Shelf())
    ledger.put("k", Measured(0.1 + 0.2, 7))
    assert Ledger(tmp_path, Shelf()).get("k") == Measured(0.1 + 0.2, 7)
    assert Ledger(tmp_path, Shelf()).get("other") is None
