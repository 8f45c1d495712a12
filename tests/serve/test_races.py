"""What happens between two looks: jobs that change, vanish or cannot be removed; lazy clients."""

from __future__ import annotations

import asyncio
import errno
import io
import signal
import socket
import threading
from pathlib import Path

import httpx
import pytest
from PIL import Image

from opensora.errors import StorageError
from opensora.serve import jobs, uploads
from opensora.serve.refusals import Refusal
from tests.serve.conftest import PATIENCE, Paced, client, finished, listening, serving
from tests.serve.test_server import wait_for


def asked(service, **fields):
    return service.create({"prompt": "a square", "steps": 2, **fields}, None)


def get(service, url, method="GET"):
    async def ask():
        async with client(service) as http:
            return await http.request(method, url)

    return asyncio.run(ask())


async def drawn(service, name):
    async with client(service) as http:
        return await finished(http, name)


def test_a_list_after_a_job_that_makes_a_step_meanwhile(tmp_path):
    with serving(tmp_path, Paced(), started=False) as service:
        older, newer = asked(service), asked(service)
        look = service.store.jobs

        def jobs_then_a_step():
            found = look()
            service.store.update(newer.id, durable=False, step=1)
            return found

        service.store.jobs = jobs_then_a_step
        answer = get(service, f"/v1/videos?after={newer.id}")
        assert answer.status_code == 200
        assert [job["id"] for job in answer.json()["data"]] == [older.id]


def test_a_video_that_vanished_from_the_disk_is_not_found(tmp_path):
    with serving(tmp_path, Paced(free=True)) as service:
        job = asked(service)
        asyncio.run(drawn(service, job.id))
        service.store.path(job.id, jobs.VIDEO).unlink()
        answer = get(service, f"/v1/videos/{job.id}/content")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        assert get(service, f"/v1/videos/{job.id}", "DELETE").status_code == 200


def test_a_removal_that_the_disk_refuses_is_told_and_the_job_stays(tmp_path, monkeypatch):
    with serving(tmp_path, Paced(), started=False) as service:
        job = asked(service)
        unlink = Path.unlink

        def refuse(path, missing_ok=False):
            if path.name == jobs.RECORD:
                raise OSError(errno.EROFS, "Read-only file system")
            unlink(path, missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", refuse)
            answer = get(service, f"/v1/videos/{job.id}", "DELETE")
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "storage")
        assert get(service, f"/v1/videos/{job.id}").json()["queue_position"] == 0
        assert get(service, f"/v1/videos/{job.id}", "DELETE").status_code == 200
        assert not (tmp_path / job.id).exists()


def test_a_job_that_is_removed_while_its_video_is_written_leaves_nothing(tmp_path, monkeypatch):
    from opensora.serve import workers

    write, begun, go_on = workers.write_video, threading.Event(), threading.Event()

    def slowly(path, *arguments, **options):
        begun.set()
        assert go_on.wait(PATIENCE)
        return write(path, *arguments, **options)

    monkeypatch.setattr(workers, "write_video", slowly)
    with serving(tmp_path, Paced(free=True)) as service:
        job = asked(service)
        assert begun.wait(PATIENCE)
        assert get(service, f"/v1/videos/{job.id}", "DELETE").status_code == 200
        go_on.set()
        following = asked(service)
        assert asyncio.run(drawn(service, following.id))["status"] == "completed"
    assert service.workers.counts.finished == {"completed": 1, "failed": 0, "cancelled": 1}
    assert {path.name for path in tmp_path.iterdir()} == {".lock", following.id}


def test_two_removals_at_once_count_one(tmp_path):
    with serving(tmp_path, Paced(), started=False) as service:
        names = [asked(service).id for _ in range(8)]

        async def remove():
            async with client(service) as http:
                both = [http.delete(f"/v1/videos/{name}") for name in names for _ in range(3)]
                return {answer.status_code for answer in await asyncio.gather(*both)}

        assert asyncio.run(remove()) <= {200, 404}
        assert service.workers.counts.finished["cancelled"] == 8
        assert service.workers.num_waiting == 0


def test_uploads_that_wait_for_each_other_leave_threads_for_the_rest(tmp_path, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def slowly(*_):
        begun.set()
        assert go_on.wait(PATIENCE)

    monkeypatch.setattr(uploads, "_decode", slowly)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")

    async def ask():
        with serving(tmp_path, Paced(), started=False, queue=100) as service:
            async with client(service) as http:
                form = {"data": {"prompt": "x"}, "files": {"input_reference": file.getvalue()}}
                posts = [http.post("/v1/videos", **form) for _ in range(60)]
                sent = [asyncio.create_task(post) for post in posts]
                try:
                    async with asyncio.timeout(15):  # less than one upload may wait for another
                        await asyncio.to_thread(begun.wait, PATIENCE)
                        assert (await http.get("/v1/videos")).status_code == 200
                        while sum(task.done() for task in sent) < 56:
                            await asyncio.sleep(0.01)
                finally:
                    go_on.set()
                return await asyncio.gather(*sent)

    answers = asyncio.run(ask())
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 56
    assert {answer.json()["error"]["code"] for answer in refused} == {"busy"}


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nHost: loc"])
def test_a_connection_that_never_ends_a_head_is_closed(start, tmp_path):
    """Before that, `connections` of them kept everybody else out, without a token."""
    with (
        serving(tmp_path, Paced(), started=False, connections=3, head_seconds=0.2) as service,
        listening(service) as address,
    ):
        port = int(address.rpartition(":")[2])
        lazy = [socket.create_connection(("127.0.0.1", port), PATIENCE) for _ in range(3)]
        for connection in lazy:
            connection.sendall(start)
        assert [connection.recv(1) for connection in lazy] == [b""] * 3
        for connection in lazy:
            connection.close()
        # A head in time, then a second on the same connection that does not end.
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as kept:
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert kept.recv(2**16).startswith(b"HTTP/1.1 200")
            kept.sendall(b"GET")
            while rest := kept.recv(2**16):
                assert b"HTTP/1.1" not in rest
        with httpx.Client(base_url=address, timeout=PATIENCE) as http:
            assert http.get("/health").status_code == 200


def test_a_head_may_come_in_pieces_and_a_body_take_its_own_time(tmp_path):
    with (
        serving(tmp_path, Paced(), started=False, head_seconds=1.0) as service,
        listening(service) as address,
    ):
        port = int(address.rpartition(":")[2])
        body = b'{"prompt": "a square"}'
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as slow:
            slow.sendall(b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\n")
            slow.sendall(b"Content-Type: application/json\r\nContent-Length: 22\r\n\r\n")
            threading.Event().wait(1.3)
            slow.sendall(body)
            assert slow.recv(2**16).startswith(b"HTTP/1.1 200")


def test_a_killed_server_leaves_a_job_that_the_next_one_draws(start):
    options = ("--set", "max_steps=100000", "--set", "max_work=10000000000")
    process, address = start(*options)
    with httpx.Client(base_url=address, timeout=PATIENCE) as http:
        long = http.post("/v1/videos", json={"prompt": "long", "steps": 100_000}).json()["id"]
        next_one = http.post("/v1/videos", json={"prompt": "next", "steps": 1}).json()["id"]
        wait_for(http, long, lambda job: job["step"] > 0)
    process.send_signal(signal.SIGKILL)
    assert process.wait(PATIENCE) == -signal.SIGKILL
    _, address = start(*options)
    with httpx.Client(base_url=address, timeout=PATIENCE) as http:
        wait_for(http, long, lambda job: job["step"] > 0)
        assert http.delete(f"/v1/videos/{long}").status_code == 200
        job = wait_for(http, next_one, lambda job: job["completed_at"] is not None)
        assert job["status"] == "completed"
        content = http.get(f"/v1/videos/{next_one}/content").content
        assert b"ftyp" in content[:12]


def test_a_video_keeps_the_command_of_the_checkpoint_that_drew_it(tmp_path):
    with serving(tmp_path, Paced(free=True)) as service:
        job = asked(service)
        asyncio.run(drawn(service, job.id))
    with serving(tmp_path, Paced(), started=False) as other:
        other.checkpoint, other.name = "runs/another", "another"
        shown = get(other, f"/v1/videos/{job.id}").json()
        waits = get(other, f"/v1/videos/{asked(other).id}").json()
    assert (shown["model"], "runs/tiny" in shown["command"]) == ("tiny", True)
    assert (waits["model"], "runs/another" in waits["command"]) == ("another", True)


def test_a_disk_that_refuses_one_record_does_not_end_the_worker(tmp_path, monkeypatch):
    from opensora import disk

    replace = disk.replace_file
    for status in (jobs.RUNNING, jobs.COMPLETED):

        def full(path, content, status=status):
            if f'"status": "{status}"'.encode() in content:
                raise StorageError("the disk is full")
            replace(path, content)

        with serving(tmp_path / status, Paced(free=True)) as service:
            with monkeypatch.context() as patch:
                patch.setattr(disk, "replace_file", full)
                told = asyncio.run(drawn(service, asked(service).id))
            expected = {"code": "storage", "message": "the server's disk refused the video"}
            assert told["error"] == (expected if status == jobs.RUNNING else None)
            assert asyncio.run(drawn(service, asked(service).id))["status"] == "completed"


def test_a_decoder_that_is_killed_is_a_refusal_and_leaves_nothing(tmp_path, monkeypatch):
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    with serving(tmp_path / "out", Paced(), started=False) as service:
        monkeypatch.setattr(uploads.sys, "executable", str(killed))
        with pytest.raises(Refusal, match="cannot be decoded") as refused:
            service.create({"prompt": "x"}, b"\x89PNG\r\n\x1a\n and more")
        assert refused.value.code == "invalid_picture"
        assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock"}
