"""Writing the cache of latents and text features, so that a crash costs one shard at most.

Clips are encoded bucket by bucket and written in shards, each complete or absent. Running again
skips every clip whose file and recipe are unchanged. The index, written last, says which clips
belong to the cache; only then can it be opened. The encoders come in as callables.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from opensora.config import Config
from opensora.data.assignment import BucketAssigner
from opensora.data.buckets import Bucket
from opensora.data.clips import ClipReader, Quarantine, batch_memory
from opensora.data.latents import INDEX_KIND, INDEX_NAME
from opensora.data.loading import answers
from opensora.data.plan import Batch, once
from opensora.data.shards import (
    ENTRIES_NAME,
    SHARD_KIND,
    Entry,
    ShardWriter,
    read_entries,
    write_entries,
)
from opensora.disk import preflight
from opensora.errors import DataError
from opensora.store import complete_folders, remove, write
from opensora.types import Condition


class EncodeConfig(Config):
    """How a cache is laid out."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="of the stored latents and text features"
    )
    shard_bytes: int = Field(
        default=256 * 2**20, gt=0, description="a shard is closed at this size"
    )


@dataclass(frozen=True)
class EncodeJob:
    """A cache to be made.

    Attributes:
        directory: where; a cache that is already there is brought up to date.
        assigner: which clips, in which buckets (those of epoch 0).
        reader: cuts the clips.
        latents: float32 (B, 3, F, H, W) in [-1, 1] -> (B, C, T, h, w), normalised.
        text: captions -> features, or None to leave the text to the training step.
        identity: JSON that changes whenever the result of `latents` or `text` would.
        config: the layout.
    """

    directory: Path
    assigner: BucketAssigner
    reader: ClipReader
    latents: Callable[[Tensor], Tensor]
    text: Callable[[list[str]], Condition] | None
    identity: dict[str, Any]
    config: EncodeConfig

    def recipe(self, row: int, bucket: Bucket) -> str:
        """Digest of everything but the file that a clip's entry depends on."""
        content = [self.identity, self.config.dtype, self.reader.recipe(row, bucket)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def encode(
    job: EncodeJob,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Encode this rank's share of what the cache lacks; `publish` follows when all ranks are done.

    Args:
        progress: called with the clips dealt with so far and their total.

    Returns:
        How many clips were encoded now.

    Raises:
        DataError: too many files are unreadable.
        StorageError: the disk is full (found after the first batch where it can be foreseen).
    """
    job.directory.mkdir(parents=True, exist_ok=True)
    share = once(job.assigner)[rank::world_size]
    pending = _pending(job, share)
    total = sum(len(batch.rows) for batch in pending)
    quarantine = Quarantine(
        len(job.reader.manifest), job.reader.max_bad_fraction, job.directory / "quarantine.csv"
    )
    dtype = getattr(torch, job.config.dtype)
    meta = {"identity": job.identity}
    writer = ShardWriter(job.directory, rank, dtype, job.config.shard_bytes, meta)
    num_done = num_encoded = 0
    for batch, sources in zip(
        pending, answers(_Sources(job.reader), iter(pending), num_workers=num_workers), strict=True
    ):
        for row, reason in sources.refused:
            quarantine.add(row, job.reader.manifest.location(row), reason)
        if sources.pixels is not None:
            latents, features = _encoded(job, sources)
            num_bytes = 0
            for index, (row, file) in enumerate(zip(sources.rows, sources.files, strict=True)):
                entry = _entry(job, row, batch.bucket, file)
                num_bytes += writer.add(entry, latents[index], features, index)
            if num_encoded == 0:
                preflight(job.directory, num_bytes=num_bytes * total // len(sources.rows))
            num_encoded += len(sources.rows)
        num_done += len(batch.rows)
        if progress is not None:
            progress(num_done, total)
    writer.close()
    return num_encoded


def publish(job: EncodeJob) -> int:
    """Write the index over all that was encoded, and remove shards that nothing refers to.

    Returns:
        How many clips the cache holds.

    Raises:
        DataError: more clips are missing than may be unreadable: encoding is not finished.
    """
    found = _entries_on_disk(job.directory)
    assigned = [(int(row), batch.bucket) for batch in once(job.assigner) for row in batch.rows]
    current = {
        row: found[row]
        for row, bucket in assigned
        if row in found and found[row].recipe == job.recipe(row, bucket)
    }
    unreadable = sorted(row for row, _ in assigned if row not in current)
    num_rows = len(job.reader.manifest)
    if not current or len(unreadable) > job.reader.max_bad_fraction * num_rows:
        raise DataError(
            f"{len(unreadable)} of {len(assigned)} clips are not in {job.directory} yet (rows "
            f"{', '.join(map(str, unreadable[:10]))}); run `opensora encode` again to go on"
        )
    meta = {"identity": job.identity, "num_rows": num_rows, "unreadable": unreadable}
    with write(job.directory / INDEX_NAME, kind=INDEX_KIND, meta=meta, replace=True) as folder:
        chosen = [current[row] for row in sorted(current)]
        write_entries(chosen, folder / ENTRIES_NAME)
    used = {entry.shard for entry in chosen}
    for shard in complete_folders(job.directory, kind=SHARD_KIND):
        if shard.name not in used:
            remove(shard)
    return len(current)


class _Sources:
    """Requests -> pixels beside the identity of the files they came from; runs in the workers."""

    class Answer(NamedTuple):
        """`pixels` (B, 3, F, H, W) and `files` of the readable rows; `refused` of the others."""

        rows: list[int]
        pixels: Tensor | None
        files: list[tuple[str, int, int]]
        refused: list[tuple[int, str]]

    def __init__(self, reader: ClipReader) -> None:
        self._reader = reader

    def __getitem__(self, batch: Batch) -> _Sources.Answer:
        bucket = batch.bucket
        shape = (bucket.num_frames, bucket.height, bucket.width)
        pixels = batch_memory((len(batch.rows), 3, *shape))
        rows, files, refused = [], [], []
        for row in batch.rows.tolist():
            try:
                self._reader(row, bucket, 0, pixels[len(rows)])
                files.append(_file_identity(self._reader.manifest.location(row)))
            except DataError as error:
                refused.append((row, str(error)))
            else:
                rows.append(row)
        return self.Answer(rows, pixels[: len(rows)] if rows else None, files, refused)


def _encoded(job: EncodeJob, sources: _Sources.Answer) -> tuple[Tensor, Condition | None]:
    assert sources.pixels is not None
    latents = job.latents(sources.pixels)
    if latents.ndim != 5 or len(latents) != len(sources.rows):
        raise DataError(
            f"the encoder made {tuple(latents.shape)} of {tuple(sources.pixels.shape)}; it must "
            "give (B, C, T, H, W)"
        )
    if not torch.isfinite(latents).all():
        finite = torch.isfinite(latents).flatten(1).all(1).tolist()
        rows = [row for row, good in zip(sources.rows, finite, strict=True) if not good]
        raise DataError(f"the encoder's latents of rows {rows} are not finite; nothing was cached")
    texts = [job.reader.manifest.texts[row] for row in sources.rows]
    return latents, None if job.text is None else job.text(texts)


def _entry(job: EncodeJob, row: int, bucket: Bucket, file: tuple[str, int, int]) -> Entry:
    sha256, size, mtime_ns = file
    return Entry(
        row=row,
        text=job.reader.manifest.texts[row],
        fps=job.reader.fps(row),
        resolution=bucket.resolution,
        num_frames=bucket.num_frames,
        height=bucket.height,
        width=bucket.width,
        recipe=job.recipe(row, bucket),
        file_sha256=sha256,
        file_size=size,
        file_mtime_ns=mtime_ns,
    )


def _entries_on_disk(directory: Path) -> dict[int, Entry]:
    """Row -> its newest entry in any complete shard."""
    found = {}
    for shard in complete_folders(directory, kind=SHARD_KIND):
        for entry in read_entries(shard / ENTRIES_NAME):
            found[entry.row] = entry
    return found


def _pending(job: EncodeJob, share: list[Batch]) -> list[Batch]:
    """The part of the batches that the cache lacks, packed again into full batches."""
    found = _entries_on_disk(job.directory)

    def is_current(row: int, bucket: Bucket) -> bool:
        entry = found.get(row)
        if entry is None or entry.recipe != job.recipe(row, bucket):
            return False
        return _is_unchanged(entry, job.reader.manifest.location(row))

    by_bucket: dict[Bucket, list[int]] = {}
    with ThreadPoolExecutor(16) as pool:  # each look at a file may wait for a network
        for batch in share:
            rows = batch.rows.tolist()
            current = pool.map(is_current, rows, [batch.bucket] * len(rows))
            missing = [row for row, done in zip(rows, current, strict=True) if not done]
            by_bucket.setdefault(batch.bucket, []).extend(missing)
    return list(_packed(by_bucket))


def _packed(by_bucket: dict[Bucket, list[int]]) -> Iterator[Batch]:
    for bucket, rows in by_bucket.items():
        for begin in range(0, len(rows), bucket.batch_size):
            part = np.array(rows[begin : begin + bucket.batch_size], np.int64)
            yield Batch(0, 0, bucket, part, np.empty((len(part), 0), np.int64))


def _is_unchanged(entry: Entry, path: Path) -> bool:
    """Whether the file still is what was encoded; it is read only where its date has changed."""
    try:
        status = path.stat()
    except OSError:
        return False
    if status.st_size != entry.file_size:
        return False
    if status.st_mtime_ns == entry.file_mtime_ns:
        return True
    return _file_identity(path)[0] == entry.file_sha256


def _file_identity(path: Path) -> tuple[str, int, int]:
    """SHA-256, bytes and time of change of a file."""
    try:
        status = path.stat()
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}") from None
    return digest, status.st_size, status.st_mtime_ns
