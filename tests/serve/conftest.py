"""A service on a small pipeline with random weights, asked in-process; and one whose steps wait."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from opensora.infer.pipeline import Sample, Shape
from opensora.infer.settings import check_fit
from opensora.serve import server
from opensora.serve.api import Service, build
from opensora.serve.config import ServeConfig
from opensora.serve.jobs import Store
from tests.infer.conftest import build_pipeline

TOKEN = "a-token-of-the-tests"
PATIENCE = 180.0
"""Seconds that a process on a busy machine may take to answer, or to end."""


@dataclass
class Paced:
    """Stands in for a pipeline: 16x16 videos whose every step waits until the test lets it go.

    Attributes:
        steps: released once for each step that may begin.
        made: weak references to the frames of each video.
        began: (prompt, step) of each step that began, in order.
    """

    free: bool = False
    shape: Shape = field(default_factory=lambda: Shape(5, 16, 16, 8.0))
    fingerprint: str = "paced"
    device: str = "nowhere"
    vae: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(stride=(4, 4, 4)))
    config: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(model=SimpleNamespace(patch=(1, 2, 2)))
    )
    began: list[tuple[str, int]] = field(default_factory=list)
    made: list[weakref.ref] = field(default_factory=list)
    fails: Exception | None = None

    def __post_init__(self):
        self.steps = threading.Semaphore(0)
        self.arrived = threading.Semaphore(0)

    def latent_shape(self, shape):
        size = (shape.num_frames, shape.height, shape.width)
        check_fit(*size, stride=self.vae.stride, patch=self.config.model.patch)
        return 4, 1 + (shape.num_frames - 1) // 4, shape.height // 4, shape.width // 4

    def __call__(self, prompts, *, seeds, shape, sampling, callback, **_):
        for step in range(sampling.schedule.num_steps):
            self.began.append((prompts[0], step))
            self.arrived.release()
            if not self.free:
                assert self.steps.acquire(timeout=180)
            if self.fails is not None:
                raise self.fails
            callback(step, None, None)
        frames: np.ndarray = np.full(
            (shape.num_frames, shape.height, shape.width, 3), seeds[0] % 256, np.uint8
        )
        self.made.append(weakref.ref(frames))
        return [Sample(prompts[0], seeds[0], frames, shape.fps)]


@pytest.fixture(scope="session")
def drawn():
    """The small pipeline; every test may use it, none changes it."""
    return build_pipeline()


@pytest.fixture
def paced():
    pipeline = Paced()
    yield pipeline
    pipeline.free = True
    pipeline.steps.release(10_000)


@contextmanager
def serving(folder: Path, *pipelines, token=None, started=True, **settings):
    """A service on `folder`; its workers end with the block."""
    config = ServeConfig(output=folder, **settings)
    store = Store.open(folder, keep=config.keep)
    service = Service(config, list(pipelines), store, "runs/tiny", "tiny")
    service.token = token
    if started:
        service.workers.start()
    try:
        yield service
    finally:
        for pipeline in pipelines:
            if isinstance(pipeline, Paced):
                pipeline.free = True
                pipeline.steps.release(10_000)
        assert service.workers.stop(180)
        store.close()


@contextmanager
def listening(service, port=0):
    """The address of a service that is not started yet, on a socket; both end with the block."""
    opened = server.listen(ServeConfig(port=port))
    runs = server.prepare(service, token=service.token)
    thread = threading.Thread(target=runs.run, kwargs={"sockets": [opened]})
    thread.start()
    try:
        yield server.address(opened)
    finally:
        runs.should_exit = True
        while not service.workers._stopping:
            thread.join(0.01)
        for pipeline in service.pipelines:
            if isinstance(pipeline, Paced):
                pipeline.steps.release(1)  # the step that runs ends; the next is not begun
        thread.join(PATIENCE)
        opened.close()
        assert not thread.is_alive()


@pytest.fixture
def start(world, tmp_path):
    """Starts servers on the tiny checkpoint; returns the process and its address."""
    started = []

    def begin(*options):
        command = [sys.executable, "-m", "opensora", "serve", str(world.generator), "--port", "0"]
        command += ["--device", "cpu", "--output", str(tmp_path / "out"), *options]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENSORA_SERVE_TOKEN": ""},
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        limit = threading.Timer(PATIENCE, process.kill)  # which ends the line, too
        limit.start()
        line = process.stdout.readline()
        limit.cancel()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, f"no address in {line!r} within {PATIENCE:.0f} s"
        return process, found[0]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def client(service, *, token=None, app=None, address="127.0.0.1") -> httpx.AsyncClient:
    """Speaks to the application without a socket, from an address."""
    app = app or build(service, token=service.token)
    transport = httpx.ASGITransport(app, client=(address, 1234))
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers)


async def finished(http, name: str, *, rounds: int = 10_000) -> dict:
    """A job once it is neither queued nor running."""
    import asyncio

    for _ in range(rounds):
        job = (await http.get(f"/v1/videos/{name}")).json()
        if job["status"] not in ("queued", "in_progress"):
            return job
        await asyncio.sleep(0.005)
    raise AssertionError(f"{name} did not end")
