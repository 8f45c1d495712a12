"""What a training step on one clip costs, by which clips are dealt to ranks (`data.mix: clips`).

Only ratios matter. The real task is built where tensors have shapes and nothing else, without
recomputation, and its FLOPs are counted; a deep model's follow from those of shallow ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from opensora import zoo
from opensora.data.buckets import Bucket
from opensora.dist.mesh import Layout
from opensora.engine import planner
from opensora.engine.flops import FlopCounter
from opensora.engine.footprint import Footprint
from opensora.engine.recompute import RecomputeConfig
from opensora.train.config import TrainConfig
from opensora.train.forecast import layers, loss_of
from opensora.train.text_to_video import TextToVideoConfig


def clip_cost(config: TrainConfig) -> Callable[[Bucket], float]:
    """FLOPs of a step on one clip of a bucket, with the VAE's where clips are decoded.

    Counted once for each resolution and length, in about a second; other proportions follow by
    their tokens.
    """
    assert isinstance(config.task, TextToVideoConfig)
    task, per_token = config.task, dict[tuple[str, int], float]()

    def cost(bucket: Bucket) -> float:
        key = (bucket.resolution, bucket.num_frames)
        if key not in per_token:
            encoding = _encoding(task, bucket) if config.data.kind == "clips" else 0
            per_token[key] = (_step(task, bucket) + encoding) / bucket.num_tokens
        return per_token[key] * bucket.num_tokens

    return cost


def _step(task: TextToVideoConfig, bucket: Bucket) -> int:
    """FLOPs of the denoiser, forward and backward."""

    def at(depths: dict[str, int]) -> Footprint:
        model = task.model.model_copy(update=depths)
        changed = task.model_copy(update={"model": model})
        with torch.device("meta"), FlopCounter() as counter:
            _, loss = loss_of(changed, Layout(), bucket, 1, 1, RecomputeConfig())
            loss().backward()
        return Footprint(0, counter.total, 0, 0, 0, 0)

    return planner.extrapolate(at, layers(task.model)).flops


def _encoding(task: TextToVideoConfig, bucket: Bucket) -> int:
    """FLOPs of the VAE."""
    with torch.device("meta"), FlopCounter() as counter, torch.no_grad():
        vae = zoo.build_vae(task.vae or zoo.VAEConfig())
        vae.encode(torch.empty(1, 3, bucket.num_frames, bucket.height, bucket.width))
    return counter.total
