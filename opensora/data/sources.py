"""Where training reads: clips from a manifest, or a cache of latents, behind one `open_source`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from opensora.data import manifest as manifests
from opensora.data.assignment import BucketAssigner, Census
from opensora.data.buckets import Bucket, BucketsConfig, Triple
from opensora.data.clips import ClipDataset, ClipReader, ClipsConfig, Quarantine
from opensora.data.latents import CachedAssigner, LatentDataset, open_cache
from opensora.data.loading import BatchDataset, answers, batches
from opensora.data.mixing import Cost, MixedDataset, MixedPlan, MixingConfig
from opensora.data.plan import Order, PartOf, Plan, once, whole
from opensora.data.synthetic import (
    SyntheticAssigner,
    SyntheticDataset,
    SyntheticSourceConfig,
)


class ClipsSourceConfig(MixingConfig):
    """Decode videos in every step."""

    kind: Literal["clips"] = "clips"
    manifest: Path = Field(description="CSV or Parquet of training clips")
    validation: Path | None = Field(default=None, description="CSV or Parquet of validation clips")
    buckets: BucketsConfig
    clips: ClipsConfig = ClipsConfig()
    num_workers: int = Field(
        default=0, ge=0, description="processes that decode ahead, on each rank"
    )


class LatentsSourceConfig(MixingConfig):
    """Read latents that `opensora encode` has written."""

    kind: Literal["latents"] = "latents"
    cache: Path = Field(description="folder of training latents")
    validation: Path | None = Field(default=None, description="folder of validation latents")
    buckets: BucketsConfig
    num_workers: int = Field(default=0, ge=0, description="processes that read ahead, on each rank")


DataConfig = Annotated[
    ClipsSourceConfig | LatentsSourceConfig | SyntheticSourceConfig, Field(discriminator="kind")
]


def tokens(bucket: Bucket) -> float:
    """The cost of a clip where nothing better is known."""
    return float(bucket.num_tokens)


@dataclass(frozen=True)
class Needs:
    """What a task asks of its data.

    Attributes:
        stride: of the VAE, (time, height, width); clips must divide by it.
        patch: of the model, in latent positions.
        channels: of a latent.
        latents: identity of the encoder whose cached latents fit, or None.
        part: which part of a bucket's training batches this rank reads.
        validation_part: (index, count), which of the validation batches.
        cost: of a step on one clip of a bucket, by which `mix: clips` deals clips to ranks.
    """

    stride: Triple
    patch: Triple
    channels: int
    latents: dict[str, Any] | None
    part: PartOf = whole
    validation_part: tuple[int, int] = (0, 1)
    cost: Cost = tokens


@dataclass(frozen=True)
class Source:
    """Batches of one rank.

    Attributes:
        census: where every row of the training data went.
        identity: digest of everything that decides which samples a step sees.
    """

    census: Census
    identity: str
    _plan: Order
    _dataset: BatchDataset[Any]
    _validation: tuple[BucketAssigner | CachedAssigner, BatchDataset[Any]] | None
    _needs: Needs
    _num_workers: int

    def train(self, first_step: int) -> Iterator[Any]:
        """This rank's batches from a step on, without end; close it to end its workers."""
        return batches(
            self._dataset,
            self._plan,
            first_step,
            part=self._needs.part,
            num_workers=self._num_workers,
        )

    @property
    def has_validation(self) -> bool:
        return self._validation is not None

    def validation(self) -> Iterator[Any]:
        """This rank's share of one pass over the validation data; the same batches every time."""
        if self._validation is None:
            return iter(())
        assigner, dataset = self._validation
        index, count = self._needs.validation_part
        return answers(dataset, iter(once(assigner)[index::count]))


def open_source(
    config: ClipsSourceConfig | LatentsSourceConfig | SyntheticSourceConfig,
    needs: Needs,
    *,
    seed: int,
    quarantine: Path | None = None,
) -> Source:
    """Open the data of a run and check it.

    Args:
        seed: of the run.
        quarantine: a CSV file (row, path, reason) for clips that cannot be read, or None.

    Raises:
        DataError: it cannot be read, does not fit the buckets, or holds another encoder's latents.
        UsageError: the config contradicts itself, or has too few clips a step for the ranks.
    """
    if isinstance(config, SyntheticSourceConfig):
        shape = {"stride": needs.stride, "patch": needs.patch}
        assigner, held = SyntheticAssigner(config, **shape), None
        dataset = SyntheticDataset(config, channels=needs.channels, stride=needs.stride)
    elif isinstance(config, ClipsSourceConfig):
        assigner, dataset = _clips(config.manifest, config, needs, seed, quarantine)
        held = config.validation and _clips(config.validation, _fixed(config), needs, seed)
    else:
        assigner, dataset = _latents(config.cache, config, needs)
        held = config.validation and _latents(config.validation, config, needs)
    read: BatchDataset[Any] = dataset
    if config.mix == "clips":
        plan = MixedPlan(assigner, seed=seed, cost=needs.cost)
        read = MixedDataset(dataset)
    else:
        plan = Plan(assigner, seed=seed)
    plan.check_parts(lambda bucket: needs.part(bucket)[1])
    return Source(
        assigner(0).census,
        plan.identity,
        plan,
        read,
        held or None,
        needs,
        config.num_workers,
    )


def _clips(
    path: Path, config: ClipsSourceConfig, needs: Needs, seed: int, quarantine: Path | None = None
) -> tuple[BucketAssigner, ClipDataset]:
    rows = manifests.read(path)
    manifests.check_files(rows)
    assigner = BucketAssigner(
        rows, config.buckets, stride=needs.stride, patch=needs.patch, seed=seed
    )
    reader = ClipReader(rows, config.buckets, config.clips, seed=seed)
    refused = Quarantine(len(rows), config.clips.max_bad_fraction, quarantine)
    return assigner, ClipDataset(reader, refused)


def _fixed(config: ClipsSourceConfig) -> ClipsSourceConfig:
    """For validation: each clip begins at its row's start and is cut from the middle."""
    changes = {"start": "first", "crop": "centre", "flip": 0.0}
    return config.model_copy(update={"clips": config.clips.model_copy(update=changes)})


def _latents(
    path: Path, config: LatentsSourceConfig, needs: Needs
) -> tuple[CachedAssigner, LatentDataset]:
    cache = open_cache(path, identity=needs.latents)
    assigner = CachedAssigner(cache, config.buckets, stride=needs.stride, patch=needs.patch)
    return assigner, LatentDataset(cache)
