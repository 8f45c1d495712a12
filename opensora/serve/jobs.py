"""Jobs on disk: one folder each, named by the server alone, with a record and what was made.

    OUTPUT/video_<32 hex digits>/job.json        the record, replaced in one step
                                 video.mp4       when it is completed
                                 reference.png   an uploaded picture, decoded and written anew

A job exists while its record does. A server that starts again on the folder lists all of them and
goes on with those that were not finished; a job during which the server died twice is given up.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from opensora import disk
from opensora.errors import StorageError, UsageError
from opensora.infer.pipeline import Shape
from opensora.serve.request import Asked

log = logging.getLogger("opensora.serve")

FORMAT_VERSION = 1
RECORD, VIDEO, REFERENCE = "job.json", "video.mp4", "reference.png"
MAX_ATTEMPTS = 2
QUEUED, RUNNING, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"
_ID = re.compile(r"video_[0-9a-f]{32}")
_TEMPORARY = re.compile(r"\.(?:[0-9a-f]{16}\.(?:tmp|png)|job\.json\.[0-9a-f]{8}\.tmp)")


@dataclass(frozen=True)
class Job:
    """One video, asked for or made.

    Attributes:
        created_at, completed_at: seconds since 1970, UTC.
        order: position among all jobs of the folder; times may be equal.
        step: denoising steps that are done.
        attempts: how often drawing it began and was not ended by an orderly stop.
        weights, model, checkpoint: what drew it: fingerprint, id, and path as it was typed.
        error: code and message of a job that failed.
    """

    id: str
    asked: Asked
    created_at: int
    order: int
    status: str = QUEUED
    step: int = 0
    attempts: int = 0
    has_reference: bool = False
    completed_at: int | None = None
    weights: str = ""
    model: str = ""
    checkpoint: str = ""
    error: dict[str, str] | None = None

    @property
    def is_open(self) -> bool:
        """Whether something is still to be done."""
        return self.status in (QUEUED, RUNNING)

    def to_json(self) -> bytes:
        """The record."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Job:
        """Read a record.

        Raises:
            ValueError: it is torn or of another format.
        """
        try:
            tree = json.loads(text)
            if tree.pop("format_version") != FORMAT_VERSION or not _ID.fullmatch(tree["id"]):
                raise ValueError("it is of another format")
            asked = tree.pop("asked")
            asked["shape"] = Shape(**asked["shape"])
            return cls(asked=Asked(**asked), **tree)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is no record of a job ({error})") from None


@dataclass
class Store:
    """The jobs of one output folder, which it alone uses.

    Any thread may call; what it returns does not change.
    """

    folder: Path
    keep: int = 200
    _jobs: dict[str, Job] = field(default_factory=dict)
    _guard: threading.RLock = field(default_factory=threading.RLock)
    _lock: int | None = None

    @classmethod
    def open(cls, folder: Path, *, keep: int) -> Store:
        """Take the folder and read its jobs.

        Raises:
            UsageError: another server uses it.
            StorageError: it cannot be written.
        """
        folder = Path(folder).resolve()
        disk.preflight(folder)
        store = cls(folder, keep)
        with disk.storage_errors(folder):
            (folder / ".lock").touch()
            store._lock = disk.lock(folder / ".lock")
            if store._lock is None:
                raise UsageError(
                    f"another server works in {folder}: choose another --output, or stop it"
                )
            store._read()
        return store

    def close(self) -> None:
        """Let another server have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def create(self, asked: Asked, reference: Path | None = None) -> Job:
        """A new job that waits; `reference` is a picture that is moved into its folder.

        Raises:
            StorageError: the disk refuses; nothing is left.
        """
        name = f"video_{secrets.token_hex(16)}"
        with self._guard:
            order = 1 + max((job.order for job in self._jobs.values()), default=0)
            has = reference is not None
            job = Job(name, asked, int(time.time()), order, has_reference=has)
            try:
                with disk.storage_errors(self.folder):
                    (self.folder / name).mkdir()
                    if reference is not None:
                        reference.rename(self.path(name, REFERENCE))
                    disk.replace_file(self.path(name, RECORD), job.to_json())
            except BaseException:
                self._clear(name)
                raise
            self._jobs[name] = job
            return job

    def update(self, name: str, *, durable: bool = True, **changes: Any) -> Job | None:
        """Change a job; None where it was removed meanwhile.

        Args:
            durable: write the record, rather than only tell what asks.

        Raises:
            StorageError: the disk refuses; what asks is told the new state all the same.
        """
        with self._guard:
            job = self._jobs.get(name)
            if job is None:
                return None
            job = self._jobs[name] = replace(job, **changes)
            if durable:
                disk.replace_file(self.path(name, RECORD), job.to_json())
            return job

    def get(self, name: str) -> Job | None:
        """A job by its id."""
        return self._jobs.get(name)

    def jobs(self) -> list[Job]:
        """All jobs, oldest first."""
        with self._guard:
            return sorted(self._jobs.values(), key=lambda job: job.order)

    def remove(self, name: str) -> Job | None:
        """Take a job and its files away; returns what it was.

        Raises:
            StorageError: the disk refuses; the job stays.
        """
        with self._guard:
            if name in self._jobs:
                self._erase(name)
            return self._jobs.pop(name, None)

    def discard(self, name: str) -> None:
        """Clear what was written for a job after it had been removed."""
        with self._guard:
            if name not in self._jobs:
                self._clear(name)

    def retire(self) -> list[str]:
        """Remove the oldest finished jobs beyond `keep`; returns their ids."""
        finished = [job.id for job in self.jobs() if not job.is_open]
        old = finished[: max(0, len(finished) - self.keep)]
        for name in old:
            self.remove(name)
        return old

    def path(self, name: str, file: str) -> Path:
        """Where a file of a job is; `name` is an id that this store gave."""
        assert _ID.fullmatch(name)
        assert file in (RECORD, VIDEO, REFERENCE)
        return self.folder / name / file

    def _erase(self, name: str) -> None:
        """The record goes first: a job that is half removed is none."""
        folder = self.folder / name
        with suppress(FileNotFoundError), disk.storage_errors(folder):
            self.path(name, RECORD).unlink(missing_ok=True)
            for path in folder.iterdir():
                if path.name in (VIDEO, REFERENCE) or _TEMPORARY.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        with suppress(OSError):  # whoever writes into it now clears the rest
            folder.rmdir()

    def _clear(self, name: str) -> None:
        with suppress(OSError, StorageError):
            self._erase(name)

    def _read(self) -> None:
        for leftover in self.folder.glob(".*"):
            if _TEMPORARY.fullmatch(leftover.name):
                leftover.unlink(missing_ok=True)
        for folder in sorted(self.folder.iterdir()):
            if folder.is_symlink() or not folder.is_dir() or not _ID.fullmatch(folder.name):
                continue
            self._clear_temporary(folder)
            record = folder / RECORD
            if not record.exists():
                self._clear(folder.name)
                continue
            try:
                job = Job.from_json(record.read_bytes())
                if job.id != folder.name:
                    raise ValueError(f"it is the record of {job.id}")
            except ValueError as error:
                log.warning("%s is left alone: %s", record, error)
                continue
            self._jobs[job.id] = _settled(job, folder)

    def _clear_temporary(self, folder: Path) -> None:
        for path in folder.iterdir():
            if _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)


def _settled(job: Job, folder: Path) -> Job:
    """A job as a new server finds it: to be begun again, finished, or lost."""
    if job.status == COMPLETED and not (folder / VIDEO).is_file():
        return _failed(job, "lost", "the video is gone from the disk")
    if not job.is_open:
        return job
    if job.attempts >= MAX_ATTEMPTS:
        return _failed(job, "server_died", f"the server died {job.attempts} times while drawing it")
    return replace(job, status=QUEUED, step=0)


def _failed(job: Job, code: str, message: str) -> Job:
    error = {"code": code, "message": message}
    return replace(
        job, status=FAILED, error=error, completed_at=job.completed_at or int(time.time())
    )
