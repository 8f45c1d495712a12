"""The suite `fvd`: how far the videos a model makes are, as a set, from real ones.

Prompts are the captions of the real clips, one video each. The Frechet distance is called `fvd`
only on I3D's features, `rfvd` on those of a random network, and by the network's name otherwise.
Frames, rate, convention and N stand in the settings, for numbers compare only where these agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from opensora.config import Config
from opensora.errors import DataError, UsageError
from opensora.evaluate import drawing, features
from opensora.evaluate.clips import RealClipsConfig, open_clips
from opensora.evaluate.features import Extractor, ExtractorConfig
from opensora.evaluate.frechet import FrechetStats, Reference, jackknife, mmd_values
from opensora.evaluate.suite import Progress, Results, Row, Subject, Suite, shared, write
from opensora.infer.jobs import jobs
from opensora.infer.pipeline import SamplingConfig, Shape
from opensora.media.read import read_clip
from opensora.runtime import Runtime

FEWEST = 256
"""Below this many videos the bias of the distance is larger than most differences of models."""


class FvdConfig(Config):
    """Against which clips, on which features, by which protocol."""

    clips: RealClipsConfig = Field(
        default=RealClipsConfig(num=2048, start="random"), description="the real ones"
    )
    extractor: ExtractorConfig = ExtractorConfig()
    generated: int | None = Field(
        default=None, ge=2, description="videos of the model; null: as many as real clips"
    )
    biased: bool = Field(
        default=True, description="covariances divided by N, as StyleGAN-V; false: by N - 1"
    )
    reference: Path | None = Field(
        default=None,
        description="file with the features of the real clips: read where it is, else written",
    )
    allow_small_n: bool = Field(
        default=False, description=f"go on with fewer than {FEWEST} videos on a side"
    )
    seed: int = Field(default=1, ge=0, lt=2**32, description="of the samples")
    sampling: SamplingConfig = SamplingConfig()
    batch_size: int = Field(default=8, ge=1, description="videos at a time; changes no value")


def run(subject: Subject, config: FvdConfig, output: Path, progress: Progress) -> Results:
    """Draw, extract, compare; ranks share the drawing and the extraction.

    Returns:
        Group `generated`: the Frechet distance with a jackknife interval, and `mmd`, the unbiased
        MMD x 100; group `real`: the same between two halves of the real clips, which says what
        such numbers are worth at half the N.

    Raises:
        UsageError: too few videos, or a reference of other settings.
        DataError: clips or videos cannot be read.
    """
    place = subject.place
    default = None if subject.videos is not None else subject.model.shape
    clips = open_clips(config.clips, default)
    count = config.generated or len(clips)
    _check_count(config, len(clips), "real clips")
    names, read = _generated(subject, config, clips.shape, clips.texts, count, output, progress)
    _check_count(config, len(names), "generated videos")
    extract = features.build(config.extractor, place.device, clips.shape.num_frames)
    settings = {"extractor": _identity(config.extractor), **clips.facts}
    real_clip = clips.read
    if config.clips.path is None:
        settings["codec"] = "mp4"

        def real_clip(index: int) -> np.ndarray:
            return drawing.through_a_file(clips.read(index), clips.shape.fps)

    if config.reference is not None and config.reference.is_file():
        real = Reference.load(config.reference, settings).features
    else:
        real = _features(extract, real_clip, len(clips), config, place, "real", progress)
        if config.reference is not None and place.is_main:
            Reference(real, settings).save(config.reference)
    fake = _features(extract, read, len(names), config, place, "generated", progress)
    place.barrier()
    if not place.is_main:
        return {}
    rows = [
        Row("generated", name, {"mmd": value})
        for name, value in zip(names, mmd_values(real, fake).tolist(), strict=True)
    ]
    estimates = {"generated": _distance(config, real, fake)}
    if len(real) >= 8:
        estimates["real"] = _distance(config, real[::2], real[1::2])
        halves = mmd_values(real[::2], real[1::2]).tolist()
        rows += [Row("real", f"half {i}", {"mmd": v}) for i, v in enumerate(halves)]
    told = {
        "suite": "fvd",
        "weights": subject.pipeline.fingerprint if subject.pipeline else str(subject.videos),
        "metric": config.extractor.metric,
        "n_real": len(real),
        "n_generated": len(fake),
        "covariance": "N" if config.biased else "N - 1",
        **settings,
    }
    if subject.pipeline is not None:
        told |= {"sampling": config.sampling.model_dump(mode="json"), "sampling_seed": config.seed}
    return write(output, rows, settings=told, estimates=estimates)


def _distance(config: FvdConfig, real: Tensor, fake: Tensor) -> dict[str, dict[str, float]]:
    mean, low, high = jackknife(FrechetStats.of(real), fake, biased=config.biased)
    return {config.extractor.metric: {"mean": mean, "low": low, "high": high, "n": len(fake)}}


def _generated(
    subject: Subject,
    config: FvdConfig,
    shape: Shape,
    texts: Sequence[str],
    count: int,
    output: Path,
    progress: Progress,
) -> tuple[list[str], Callable[[int], np.ndarray]]:
    """Names of the videos, and what reads one of them."""
    if subject.videos is not None:
        whole = RealClipsConfig(path=subject.videos, num=count)
        videos = open_clips(whole, shape, where="generated")
        return list(videos.ids), videos.read
    folder = output / "samples"
    prompts = [texts[i % len(texts)] for i in range(count)]
    work = jobs(prompts, seed=config.seed * 1_000_000)
    records = drawing.draw(
        subject.model, work, folder, sampling=config.sampling, shape=shape, place=subject.place,
        batch_size=config.batch_size, progress=partial(progress, "drawing"),
    )  # fmt: skip
    files = [folder / record["file"] for record in records]
    names = [f"{record['index']} {record['prompt']}" for record in records]

    def drawn(index: int) -> np.ndarray:
        # A side that was odd has grown by a pixel in the file.
        frames = read_clip(files[index], num_frames=shape.num_frames).frames
        return frames[:, : shape.height, : shape.width]

    return names, drawn


@torch.no_grad()
def _features(
    extract: Extractor,
    read: Callable[[int], np.ndarray],
    count: int,
    config: FvdConfig,
    place: Runtime,
    stage: str,
    progress: Progress,
) -> Tensor:
    """float32 (count, D) on every rank; each works on some of the batches, which are the same on
    any number of ranks, because the last bits of a video's features depend on its batch."""
    size = config.batch_size

    def batch(number: int) -> Tensor:
        part = range(number * size, min(count, (number + 1) * size))
        videos = torch.from_numpy(np.stack([read(index) for index in part])).to(place.device)
        return extract(videos).float().cpu()

    found = torch.cat(shared(place, -(-count // size), batch, partial(progress, stage)))
    broken = (~found.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise DataError(
            f"the extractor gives no numbers for {len(broken)} of the {stage} videos, such as "
            f"number {broken[0]}: its weights are damaged"
        )
    return found


def _check_count(config: FvdConfig, count: int, what: str) -> None:
    if count < FEWEST and not config.allow_small_n:
        raise UsageError(
            f"{count} {what} are too few: the Frechet distance is biased by hundreds below "
            f"{FEWEST}; give more, or say allow_small_n=true for a number that compares with none"
        )


def _identity(config: ExtractorConfig) -> dict[str, Any]:
    """The extractor as JSON; a file by its digest rather than its place."""
    tree = config.model_dump(mode="json")
    if config.path is not None and Path(config.path).expanduser().is_file():
        with open(Path(config.path).expanduser(), "rb") as file:
            tree["path"] = "sha256 " + hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return tree


SUITE = Suite(FvdConfig, run, ("fvd", "rfvd", "fvd_videomae", "fvd_vjepa2", "fvd_clip", "mmd"))
