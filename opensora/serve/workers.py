"""Who draws: one thread a device, fed from one bounded queue, stopped between denoising steps.

A job that is cancelled frees its device before the next step: the pipeline's callback raises. So
does a stop of the service, after which the job waits on disk for the next start.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from opensora.errors import OpensoraError, StorageError
from opensora.infer.conditions import Given
from opensora.infer.pipeline import VideoPipeline
from opensora.media.picture import read_picture
from opensora.media.write import write_video
from opensora.serve import jobs
from opensora.serve.jobs import Job, Store
from opensora.serve.refusals import Refusal, quoted
from opensora.serve.request import Asked

log = logging.getLogger("opensora.serve")

_UNMEASURED_SECONDS = 10


class _Cancelled(Exception):
    """The job was removed while it was drawn."""


class _Stopping(Exception):
    """The service ends; the job is to be drawn by the next one."""


@dataclass
class Counts:
    """What the workers did since the start, for /metrics.

    Attributes:
        finished: outcome -> jobs; outcomes are completed, failed, cancelled.
        seconds: of drawing, over the completed jobs.
    """

    finished: dict[str, int] = field(
        default_factory=lambda: {"completed": 0, "failed": 0, "cancelled": 0}
    )
    seconds: float = 0.0
    steps: int = 0


class Workers:
    """Threads that draw the jobs of a store.

    Args:
        pipelines: one a device; each has a thread of its own.
        capacity: jobs that may wait.
        per_client: of them, jobs of one client.
        model, checkpoint: what a completed job records of what drew it.
    """

    def __init__(
        self,
        store: Store,
        pipelines: Sequence[VideoPipeline],
        *,
        capacity: int,
        per_client: int | None = None,
        model: str = "",
        checkpoint: str = "",
    ):
        self.store, self.capacity, self.per_client = store, capacity, per_client
        self.counts, self._model, self._checkpoint = Counts(), model, checkpoint
        self._pipelines = list(pipelines)
        # What the last server left waits too, and beyond the capacity if it was larger then.
        # Who asked for them is not on the disk: they count for nobody.
        self._waiting: dict[str, str | None] = {job.id: None for job in store.jobs() if job.is_open}
        self._change = threading.Condition()
        self._stopping = False
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to draw."""
        for pipeline in self._pipelines:
            name = f"draws on {pipeline.device}"
            thread = threading.Thread(target=self._run, args=(pipeline,), name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self, seconds: float) -> bool:
        """End after the running step; jobs that are not finished wait on disk.

        Returns:
            Whether every thread ended in time.
        """
        with self._change:
            self._stopping = True
            self._change.notify_all()
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> bool:
        """Whether every thread lives."""
        return bool(self._threads) and all(thread.is_alive() for thread in self._threads)

    def refuse_if_full(self, client: str | None = None) -> None:
        """Refuse before the work of reading a request is done.

        Args:
            client: as `clients.client_of` has it; None is not bounded by itself.

        Raises:
            Refusal: no more jobs are taken, or none now.
        """
        if self._stopping:
            raise Refusal("stopping", "the server is stopping; ask again soon", retry_after=10)
        if len(self._waiting) >= self.capacity:
            raise Refusal(
                "queue_full",
                f"{self.capacity} jobs wait already; ask again later",
                retry_after=self._estimate(),
            )
        if self.per_client is None or client is None:
            return
        with self._change:
            places = [place for place, who in enumerate(self._waiting.values()) if who == client]
        if len(places) >= self.per_client:
            raise Refusal(
                "client_queue_full",
                f"{len(places)} jobs from your address wait already; ask again later",
                retry_after=self._estimate(places[0]),
            )

    def submit(self, asked: Asked, reference: Any = None, *, client: str | None = None) -> Job:
        """Queue a job; `reference` is the path of a picture that becomes the job's.

        Raises:
            Refusal: as `refuse_if_full`.
            StorageError: the disk refuses the record.
        """
        with self._change:
            self.refuse_if_full(client)
            job = self.store.create(asked, reference)
            self._waiting[job.id] = client
            self._change.notify()
            return job

    def remove(self, name: str) -> Job | None:
        """Cancel and remove a job: what waits is taken out, what runs ends before its next step.

        Raises:
            StorageError: the disk refuses; the job stays.
        """
        with self._change:
            job = self.store.remove(name)
            self._waiting.pop(name, None)
            if job is not None and job.is_open:
                self.counts.finished["cancelled"] += 1
            return job

    def position(self, name: str) -> int | None:
        """How many jobs are drawn before a waiting one begins."""
        with self._change:
            return list(self._waiting).index(name) if name in self._waiting else None

    def _estimate(self, place: int = 0) -> int:
        """Seconds until the job at a place of the queue is likely to be begun."""
        done = self.counts.finished["completed"]
        mean = self.counts.seconds / done if done else _UNMEASURED_SECONDS
        return min(3600, max(1, math.ceil(mean * (place + 1) / len(self._pipelines))))

    def _run(self, pipeline: VideoPipeline) -> None:
        while True:
            with self._change:
                while not self._waiting and not self._stopping:
                    self._change.wait()
                if self._stopping:
                    return
                name = next(iter(self._waiting))
                del self._waiting[name]
            try:
                self._draw(pipeline, name)
            except _Stopping:
                return
            except Exception:  # the disk, say; the next job may fare better
                log.exception("%s could not be recorded", name)

    def _draw(self, pipeline: VideoPipeline, name: str) -> None:
        job = self.store.get(name)
        if job is None:
            return
        began = time.monotonic()
        try:
            attempts = job.attempts + 1
            if self.store.update(name, status=jobs.RUNNING, step=0, attempts=attempts) is None:
                return
            self._make(pipeline, job)
        except _Cancelled:
            log.info("%s was cancelled", name)
            return
        except _Stopping:
            self.store.update(name, status=jobs.QUEUED, step=0, attempts=job.attempts)
            log.info("%s waits for the next start", name)
            raise
        except Exception as error:
            self._fail(name, error)
        else:
            seconds = time.monotonic() - began
            done = self.store.update(
                name,
                status=jobs.COMPLETED,
                completed_at=int(time.time()),
                weights=pipeline.fingerprint,
                model=self._model,
                checkpoint=self._checkpoint,
            )
            if done is not None:
                self.counts.finished["completed"] += 1
                self.counts.seconds += seconds
                log.info("%s is completed after %.1f s", name, seconds)
        for old in self.store.retire():
            log.info("%s was removed: more than %d are finished", old, self.store.keep)

    def _make(self, pipeline: VideoPipeline, job: Job) -> None:
        """Draw and write one video.

        Raises:
            _Cancelled, _Stopping: between two steps.
        """
        asked = job.asked
        given = None
        if job.has_reference:
            picture = read_picture(self.store.path(job.id, jobs.REFERENCE))
            given = [[Given(picture[None])]]

        def told(step: int, *_: object) -> None:
            self.counts.steps += 1
            if self.store.update(job.id, durable=False, step=step + 1) is None:
                raise _Cancelled
            if self._stopping:
                raise _Stopping

        (sample,) = pipeline(
            [asked.prompt],
            seeds=[asked.seed],
            shape=asked.shape,
            sampling=asked.sampling,
            negative_prompt=asked.negative_prompt,
            given=given,
            callback=told,
        )
        try:
            write_video(self.store.path(job.id, jobs.VIDEO), sample.frames, fps=asked.shape.fps)
        finally:
            if self.store.get(job.id) is None:  # removed while it was written
                self.store.discard(job.id)
                raise _Cancelled

    def _fail(self, name: str, error: Exception) -> None:
        """Record why; the client learns what it can act on, the log the rest."""
        if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
            torch.cuda.empty_cache()
            code, message = "out_of_memory", "the device has not enough memory for this request"
        elif isinstance(error, StorageError):
            code, message = "storage", "the server's disk refused the video"
        elif isinstance(error, OpensoraError):
            code, message = "refused", quoted(error, 300)
        else:
            code, message = "internal", "drawing failed; the server's log has the reason"
        log.error("%s failed (%s)", name, code, exc_info=error)
        failed = {"code": code, "message": message}
        job = self.store.update(
            name, status=jobs.FAILED, error=failed, completed_at=int(time.time())
        )
        if job is not None:
            self.counts.finished["failed"] += 1
