"""The queue: nothing is crossed, its bound holds, a cancel costs one step, a restart goes on."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from opensora.errors import StorageError
from opensora.media.read import read_clip
from opensora.serve.refusals import Refusal
from tests.serve.conftest import Paced, client, finished, serving


def asked(service, prompt="a square", **fields):
    return service.create({"prompt": prompt, "steps": 3, **fields}, None)


def test_nothing_of_a_job_stays_in_memory(tmp_path):
    pipeline = Paced(free=True)
    with serving(tmp_path / "out", pipeline, queue=100) as service:
        names = [asked(service, seed=seed).id for seed in range(10)]
        asyncio.run(ended(service, names[-1]))
        assert service.workers.num_waiting == 0
    gc.collect()
    assert len(pipeline.made) == 10
    assert [made() for made in pipeline.made] == [None] * 10


def test_beyond_the_queue_there_is_429_and_when_to_come_again(tmp_path, paced):
    async def ask():
        with serving(tmp_path / "out", paced, queue=2) as service:
            async with client(service) as http:
                first = await http.post("/v1/videos", json={"prompt": "first"})
                assert paced.arrived.acquire(timeout=180)
                answers = await asyncio.gather(
                    *(http.post("/v1/videos", json={"prompt": str(i)}) for i in range(20))
                )
                assert service.workers.num_waiting == 2
                assert len((await http.get("/v1/videos")).json()["data"]) == 3
                return [first, *answers]

    answers = asyncio.run(ask())
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 18
    assert {answer.json()["error"]["code"] for answer in refused} == {"queue_full"}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)


def test_a_cancelled_job_ends_before_its_next_step(tmp_path, paced):
    async def ask():
        with serving(tmp_path / "out", paced) as service:
            async with client(service) as http:
                names = []
                for prompt in ("long", "next"):
                    fields = {"prompt": prompt, "steps": 50}
                    names.append((await http.post("/v1/videos", json=fields)).json()["id"])
                assert paced.arrived.acquire(timeout=180)
                paced.steps.release()
                assert paced.arrived.acquire(timeout=180)
                job = (await http.get(f"/v1/videos/{names[0]}")).json()
                assert (job["status"], job["step"], job["steps"]) == ("in_progress", 1, 50)
                answer = await http.delete(f"/v1/videos/{names[0]}")
                assert answer.json() == {"id": names[0], "object": "video.deleted", "deleted": True}
                paced.steps.release()  # the step that runs ends, and no other begins
                assert paced.arrived.acquire(timeout=180)
                assert paced.began == [("long", 0), ("long", 1), ("next", 0)]
                assert (await http.get(f"/v1/videos/{names[0]}")).status_code == 404
                assert not (service.store.folder / names[0]).exists()
                assert service.workers.counts.finished["cancelled"] == 1

    asyncio.run(ask())


def test_a_job_that_waits_is_cancelled_without_being_drawn(tmp_path, paced):
    with serving(tmp_path / "out", paced, queue=1) as service:
        asked(service, "first")
        assert paced.arrived.acquire(timeout=180)
        waiting = asked(service, "second")
        with pytest.raises(Refusal, match="1 jobs wait"):
            asked(service, "third")
        assert service.workers.remove(waiting.id) is not None
        asked(service, "fourth")
        paced.free = True
        paced.steps.release(100)
        for _ in range(5):
            assert paced.arrived.acquire(timeout=180)
    assert "second" not in {prompt for prompt, _ in paced.began}


def test_each_device_has_a_thread_of_its_own(tmp_path):
    both = [Paced(), Paced()]
    with serving(tmp_path / "out", *both) as service:
        asked(service, "a")
        asked(service, "b")
        assert all(pipeline.arrived.acquire(timeout=180) for pipeline in both)
        assert {pipeline.began[0][0] for pipeline in both} == {"a", "b"}


def test_a_stop_leaves_jobs_for_the_next_start_which_draws_the_same(tmp_path, paced):
    with serving(tmp_path / "out", paced) as service:
        running, waiting = asked(service, "a", seed=7), asked(service, "b", seed=8)
        assert paced.arrived.acquire(timeout=180)
        paced.steps.release()
        stopped = threading.Thread(target=service.workers.stop, args=(60,))
        service.workers._stopping = True  # as `stop` does first, so that no further step is made
        stopped.start()
        stopped.join(180)
        assert not stopped.is_alive()
        with pytest.raises(Refusal, match="stopping"):
            asked(service, "c")
    assert [prompt for prompt, _ in paced.began] in (["a"], ["a", "a"])

    async def ask():
        with serving(tmp_path / "out", Paced(free=True)) as service:
            async with client(service) as http:
                jobs = [await finished(http, job.id) for job in (running, waiting)]
                page = (await http.get("/v1/videos")).json()
                return jobs, [job["id"] for job in page["data"]]

    jobs, listed = asyncio.run(ask())
    assert [(job["status"], job["seed"]) for job in jobs] == [("completed", 7), ("completed", 8)]
    assert listed == [waiting.id, running.id]


def test_a_restart_lists_old_videos_and_serves_them(tmp_path):
    with serving(tmp_path / "out", Paced(free=True)) as service:
        job = asked(service, seed=200)
        asyncio.run(ended(service, job.id))
    before = service.store.path(job.id, "video.mp4").read_bytes()

    async def ask():
        with serving(tmp_path / "out", Paced(), started=False) as again:
            async with client(again) as http:
                return (
                    (await http.get("/v1/videos")).json()["data"],
                    (await http.get(f"/v1/videos/{job.id}/content")).content,
                )

    (found,), content = asyncio.run(ask())
    assert (found["id"], found["status"], found["seed"]) == (job.id, "completed", 200)
    assert content == before
    path = tmp_path / "again.mp4"
    path.write_bytes(content)
    assert abs(int(read_clip(path).frames.mean()) - 200) < 3


async def ended(service, name):
    async with client(service) as http:
        return await finished(http, name)


def test_an_error_is_told_without_the_servers_insides(tmp_path):
    class Broken(Exception):
        pass

    secret = "/home/operator/weights"
    cases = {
        "internal": Broken(secret),
        "out_of_memory": MemoryError(secret),
        "storage": StorageError(secret),
    }
    for code, error in cases.items():
        pipeline = Paced(free=True, fails=error)
        with serving(tmp_path / code, pipeline) as service:
            job = asyncio.run(ended(service, asked(service).id))
            assert (job["status"], job["error"]["code"]) == ("failed", code)
            assert secret not in str(job)
            pipeline.fails = None  # and the thread goes on
            assert asyncio.run(ended(service, asked(service).id))["status"] == "completed"


def test_only_the_newest_finished_jobs_are_kept(tmp_path):
    with serving(tmp_path / "out", Paced(free=True), keep=2, queue=10) as service:
        names = [asked(service, seed=seed).id for seed in range(5)]
        asyncio.run(ended(service, names[-1]))
    assert [job.id for job in service.store.jobs()] == names[-2:]
    assert sorted(p.name for p in (tmp_path / "out").glob("video_*")) == sorted(names[-2:])
