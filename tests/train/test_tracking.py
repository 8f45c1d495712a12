"""What a run writes down: whole lines, rewound on resume, and never the end of a run."""

import json
import math
import sys
import types

import pytest
import torch
from train_support import ALONE

from opensora.disk import _STORAGE_ERRNOS
from opensora.errors import MissingPackageError
from opensora.runtime import Runtime
from opensora.train import tracking
from opensora.train.tracking import LogConfig, Tracker, read_records


def tracker(folder, done=0, **config) -> Tracker:
    return Tracker(LogConfig(**config), folder, ALONE, done=done)


def steps(folder) -> list[int]:
    return [record["step"] for record in read_records(folder / "metrics.jsonl")]


def test_records_are_one_line_of_json_each(tmp_path):
    log = tracker(tmp_path)
    log.record("train", 1, {"loss": 0.5, "skipped": False})
    log.record("validation", 1, {"loss": math.nan, "worst": -math.inf})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert (first["kind"], first["step"], first["loss"]) == ("train", 1, 0.5)
    assert (second["loss"], second["worst"]) == ("nan", "-inf")


def test_captions_with_line_separators_stay_on_one_line(tmp_path):
    text = "a\u2028b\x85c\nd\ve"
    tracker(tmp_path).incident(3, {"samples": [{"text": text, "loss": math.inf}]})
    (record,) = read_records(tmp_path / "incidents.jsonl")
    assert record["samples"] == [{"text": text, "loss": "inf"}]


def test_a_resumed_run_forgets_what_it_will_do_again(tmp_path):
    log = tracker(tmp_path)
    for step in range(1, 6):
        log.record("train", step, {})
        log.incident(step, {})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "train", "step": 6, "text": "\xc3')  # torn inside a letter
    log = tracker(tmp_path, done=3)
    assert steps(tmp_path) == [1, 2, 3]
    log.record("train", 4, {})
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert [r["step"] for r in read_records(tmp_path / "incidents.jsonl")] == [1, 2, 3]


def test_a_run_that_begins_anew_begins_with_an_empty_file(tmp_path):
    tracker(tmp_path).record("train", 1, {})
    tracker(tmp_path)
    assert steps(tmp_path) == []


def test_only_rank_0_writes(tmp_path):
    second = Runtime(1, 2, 1, torch.device("cpu"))
    log = Tracker(LogConfig(tensorboard=True), tmp_path / "run", second, done=0)
    log.record("train", 1, {"loss": 1.0})
    log.incident(1, {})
    log.close()
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_told_once_and_the_next_line_is_whole(tmp_path, monkeypatch, caplog):
    log = tracker(tmp_path)
    log.record("train", 1, {})
    whole = open

    class Full:
        """Takes a few bytes of what is written, as a disk does that fills up."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.file.close()

        def write(self, text):
            self.file.write(text[:9])
            raise OSError(min(_STORAGE_ERRNOS), "refused")

    monkeypatch.setattr(tracking, "open", lambda *a, **k: Full(whole(*a, **k)), raising=False)
    log.record("train", 2, {})
    log.record("train", 3, {})
    monkeypatch.undo()
    log.record("train", 4, {})
    log.record("train", 5, {})
    assert steps(tmp_path) == [1, 4, 5]
    assert caplog.text.count("training goes on") == 1


def test_any_other_error_is_not_swallowed(tmp_path):
    log = tracker(tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        log.record("train", 1, {})


def test_tensorboard_shows_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    log = tracker(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        log.record("train", step, {"loss": step / 2, "note": "text"})
    log.close()
    log = tracker(tmp_path, tensorboard=True, done=2)  # step 3 is done again
    log.record("train", 3, {"loss": 9.0})
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_wandb_goes_on_with_the_same_run_and_never_with_another(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    wandb = types.SimpleNamespace(init=lambda **options: calls.append(options) or Run())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for folder in ("a/run", "a/run", "b/run"):
        log = tracker(tmp_path / folder, wandb_project="films")
        log.record("train", 1, {"loss": 0.5, "text": "left out"})
        log.close()
    first, again, other = (call for call in calls if isinstance(call, dict))
    assert first["id"] == again["id"] != other["id"]
    assert (first["project"], first["name"], first["resume"]) == ("films", "run", "allow")
    assert calls.count((1, {"train/loss": 0.5})) == 3
    assert calls.count("finish") == 3


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackageError, match=r"opensora\[log\]"):
        tracker(tmp_path, wandb_project="films")
