"""Random latents of the shapes of a config, to measure and to rehearse training without data.

Every sample is a function of its row, so runs on synthetic data are as repeatable as others. There
is nothing to learn from it but its variance.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from opensora.data.assignment import Assignment, Census
from opensora.data.buckets import BucketsConfig, Triple, levels
from opensora.data.mixing import MixingConfig
from opensora.data.plan import Batch
from opensora.runtime import noise
from opensora.types import LatentBatch


class SyntheticSourceConfig(MixingConfig):
    """Random latents; the buckets say of which shapes."""

    kind: Literal["synthetic"] = "synthetic"
    buckets: BucketsConfig
    num_samples: int = Field(default=1000, ge=1, description="dealt to the buckets in turn")
    num_words: int = Field(default=24, ge=1, description="in every caption")
    num_workers: int = Field(default=0, ge=0, description="processes that make batches ahead")


class SyntheticAssigner:
    """Rows to buckets in turn; the counterpart of `BucketAssigner`."""

    is_constant = True

    def __init__(self, config: SyntheticSourceConfig, *, stride: Triple, patch: Triple) -> None:
        found = levels(config.buckets, stride=stride, patch=patch)
        buckets = tuple(b for level in found for length in level.buckets for b in length)
        rows = np.arange(config.num_samples, dtype=np.int64)
        bucket_of_row = (rows % len(buckets)).astype(np.int16)
        counts = np.bincount(bucket_of_row, minlength=len(buckets)).tolist()
        kept = {b.shape: c for b, c in zip(buckets, counts, strict=True) if c}
        census = Census(config.num_samples, kept, {}, {})
        self._assignment = Assignment(buckets, bucket_of_row, census)
        decides = config.model_dump_json(exclude={"mix", "num_workers"})  # mix has its own plan
        content = f"synthetic {decides} {stride} {patch}"
        self.identity = hashlib.sha256(content.encode()).hexdigest()

    def __call__(self, epoch: int) -> Assignment:
        """The assignment, which is the same in every epoch."""
        return self._assignment


class SyntheticDataset:
    """Requests of a plan -> batches of random latents."""

    def __init__(self, config: SyntheticSourceConfig, *, channels: int, stride: Triple) -> None:
        self._config, self._channels, self._stride = config, channels, stride

    def __getitem__(self, batch: Batch) -> LatentBatch:
        bucket, rows = batch.bucket, batch.rows.tolist()
        time, down, across = self._stride
        frames = 1 + (bucket.num_frames - 1) // time
        shape = (self._channels, frames, bucket.height // down, bucket.width // across)
        caption = " ".join(f"word{k}" for k in range(self._config.num_words - 1))
        return LatentBatch(
            latents=noise(shape, rows, 0, "synthetic latents"),
            texts=tuple(f"{row} {caption}".strip() for row in rows),
            sample_ids=torch.tensor(rows),
            fps=torch.full((len(rows),), self._config.buckets.fps or 24.0),
        )
