"""40 requests at once for 32 places over real sockets, and the page open in a browser, if any.

None is crossed with another, the queue's bound holds, a cancelled job frees the worker within one
step, and what they took of memory, files and threads is given back.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import tracemalloc
from contextlib import ExitStack

import httpx
import numpy as np
import torch

from opensora.infer.pipeline import SamplingConfig
from opensora.media.write import write_video
from tests.serve.conftest import PATIENCE, finished, listening, serving
from tests.support.chromium import CHROMIUM, chromium

PROMPTS = [f"{color} {shape}" for color in ("red", "blue") for shape in ("square", "circle")]
LONG = {"prompt": "a long one", "steps": 100, "seed": 99}


class Watched:
    """The small pipeline, whose steps are recorded by prompt; a long job waits at its third."""

    def __init__(self, pipeline):
        self._pipeline = pipeline
        self.began: list[str] = []
        self.go_on = threading.Event()

    def __getattr__(self, name):
        return getattr(self._pipeline, name)

    def __call__(self, prompts, *, callback, **options):
        def told(step, *rest):
            self.began.append(prompts[0])
            if prompts[0] == LONG["prompt"] and step == 2:
                assert self.go_on.wait(PATIENCE)
            callback(step, *rest)

        return self._pipeline(prompts, callback=told, **options)


def held():
    """What a leak would add to: tensors, bytes of arrays made since tracing, files, threads."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    arrays = tracemalloc.DomainFilter(inclusive=True, domain=np.lib.tracemalloc_domain)
    traces = tracemalloc.take_snapshot().filter_traces([arrays]).traces
    return {
        "tensors": len(tensors),
        "elements": sum(tensor.numel() for tensor in tensors),
        "bytes of arrays": sum(trace.size for trace in traces),
        "files": len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0,
        "threads": threading.active_count(),
    }


async def crowd(address, watched, page, asked, places):
    """Requests beside one long job that the page cancels; returns (seed, video) pairs."""
    limits = httpx.Limits(max_connections=asked)
    async with httpx.AsyncClient(base_url=address, timeout=PATIENCE, limits=limits) as http:
        long = (await http.post("/v1/videos", json=LONG)).json()["id"]
        while watched.began.count(LONG["prompt"]) < 3:
            await asyncio.sleep(0.01)

        sent = [
            http.post("/v1/videos", json={"prompt": PROMPTS[i % 4], "seed": i, "steps": 1})
            for i in range(asked)
        ]
        answers = await asyncio.gather(*sent)
        taken = [answer.json() for answer in answers if answer.status_code == 200]
        refused = [answer.json()["error"]["code"] for answer in answers if answer.is_error]
        assert len(taken) == places
        assert refused == ["queue_full"] * (asked - places)
        assert f"opensora_queue_length {places}\n" in (await http.get("/metrics")).text

        if page is None:
            assert (await http.delete(f"/v1/videos/{long}")).status_code == 200
        else:
            await asyncio.to_thread(cancel_in, page, long)
        watched.go_on.set()  # the third step ends; there is no fourth

        async def one(job):
            assert (await finished(http, job["id"]))["status"] == "completed"
            content = (await http.get(f"/v1/videos/{job['id']}/content")).content
            return job["seed"], content

        videos = await asyncio.gather(*map(one, taken))
        assert watched.began.count(LONG["prompt"]) == 3
        return videos


def cancel_in(page, name):
    button = f'[data-id="{name}"] .deeds button:nth-child(3)'
    page.wait("!document.querySelector('#more').hidden")  # it is the oldest by now
    page.click("#more")
    page.wait(f"document.querySelector('{button}')")
    page.click(button)
    page.wait(f"!document.querySelector('{button}')")


def serve_a_crowd(folder, pipeline, browser=None, *, asked, places):
    watched = Watched(pipeline)
    with (
        serving(folder, watched, started=False, queue=places) as service,
        listening(service) as address,
    ):
        page = None if browser is None else browser.open()
        if page is not None:
            page.look(1280)
            page.go(address)
            page.wait("document.title !== 'opensora'")
        videos = asyncio.run(crowd(address, watched, page, asked, places))
        if page is not None:
            page.wait(f"document.querySelectorAll('.card video').length === {places}")
            assert page.problems() == []
            page.close()
        assert service.workers.num_waiting == 0
    return videos


def test_a_crowd_is_served_without_a_mistake_and_leaves_nothing(tmp_path, drawn):
    with ExitStack() as stack:
        browser = stack.enter_context(chromium(tmp_path / "profile")) if CHROMIUM else None
        serve_a_crowd(tmp_path / "first", drawn, asked=3, places=2)  # what is loaded once is loaded
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        before = held()
        videos = serve_a_crowd(tmp_path / "second", drawn, browser, asked=40, places=32)
        after = held()
    grown = {name: (before[name], after[name]) for name in before if after[name] > before[name]}
    assert grown == {}
    assert len({video for _, video in videos}) == 32
    sampling = SamplingConfig.model_validate({"schedule": {"num_steps": 1}})
    for seed, video in videos:
        (sample,) = drawn([PROMPTS[seed % 4]], seeds=[seed], sampling=sampling)
        path = write_video(tmp_path / "own.mp4", sample.frames, fps=sample.fps)
        assert path.read_bytes() == video, f"the video of seed {seed} is another's"
