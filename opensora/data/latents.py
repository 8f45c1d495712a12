"""The cache of latents and text features: training without decoding and without a VAE.

A cache is a folder of shards, each a digested folder (`opensora.store`) of one safetensors file,
and an index that lists the clips which belong to it. The CRC-32 that the store recorded for a
tensor is checked whenever the tensor is read. `encode.py` writes caches; here they are read.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from opensora.data.assignment import Assignment, Census
from opensora.data.buckets import Bucket, BucketsConfig, Triple, levels
from opensora.data.plan import Batch
from opensora.data.shards import ENTRIES_NAME, SHARD_KIND, TENSORS_NAME, Entry, read_entries
from opensora.errors import DataError
from opensora.store import MANIFEST_NAME, is_complete, open_verified, read_manifest
from opensora.types import Condition, LatentBatch, concatenate

INDEX_KIND = "latent-index"
INDEX_NAME = "index"
REENCODE = "encode again with `opensora encode`"


class LatentCache:
    """An open cache; clips are read at random from memory-mapped shards.

    Attributes:
        entries: row -> entry, by ascending row.
        num_rows: of the manifest that was encoded.
        identity: what encoded it, as the writer stated it.
        unreadable: rows that could not be encoded.
    """

    def __init__(self, directory: Path) -> None:
        try:
            index = open_verified(directory / INDEX_NAME, kind=INDEX_KIND)
        except DataError as error:
            raise DataError(f"{error}; {_mend(directory / INDEX_NAME)}") from None
        self.directory = directory
        self.entries = {e.row: e for e in read_entries(directory / INDEX_NAME / ENTRIES_NAME)}
        self.num_rows = int(index.meta["num_rows"])
        self.identity: dict[str, Any] = index.meta["identity"]
        self.unreadable: list[int] = index.meta["unreadable"]
        self._shards: dict[str, tuple[Any, dict[str, int]]] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def latents(self, row: int) -> Tensor:
        """float32 (C, T, H, W).

        Raises:
            DataError: the tensor is missing or differs from what was written.
        """
        entry = self.entries[row]
        return self._tensor(entry.shard, entry.name).float()

    def features(self, row: int) -> Condition | None:
        """The text features of a clip with B = 1, or None where none were cached.

        Raises:
            DataError: as `latents`.
        """
        entry = self.entries[row]
        _, checks = self._open(entry.shard)
        if f"{entry.name}.tokens" not in checks:
            return None
        pooled = None
        if f"{entry.name}.pooled" in checks:
            pooled = self._tensor(entry.shard, f"{entry.name}.pooled").float()[None]
        tokens = self._tensor(entry.shard, f"{entry.name}.tokens").float()[None]
        return Condition(tokens, self._tensor(entry.shard, f"{entry.name}.mask")[None], pooled)

    def verify(self) -> list[str]:
        """Read everything and describe what is damaged; an empty list means sound."""
        problems = []
        for shard in sorted({entry.shard for entry in self.entries.values()}):
            try:
                open_verified(self.directory / shard, kind=SHARD_KIND)
            except DataError as error:
                problems.append(str(error))
        return problems

    def _open(self, shard: str) -> tuple[Any, dict[str, int]]:
        """A shard's mapped file and the checksum of each tensor in it."""
        if shard not in self._shards:
            from safetensors import SafetensorError, safe_open

            folder = self.directory / shard
            try:
                record = read_manifest(folder, kind=SHARD_KIND).files.get(TENSORS_NAME)
            except DataError as error:
                raise DataError(f"{error}; {_mend(folder)}") from None
            if record is None or record.tensors is None:
                raise DataError(f"{folder} lists no tensors; remove it and {REENCODE}")
            try:
                file = safe_open(folder / TENSORS_NAME, framework="pt")
            except (SafetensorError, OSError) as error:
                raise DataError(f"{folder} is damaged ({error}); {_mend(folder)}") from None
            self._shards[shard] = (file, record.tensors)
        return self._shards[shard]

    def _tensor(self, shard: str, name: str) -> Tensor:
        from safetensors import SafetensorError

        file, checks = self._open(shard)
        folder = self.directory / shard
        try:
            tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise DataError(f"{folder} is damaged ({error}); {_mend(folder)}") from None
        if zlib.crc32(tensor.flatten().view(torch.uint8).numpy()) != checks.get(name):
            raise DataError(f"{folder} is damaged: tensor '{name}' changed; {_mend(folder)}")
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # each process maps the files itself


def open_cache(directory: str | Path, *, identity: dict[str, Any] | None = None) -> LatentCache:
    """Open a complete cache.

    Args:
        identity: what would encode it now (JSON: VAE, text encoder, their weights), or None to
            take it as it is. Latents of another encoder are noise to this run's model.

    Raises:
        DataError: the cache is absent, unfinished or damaged, or another encoder made it.
    """
    directory = Path(directory)
    if not _is_there(directory / INDEX_NAME):
        state = "was not finished" if directory.is_dir() else "does not exist"
        raise DataError(f"the latent cache {directory} {state}; run `opensora encode`")
    cache = LatentCache(directory)
    wanted = None if identity is None else json.loads(json.dumps(identity))
    if wanted is not None and cache.identity != wanted:
        raise DataError(
            f"the latent cache {directory} was made by another encoder: it holds "
            f"{json.dumps(cache.identity)}, this run needs {json.dumps(wanted)}; {REENCODE}"
        )
    return cache


class CachedAssigner:
    """Cached clips -> buckets; the counterpart of `BucketAssigner` for a plan over a cache.

    Keep-probabilities were drawn when the cache was encoded; here every clip in it is used. Over
    the whole of a manifest and with the same seed the plan is the one over the videos.

    Raises:
        DataError: the config has no bucket for any cached clip, with the census.
    """

    is_constant = True

    def __init__(
        self, cache: LatentCache, config: BucketsConfig, *, stride: Triple, patch: Triple
    ) -> None:
        found = levels(config, stride=stride, patch=patch)
        buckets = tuple(b for level in found for length in level.buckets for b in length)
        index = {_place(bucket): number for number, bucket in enumerate(buckets)}
        bucket_of_row = np.full(cache.num_rows, -1, np.int16)
        strangers: dict[str, list[int]] = {}
        for row, entry in cache.entries.items():
            bucket_of_row[row] = index.get(_place(entry), -1)
            if bucket_of_row[row] < 0:
                shape = f"{entry.num_frames}x{entry.height}x{entry.width}"
                strangers.setdefault(f"no bucket {shape} in the config", []).append(row)
        absent = [row for row in range(cache.num_rows) if row not in cache.entries]
        if absent:
            strangers["not in the cache"] = absent
        counts = np.bincount(bucket_of_row + 1, minlength=len(buckets) + 1)[1:]
        census = Census(
            cache.num_rows,
            {b.shape: c for b, c in zip(buckets, counts.tolist(), strict=True) if c},
            {reason: len(rows) for reason, rows in strangers.items()},
            {reason: rows[:5] for reason, rows in strangers.items()},
        )
        if not counts.any():
            raise DataError(f"there is nothing to train on in {cache.directory}: {census}")
        self._assignment = Assignment(buckets, bucket_of_row, census)
        made = [[row, e.recipe, e.file_sha256] for row, e in cache.entries.items()]
        content = f"{json.dumps(made)} {config.model_dump_json()} {stride} {patch}"
        self.identity = hashlib.sha256(content.encode()).hexdigest()

    def __call__(self, epoch: int) -> Assignment:
        """The assignment, which is the same in every epoch."""
        return self._assignment


class LatentDataset(Dataset[LatentBatch]):
    """Requests of a plan -> batches of cached latents; see `loading.batches`."""

    def __init__(self, cache: LatentCache) -> None:
        self._cache = cache

    def __getitem__(self, batch: Batch) -> LatentBatch:
        """The latents of a batch.

        Raises:
            DataError: a tensor is damaged; nothing takes its place, because encoding mends it.
        """
        rows = batch.rows.tolist()
        entries = [self._cache.entries[row] for row in rows]
        features = [self._cache.features(row) for row in rows]
        known = [condition for condition in features if condition is not None]
        return LatentBatch(
            latents=torch.stack([self._cache.latents(row) for row in rows]),
            texts=tuple(entry.text for entry in entries),
            sample_ids=torch.tensor(rows),
            fps=torch.tensor([entry.fps for entry in entries]),
            features=concatenate(known) if len(known) == len(rows) else None,
        )


def _is_there(index: Path) -> bool:
    """Whether an index was once written; a damaged one is there, and is told as such."""
    return is_complete(index, kind=INDEX_KIND) or (index / MANIFEST_NAME).is_file()


def _place(shape: Bucket | Entry) -> tuple[str, int, int, int]:
    return shape.resolution, shape.num_frames, shape.height, shape.width


def _mend(folder: Path) -> str:
    return f"remove that folder and {REENCODE}, which writes only what is missing"
