"""The suite `loss`: how well a generator predicts real clips, by noise level.

Levels are fixed and the noise of a clip depends on its id and the seed alone, so two checkpoints
meet the same noise and their difference has far less variance than either loss. Nothing is drawn;
Open-Sora 1.2's report used this loss, averaged over shapes, as a measure of quality.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from opensora import runtime
from opensora.config import Config
from opensora.data.assignment import BucketAssigner
from opensora.data.buckets import BucketsConfig
from opensora.data.clips import ClipReader, ClipsConfig
from opensora.data.latents import open_cache
from opensora.data.plan import once
from opensora.data.transforms import fit
from opensora.engine import checkpoint
from opensora.evaluate.clips import Clips, RealClipsConfig, open_clips, read_manifest
from opensora.evaluate.suite import Progress, Results, Row, Subject, Suite, shared, write
from opensora.infer.pipeline import VideoPipeline
from opensora.types import Condition


class LossConfig(Config):
    """On which clips, at which levels, under which noise."""

    clips: RealClipsConfig = RealClipsConfig()
    cache: Path | None = Field(
        default=None, description="latents that `opensora encode` wrote, in place of the clips"
    )
    buckets: BucketsConfig | None = Field(
        default=None,
        description="shapes that the clips of clips.path are cut to; null: the one the model draws",
    )
    levels: int = Field(
        default=10, ge=1, le=50, description="noise levels, evenly spaced in (0, 1)"
    )  # more would share the two digits of their names
    repeats: int = Field(default=1, ge=1, description="noises for each clip and level")
    seed: int = Field(default=0, ge=0, lt=2**62, description="of the noise")
    batch_size: int = Field(default=8, ge=1, description="levels at a time; changes no value")

    @model_validator(mode="after")
    def _one_source(self) -> LossConfig:
        if self.cache is not None and (self.clips != RealClipsConfig() or self.buckets):
            raise ValueError("cache and clips exclude each other: leave one of them out")
        if self.buckets is not None:
            path = self.clips.path
            if path is None or self.clips != RealClipsConfig(path=path):
                raise ValueError(
                    "buckets cut the clips of clips.path: set it, and no other clips.*"
                )
        return self


@dataclass(frozen=True)
class _Example:
    """One clip: an id for the noise, latents (C, T, H, W), and what the model is told."""

    number: int
    name: str
    bucket: str
    latents: Tensor
    text: str
    fps: float
    size: tuple[int, int]


Examples = tuple[Callable[[int], _Example], int, dict[str, Any]]
"""What reads a clip, how many there are, and what the settings say of all of them."""


def run(subject: Subject, config: LossConfig, output: Path, progress: Progress) -> Results:
    """Measure the loss; ranks share the clips.

    Returns:
        Group `all`, and one for each shape of clips where there are several: loss, and
        loss_0.05 ... at each level; means over clips, whose intervals say how far other clips
        may move them.

    Raises:
        UsageError: no checkpoint of the task text_to_video was given.
        DataError: clips or latents cannot be read, or are another VAE's.
    """
    pipeline, place = subject.model, subject.place
    read, count, facts = _examples(pipeline, config)

    def measured(index: int) -> tuple[int, str, str, dict[str, float]]:
        example = read(index)
        return example.number, example.name, example.bucket, _loss(pipeline, example, config)

    found = shared(place, count, measured, partial(progress, "loss"))
    if not place.is_main:
        return {}
    found.sort(key=lambda row: row[0])
    rows = [Row("all", name, values) for _, name, _, values in found]
    buckets = sorted({bucket for _, _, bucket, _ in found})
    if len(buckets) > 1:
        rows += [Row(bucket, name, values) for _, name, bucket, values in found]
    settings = {
        "suite": "loss", "weights": pipeline.fingerprint, "seed": config.seed,
        "levels": config.levels, "repeats": config.repeats,
        "objective": pipeline.config.objective.model_dump(mode="json"),
        "vae": checkpoint.identity(pipeline.vae.state_dict()), **facts,
    }  # fmt: skip
    return write(output, rows, settings=settings)


@torch.no_grad()
def _loss(pipeline: VideoPipeline, example: _Example, config: LossConfig) -> dict[str, float]:
    """Loss of one clip at every level, and their mean: averages over repeats and latent frames."""
    levels = (torch.arange(config.levels) + 0.5) / config.levels
    levels = levels.repeat(config.repeats)
    latents = example.latents.to(pipeline.device)
    drawn = [
        runtime.noise(latents.shape, [example.number], config.seed, "evaluation noise", repeat)
        for repeat in range(config.repeats)
    ]
    noise = torch.cat(drawn).repeat_interleave(config.levels, 0).to(pipeline.device)
    condition = _condition(pipeline, example)
    losses = []
    for begin in range(0, len(levels), config.batch_size):
        part = slice(begin, begin + config.batch_size)
        t = levels[part, None].expand(-1, latents.shape[1]).to(pipeline.device)  # (B, T)
        data = latents.expand(len(t), *latents.shape)  # (B, C, T, H, W)
        told = condition[[0] * len(t)]
        noisy = pipeline.process.corrupt(data, noise[part], t)
        with torch.autocast(pipeline.device.type, pipeline.dtype, pipeline.dtype != torch.float32):
            prediction = pipeline.model(noisy, t, told).float()
        loss = pipeline.process.loss_per_frame(prediction, data, noise[part], t)
        losses.append(loss.double().mean(1).cpu())
    table = torch.cat(losses).view(config.repeats, config.levels).mean(0).tolist()
    values = {f"loss_{level:.2f}": v for level, v in zip(levels.tolist(), table, strict=False)}
    return {"loss": sum(table) / len(table), **values}


def _condition(pipeline: VideoPipeline, example: _Example) -> Condition:
    text = pipeline.text.encode([example.text])
    fps, size = torch.tensor([example.fps]), torch.tensor([example.size]).float()
    return Condition(text.tokens, text.mask, text.pooled, fps, size).to(pipeline.device)


def _examples(pipeline: VideoPipeline, config: LossConfig) -> Examples:
    """The clips, and what the settings say of them."""
    if config.buckets is not None:
        return _bucketed(pipeline, config.clips, config.buckets)
    if config.cache is None:
        clips = open_clips(config.clips, pipeline.shape)
        pipeline.latent_shape(clips.shape)
        return partial(_encoded, pipeline, clips), len(clips), {"clips": clips.facts}
    cache = open_cache(config.cache)
    here = {**cache.identity, "vae": checkpoint.identity(pipeline.vae.state_dict())}
    cache = open_cache(config.cache, identity=here)
    rows = sorted(cache.entries)
    names = "".join(cache.entries[row].file_sha256 + cache.entries[row].recipe for row in rows)
    facts = {"cache": hashlib.sha256(names.encode()).hexdigest()[:16], "clips": len(rows)}

    def cached(index: int) -> _Example:
        row = rows[index]
        e = cache.entries[row]
        bucket = f"{e.num_frames}x{e.height}x{e.width}"
        size, latents = (e.height, e.width), cache.latents(row)
        return _Example(row, f"{row:06d}", bucket, latents, e.text, e.fps, size)

    return cached, len(rows), facts


def _bucketed(pipeline: VideoPipeline, config: RealClipsConfig, buckets: BucketsConfig) -> Examples:
    """`_examples` of a manifest whose clips have several shapes; none is left out by chance."""
    assert config.path is not None
    rows = read_manifest(config.path)
    stride, patch = pipeline.vae.stride, pipeline.config.model.patch
    assigner = BucketAssigner(rows, buckets, stride=stride, patch=patch, seed=0)
    reader = ClipReader(rows, buckets, ClipsConfig(start="first"), seed=0)
    every = [(row, batch.bucket) for batch in once(assigner) for row in batch.rows.tolist()]

    def cut(index: int) -> _Example:
        row, bucket = every[index]
        with torch.no_grad():
            latents = pipeline.vae.encode(reader(row, bucket, 0)[None].to(pipeline.device))[0]
        name, size = f"{row:06d} {rows.paths[row]}", (bucket.height, bucket.width)
        text = rows.texts[row]
        return _Example(row, name, bucket.shape, latents, text, reader.fps(row), size)

    facts = {
        "manifest": rows.identity[:16],
        "buckets": buckets.model_dump(mode="json"),
        "clips": len(every),
    }
    return cut, len(every), facts


def _encoded(pipeline: VideoPipeline, clips: Clips, index: int) -> _Example:
    shape, name = clips.shape, clips.ids[index]
    bucket = f"{shape.num_frames}x{shape.height}x{shape.width}"
    size = (shape.height, shape.width)
    pixels = fit(clips.read(index), size)[None]
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels.to(pipeline.device))[0]
    return _Example(index, name, bucket, latents, clips.texts[index], shape.fps, size)


SUITE = Suite(LossConfig, run)
