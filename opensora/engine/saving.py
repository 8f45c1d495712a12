"""A checkpoint on its way to the disk: every rank writes what it has, then one commit.

Beginning and finishing are collective and short. In between each rank writes and digests its files
without asking the others, at once or in a thread on copies of its tensors, so that training goes
on meanwhile.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from threading import Thread

import torch

from opensora import store
from opensora.digests import FileRecord
from opensora.disk import storage_errors
from opensora.engine import shards
from opensora.engine.checkpoint import CONFIG_NAME, KIND, PARTS, PROGRESS_NAME, Snapshot
from opensora.engine.shards import Piece
from opensora.errors import StorageError
from opensora.runtime import ALONE, Runtime


class Saving:
    """One checkpoint under `root`, begun; every rank makes one at the same step.

    Args:
        snapshot: whole tensors count on rank 0 only, sharded ones on all ranks.
        keep: newest checkpoints to leave.
        background: copy the tensors to the host and write them in a thread; otherwise they are
            written when this returns.

    Attributes:
        path: where the checkpoint will be.
        seconds: how long the caller has waited for it so far.
    """

    def __init__(
        self,
        root: str | Path,
        snapshot: Snapshot,
        *,
        keep: int,
        place: Runtime,
        background: bool = False,
    ):
        began = time.monotonic()
        self.root, self.keep, self.place = Path(root), keep, place
        self.path = self.root / f"step-{snapshot.step:06d}"
        self._commit = ExitStack()
        self._known: dict[str, FileRecord] = {}
        self._problem: Exception | None = None
        self._thread: Thread | None = None
        files = _share(snapshot, place)
        if background:
            files = {name: _staged(content) for name, content in files.items()}
        folder = self._open(snapshot)
        if folder is not None and background:
            arguments = (folder, files, snapshot)
            self._thread = Thread(target=self._write, args=arguments, name="save", daemon=True)
            self._thread.start()
        elif folder is not None:
            self._write(folder, files, snapshot)
        self.seconds = time.monotonic() - began

    def _open(self, snapshot: Snapshot) -> Path | None:
        """Rank 0 makes the temporary folder; all ranks learn where it is, or that there is none."""
        folder = None
        if self.place.is_main:
            try:
                meta = {"step": snapshot.step}
                writing = store.write(
                    self.path, kind=KIND, meta=meta, replace=True, known=self._known
                )
                folder = self._commit.enter_context(writing)
            except Exception as error:  # told to all in `finish`
                self._problem = error
        return self.place.gather_objects(folder)[0]

    def _write(self, folder: Path, files: dict[str, list[Piece]], snapshot: Snapshot) -> None:
        """This rank's files, synced and digested."""
        try:
            with storage_errors(self.path):
                if not folder.is_dir():
                    raise StorageError(
                        f"{folder} is not to be seen from rank {self.place.rank}: checkpoints of "
                        "sharded weights need a file system that all ranks share (output=...)"
                    )
                for name, content in files.items():
                    shards.write(folder / name, content)
                    self._known[name] = store.seal(folder / name)
                if self.place.is_main:
                    (folder / CONFIG_NAME).write_text(snapshot.config, encoding="utf-8")
                    progress = json.dumps(snapshot.progress, indent=1, ensure_ascii=False)
                    (folder / PROGRESS_NAME).write_text(progress, encoding="utf-8")
        except Exception as error:  # told to all in `finish`
            self._problem = error

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> Path:
        """Wait for every rank, commit, point `latest` at the checkpoint and prune. Collective.

        Raises:
            StorageError: on all ranks, when one of them could not write; earlier checkpoints are
                untouched.
        """
        began = time.monotonic()
        if self._thread is not None:
            self._thread.join()
        told = self.place.gather_objects((self._known, _told(self._problem, self.place.rank)))
        for known, _ in told:
            self._known.update(known)
        self._settle([problem for _, problem in told if problem])
        outcome = self.place.gather_objects(_told(self._problem, self.place.rank))
        problems = [problem for problem in outcome if problem]
        self.seconds += time.monotonic() - began
        if self._problem is not None and not isinstance(self._problem, StorageError):
            raise self._problem
        if problems:
            raise StorageError(problems[0])
        return self.path

    def _settle(self, problems: list[str]) -> None:
        """Commit on rank 0, or clear away what was written when any rank has a problem."""
        if not self.place.is_main:
            return
        try:
            with self._commit:
                if problems:
                    raise StorageError(problems[0])
            store.set_pointer(self.root, self.path.name)
            store.prune(self.root, self.keep, kind=KIND)
        except Exception as error:
            self._problem = self._problem or error


def _told(problem: Exception | None, rank: int) -> str:
    if problem is None or isinstance(problem, StorageError):
        return str(problem or "")
    return f"rank {rank} could not save: {problem!r}"


def _share(snapshot: Snapshot, place: Runtime) -> dict[str, list[Piece]]:
    """The files that this rank writes, and what is in them."""
    files = {}
    for part in PARTS:
        tensors = getattr(snapshot, part)
        content = shards.pieces(tensors, place.rank)
        if content:
            sharded = shards.any_sharded(tensors)
            name = shards.file_name(part, place.rank, place.world_size, sharded=sharded)
            files[name] = content
    return files


def _staged(content: list[Piece]) -> list[Piece]:
    """Copies on the host, which training does not change."""
    pinned = torch.cuda.is_available()
    copies = []
    for piece in content:
        own = torch.empty(
            piece.tensor.shape,
            dtype=piece.tensor.dtype,
            pin_memory=pinned and piece.tensor.is_cuda,
        )
        copies.append(Piece(piece.name, piece.offsets, own.copy_(piece.tensor, non_blocking=True)))
    if pinned:
        torch.cuda.synchronize()
    return copies


def save(root: str | Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Commit a snapshot of whole tensors from this process alone.

    Raises:
        StorageError: the disk is full or failing; earlier checkpoints are untouched.
    """
    return Saving(root, snapshot, keep=keep, place=ALONE).finish()
