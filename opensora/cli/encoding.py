"""`opensora encode`: clips to a cache of latents, resumable, on any number of ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from opensora import runtime, zoo
from opensora.cli.progress import Stages
from opensora.config import Config
from opensora.data import encode, manifest
from opensora.data.assignment import BucketAssigner
from opensora.data.buckets import BucketsConfig
from opensora.data.clips import ClipReader, ClipsConfig
from opensora.engine import checkpoint
from opensora.errors import UsageError
from opensora.text.encoders import AnyTextEncoder, TextConfig
from opensora.train.text_to_video import load_vae


class EncodeConfig(Config):
    """What to encode, with which VAE, and where to."""

    output: Path = Field(description="folder of the cache")
    vae_from: Path = Field(description="run or checkpoint of the VAE's training")
    manifest: Path = Field(description="CSV or Parquet of clips")
    buckets: BucketsConfig
    patch: tuple[int, int, int] = Field(
        default=(1, 2, 2), description="of the model that will train"
    )
    clips: ClipsConfig = ClipsConfig(start="first")
    text: TextConfig | None = Field(
        default=None,
        description="pretrained text encoder whose features are cached as well; null encodes "
        "captions while training",
    )
    cache: encode.EncodeConfig = encode.EncodeConfig()
    seed: int = Field(
        default=0, ge=0, lt=2**62, description="of keep-probabilities and of clip starts"
    )
    num_workers: int = Field(default=0, ge=0, description="processes that decode ahead")
    device: str = Field(default="auto", description="auto, cpu, cuda, mps")
    precision: Literal["fp32", "bf16"] = "fp32"


def run(config: EncodeConfig) -> None:
    """Encode what the cache lacks and publish its index."""
    with runtime.taking_part(config.device) as place:
        job = build(config, place.device)
        with Stages(visible=place.is_main) as stages:
            encode.encode(
                job,
                rank=place.rank,
                world_size=place.world_size,
                num_workers=config.num_workers,
                progress=partial(stages.update, "encoding"),
            )
        place.barrier()
        if place.is_main:
            print(f"{encode.publish(job)} clips in {config.output}")
        place.barrier()


def build(config: EncodeConfig, device: torch.device) -> encode.EncodeJob:
    """The job that a config describes."""
    vae = load_vae(config.vae_from).to(device)
    rows = manifest.read(config.manifest)
    manifest.check_files(rows)
    assigner = BucketAssigner(
        rows, config.buckets, stride=vae.stride, patch=config.patch, seed=config.seed
    )
    half = config.precision == "bf16"
    text, identity = None, {"vae": checkpoint.identity(vae.state_dict())}
    if config.text is not None:
        text = _frozen(config.text).to(device)
        identity["text"] = text.identity()

    @torch.no_grad()
    def latents(pixels: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, half):
            return vae.encode(pixels.to(device)).float().cpu()

    return encode.EncodeJob(
        directory=config.output,
        assigner=assigner,
        reader=ClipReader(rows, config.buckets, config.clips, seed=config.seed),
        latents=latents,
        text=None if text is None else lambda texts: text.encode(texts).to("cpu"),
        identity=identity,
        config=config.cache,
    )


def _frozen(config: TextConfig) -> AnyTextEncoder:
    text = zoo.build_text(config)
    if text.trainable:
        raise UsageError(
            f"text.kind={config.kind} learns with the model, so its features cannot be cached: "
            "leave text out"
        )
    return text.eval()
