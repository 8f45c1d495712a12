"""A checkpoint written while training goes on is that of the step at which it was begun."""

import threading

import pytest
import torch

from opensora.engine import checkpoint, shards
from opensora.engine.checkpoint import Snapshot
from opensora.engine.saving import Saving
from opensora.errors import StorageError
from opensora.runtime import ALONE


class Slow:
    """Writes shards only once it is told to."""

    def __init__(self, monkeypatch):
        self.go, self.write = threading.Event(), shards.write
        monkeypatch.setattr(shards, "write", self)

    def __call__(self, path, content):
        assert self.go.wait(60)
        self.write(path, content)


def begin(root, step, weight, **options) -> Saving:
    snapshot = Snapshot(step, "{}", {"weight": weight}, optimizer={"weight/m": weight})
    return Saving(root, snapshot, keep=2, place=ALONE, **options)


def test_what_changes_after_the_beginning_is_not_saved(tmp_path, monkeypatch):
    disk, weight = Slow(monkeypatch), torch.arange(4.0)
    saving = begin(tmp_path, 1, weight, background=True)
    weight += 10
    assert not saving.written
    assert checkpoint.committed(tmp_path) == []
    disk.go.set()
    path = saving.finish()
    assert saving.written
    found = checkpoint.load(path)
    assert found.weights["weight"].tolist() == found.optimizer["weight/m"].tolist() == [0, 1, 2, 3]


def test_nothing_is_committed_before_it_is_finished(tmp_path):
    saving = begin(tmp_path, 1, torch.ones(2), background=False)
    assert saving.written
    assert checkpoint.committed(tmp_path) == []
    assert checkpoint.committed(tmp_path) == []  # looking does not clear what is being written
    saving.finish()
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["step-000001"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000001"]


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_refuses_leaves_the_earlier_checkpoint_alone(tmp_path, monkeypatch, background):
    begin(tmp_path, 1, torch.ones(2)).finish()

    def refuse(path, content):
        path.write_bytes(b"a part")
        raise StorageError("the disk is full")

    monkeypatch.setattr(shards, "write", refuse)
    saving = begin(tmp_path, 2, torch.ones(2), background=background)
    with pytest.raises(StorageError, match="the disk is full"):
        saving.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000001"]


def test_an_error_of_the_program_is_not_taken_for_one_of_the_disk(tmp_path, monkeypatch):
    def fail(path, content):
        raise ZeroDivisionError

    monkeypatch.setattr(shards, "write", fail)
    with pytest.raises(ZeroDivisionError):
        begin(tmp_path, 1, torch.ones(2), background=True).finish()
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_process_has_to_be_seen_by_the_one_that_commits(tmp_path):
    saving = begin(tmp_path, 1, torch.ones(2))
    saving._known["weights-00002-of-00002.safetensors"] = saving._known["weights.safetensors"]
    with pytest.raises(StorageError, match=r"weights-00002-of-00002\S+ was written by another"):
        saving.finish()
    assert list(tmp_path.iterdir()) == []
