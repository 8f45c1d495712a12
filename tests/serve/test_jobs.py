"""Jobs on disk: what a crash leaves is found, finished, cleared or left alone, never mixed up."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from opensora.errors import StorageError, UsageError
from opensora.infer.pipeline import Shape
from opensora.serve import jobs
from opensora.serve.jobs import Job, Store
from opensora.serve.request import Asked
from opensora.serve.views import command

ASKED = Asked("a square", "", 5, 3, 3.0, Shape(5, 16, 16, 8.0))


@pytest.fixture
def store(tmp_path):
    store = Store.open(tmp_path, keep=10)
    yield store
    store.close()


def reopened(store: Store) -> Store:
    store.close()
    again = Store.open(store.folder, keep=10)
    again.close()
    return again


def test_a_record_is_read_as_it_was_written(store):
    job = store.create(ASKED)
    assert Job.from_json(job.to_json()) == job
    assert reopened(store).jobs() == [job]


def test_ids_are_unguessable_and_files_are_named_by_the_server(store):
    names = {store.create(ASKED).id for _ in range(20)}
    assert len(names) == 20
    assert all(len(name) == len("video_") + 32 for name in names)
    assert {p.name for p in store.folder.iterdir()} == {*names, ".lock"}


def test_two_servers_do_not_share_a_folder(store):
    with pytest.raises(UsageError, match="another server"):
        Store.open(store.folder, keep=10)


def test_a_job_that_ran_when_the_server_died_is_begun_again_and_given_up_the_second_time(store):
    job = store.create(ASKED)
    store.update(job.id, status=jobs.RUNNING, step=2, attempts=1)
    (again,) = reopened(store).jobs()
    assert (again.status, again.step, again.attempts) == (jobs.QUEUED, 0, 1)
    store.update(job.id, status=jobs.RUNNING, attempts=2)
    (given_up,) = reopened(store).jobs()
    assert given_up.status == jobs.FAILED
    assert given_up.error is not None
    assert given_up.error["code"] == "server_died"


def test_a_completed_job_whose_video_is_gone_says_so(store):
    job = store.create(ASKED)
    store.update(job.id, status=jobs.COMPLETED)
    (lost,) = reopened(store).jobs()
    assert lost.error == {"code": "lost", "message": "the video is gone from the disk"}


def test_what_writers_left_is_cleared_and_what_others_put_there_stays(store):
    job = store.create(ASKED)
    half = store.folder / ("video_" + "0" * 32)
    half.mkdir()
    (half / "video.mp4").write_bytes(b"removed half way")
    for name in (f".{'0' * 16}.tmp", f".{'1' * 16}.png"):
        (store.folder / name).write_bytes(b"an upload")
    (store.folder / job.id / f".{'2' * 16}.tmp").write_bytes(b"a video")
    mine = store.folder / "notes.txt"
    mine.write_text("mine")
    assert reopened(store).jobs() == [job]
    assert {p.name for p in store.folder.iterdir()} == {job.id, ".lock", "notes.txt"}
    assert {p.name for p in (store.folder / job.id).iterdir()} == {"job.json"}


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", '{"format_version": 2}', '{"format_version": 1, "id": "../../x"}',
     '{"format_version": 1, "id": 5, "asked": {}}'],
)  # fmt: skip
def test_a_record_that_is_none_is_left_alone_and_told(store, text, caplog):
    job = store.create(ASKED)
    record = store.folder / job.id / "job.json"
    record.write_text(text)
    assert reopened(store).jobs() == []
    assert "left alone" in caplog.text
    assert record.read_text() == text


def test_a_record_in_another_jobs_folder_is_left_alone(store):
    one, two = store.create(ASKED), store.create(ASKED)
    (store.folder / two.id / "job.json").write_bytes(one.to_json())
    assert reopened(store).jobs() == [one]


def test_a_link_in_the_folder_leads_nowhere(store, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    name = "video_" + "1" * 32
    (elsewhere / "job.json").write_bytes(Job(name, ASKED, 1, 1).to_json())
    (store.folder / name).symlink_to(elsewhere)
    assert reopened(store).jobs() == []
    assert (elsewhere / "job.json").exists()


def test_a_refusing_disk_leaves_no_job(store, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("opensora.disk.write_synced", full)
    with pytest.raises(StorageError, match="No space left"):
        store.create(ASKED)
    assert store.jobs() == []
    assert {p.name for p in store.folder.iterdir()} == {".lock"}


def test_the_record_holds_all_that_the_video_depends_on(store):
    job = store.create(ASKED)
    tree = json.loads((store.folder / job.id / "job.json").read_bytes())
    assert tree["asked"] == {
        "prompt": "a square", "negative_prompt": "", "seed": 5, "steps": 3, "guidance_scale": 3.0,
        "shape": {"num_frames": 5, "height": 16, "width": 16, "fps": 8.0},
    }  # fmt: skip


def test_the_command_of_a_single_frame_asks_for_the_video_that_the_server_makes():
    assert "--format" not in command(Job("a", ASKED, 0, 0), "run")
    still = replace(ASKED, shape=Shape(1, 16, 16, 8.0))
    assert "--frames 1 " in command(Job("a", still, 0, 0), "run")
    assert "--format mp4 " in command(Job("a", still, 0, 0), "run")
