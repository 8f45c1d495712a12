"""Steps of a plan -> batches of pixels.

A clip that cannot be read is named, counted and written down, and another clip of the same bucket
takes its place: the same one on every rank layout, so batches never shrink and ranks never part.
Too many of them end the run. Workers only decode; the order is the plan's.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from opensora.config import Config
from opensora.data.buckets import Bucket, BucketsConfig
from opensora.data.manifest import Manifest
from opensora.data.plan import Batch
from opensora.data.transforms import CENTRE, fit
from opensora.disk import storage_errors
from opensora.errors import DataError
from opensora.media.read import read_clip
from opensora.media.source import Limits
from opensora.runtime import uniform
from opensora.types import Clip, VideoBatch

log = logging.getLogger("opensora")

Read = Callable[..., Clip]


class ClipsConfig(Config):
    """How a clip is cut out of its file."""

    start: Literal["random", "first"] = Field(
        default="random", description="where in the row's window the clip begins"
    )
    crop: Literal["random", "centre", "none"] = Field(
        default="centre", description="which part is kept where proportions differ; none: stretch"
    )
    flip: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="part mirrored; off, because captions say left and right",
    )
    backend: Literal["pyav", "decord"] = Field(default="pyav", description="which decoder")
    limits: Limits = Field(default_factory=Limits, description="what reading one clip may cost")
    max_bad_fraction: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="part of the manifest that may be unreadable before giving up",
    )


class ClipReader:
    """Cuts one clip of one row out of its file; a function of (row, bucket, step) alone.

    Args:
        seed: of the run; start, crop and mirroring are addressed by (seed, row, step).
        read: what decodes; `media.read_clip`, or a stand-in with its signature.
    """

    def __init__(
        self,
        manifest: Manifest,
        buckets: BucketsConfig,
        config: ClipsConfig,
        *,
        seed: int,
        read: Read = read_clip,
    ) -> None:
        self.manifest = manifest
        self._config = config
        self._seed = seed
        self._read = read
        self._fps = buckets.fps
        self._interval = buckets.frame_interval

    def fps(self, row: int) -> float:
        """Frames per second of the clips that are cut from a row."""
        return self._fps or float(self.manifest.fps[row]) / self._interval

    @property
    def max_bad_fraction(self) -> float:
        """Part of the manifest that may be unreadable."""
        return self._config.max_bad_fraction

    def recipe(self, row: int, bucket: Bucket) -> list[Any]:
        """JSON of all that a row's clip at step 0 and its caption depend on, but for the file."""
        manifest = self.manifest
        start, seconds = float(manifest.start[row]), float(manifest.seconds[row])
        cut = [self._config.start, self._config.crop, self._config.flip]
        draws = [] if cut == ["first", "centre", 0.0] else list(self._draws(row, step=0))
        size = [bucket.num_frames, bucket.height, bucket.width]
        return [manifest.texts[row], start, seconds, self.fps(row), *size, *cut, *draws]

    def start(self, row: int, num_frames: int, draw: float) -> float:
        """Where a clip begins, seconds; `draw` in [0, 1) goes from the first place to the last."""
        manifest = self.manifest
        last_frame = float(manifest.seconds[row]) - 1 / float(manifest.fps[row])
        slack = max(0.0, last_frame - (num_frames - 1) / self.fps(row))
        return float(manifest.start[row]) + draw * slack

    def __call__(self, row: int, bucket: Bucket, step: int, out: Tensor | None = None) -> Tensor:
        """float32 (3, F, H, W) in [-1, 1], written into `out` where one is given.

        Raises:
            DataError: the file cannot be read as the manifest says.
        """
        start, top, left, mirror = self._draws(row, step)
        clip = self._read(
            self.manifest.location(row),
            num_frames=bucket.num_frames,
            fps=self.fps(row),
            start=self.start(row, bucket.num_frames, start),
            backend=self._config.backend,
            # decord cannot tell damage and asks the caller to know that.
            on_damage="keep" if self._config.backend == "decord" else "raise",
            limits=self._config.limits,
        )
        crop = {"random": (top, left), "centre": CENTRE, "none": None}[self._config.crop]
        size = (bucket.height, bucket.width)
        flip = mirror < self._config.flip
        return fit(clip.frames, size, offset=crop, flip=flip, out=out)

    def _draws(self, row: int, step: int) -> tuple[float, float, float, float]:
        start, top, left, mirror = uniform([row], self._seed, "clip", step, count=4)[0].tolist()
        return (0.0 if self._config.start == "first" else start), top, left, mirror


class Quarantine:
    """Rows that could not be read, shared by the workers of one process.

    Args:
        num_rows: of the manifest.
        max_bad_fraction: of them that may be unreadable.
        path: a CSV file (row, path, reason) that every new row is appended to, or None.
    """

    def __init__(self, num_rows: int, max_bad_fraction: float, path: Path | None = None) -> None:
        self._bad = torch.zeros(num_rows, dtype=torch.bool).share_memory_()
        self._max_bad_fraction = max_bad_fraction
        self._path = path

    def __contains__(self, row: int) -> bool:
        return bool(self._bad[row])

    @property
    def count(self) -> int:
        """How many rows were found unreadable."""
        return int(self._bad.sum())

    def add(self, row: int, path: Path, reason: str) -> None:
        """Note a row once.

        Raises:
            DataError: there are now too many.
        """
        if row in self:
            return
        self._bad[row] = True
        log.warning("row %d cannot be used: %s", row, reason)
        if self._path is not None:
            _append_row(self._path, [row, path, reason])
        allowed = self._max_bad_fraction * len(self._bad)
        if self.count > allowed:
            raise DataError(
                f"{self.count} of {len(self._bad)} rows are unreadable, more than max_bad_fraction="
                f"{self._max_bad_fraction:g} allows; the last is row {row}: {reason}. Take these "
                "rows out of the manifest, or raise max_bad_fraction"
            )


def _append_row(path: Path, cells: list[Any]) -> None:
    """Add a row to a CSV file in one write, which is not mixed with that of another worker."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.getvalue().encode("utf-8", "replace"))
        finally:
            os.close(descriptor)


def batch_memory(shape: tuple[int, ...]) -> Tensor:
    """An uninitialised float32 tensor; in a loader's worker it is shared with the parent at once.

    Otherwise the whole batch would be copied into shared memory when it is sent.
    """
    if get_worker_info() is None:
        return torch.empty(shape)
    storage = torch.UntypedStorage._new_shared(4 * math.prod(shape))
    return torch.empty(0).set_(storage, 0, shape)  # pyright: ignore[reportCallIssue]


class ClipDataset(Dataset[VideoBatch]):
    """Requests of a plan -> batches of pixels; see `loading.batches`."""

    def __init__(self, reader: ClipReader, quarantine: Quarantine) -> None:
        self._reader = reader
        self._quarantine = quarantine

    def __getitem__(self, batch: Batch) -> VideoBatch:
        """The clips of a batch, with stand-ins for those that cannot be read.

        Raises:
            DataError: too many rows are unreadable, or a row and all its stand-ins.
        """
        bucket = batch.bucket
        shape = (bucket.num_frames, bucket.height, bucket.width)
        pixels = batch_memory((len(batch.rows), 3, *shape))
        wanted = batch.rows.tolist()
        rows = [
            self._read(row, spares, batch, out)
            for row, spares, out in zip(wanted, batch.spares.tolist(), pixels, strict=True)
        ]
        return VideoBatch(
            pixels=pixels,
            texts=tuple(self._reader.manifest.texts[row] for row in rows),
            sample_ids=torch.tensor(rows),
            fps=torch.tensor([self._reader.fps(row) for row in rows]),
            replaced=sum(row != other for row, other in zip(rows, wanted, strict=True)),
        )

    def _read(self, row: int, spares: list[int], batch: Batch, out: Tensor) -> int:
        """Fill `out` (3, F, H, W); returns the row that was read, which may be a spare."""
        for candidate in (row, *spares):
            if candidate in self._quarantine:
                continue
            try:
                self._reader(candidate, batch.bucket, batch.step, out)
            except DataError as error:
                location = self._reader.manifest.location(candidate)
                self._quarantine.add(candidate, location, str(error))
            else:
                return candidate
        raise DataError(
            f"step {batch.step}: neither row {row} nor its {len(spares)} stand-ins in the bucket "
            f"{batch.bucket.shape} can be read; the reasons were logged when each was first tried"
        )
