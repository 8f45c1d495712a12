"""What a training config would take on some number of devices, before any is touched.

The real task runs in rehearsal (`engine.footprint`) once for each shape of batch. Of a deep model
some blocks are rehearsed and the rest follows, because every further one takes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from opensora import zoo
from opensora.data.buckets import Bucket, levels
from opensora.dist.mesh import Layout, resolve
from opensora.engine import engines, planner, recompute, tensor
from opensora.engine.engines import shards
from opensora.engine.footprint import Footprint, ImaginedMesh, rehearse
from opensora.engine.fsdp import FsdpConfig
from opensora.engine.planner import Device, Memory
from opensora.engine.recompute import RecomputeConfig
from opensora.engine.sequence import SequenceParallel
from opensora.errors import UsageError
from opensora.train import optim
from opensora.train.config import TrainConfig
from opensora.train.text_to_video import TextToVideo, TextToVideoConfig
from opensora.types import Condition

TEXT_TOKENS = 256
"""Length of a prompt in the rehearsal."""

_REHEARSED: dict[tuple[Any, ...], Footprint] = {}
"""What was found out in this process, by all that it depends on."""


@dataclass(frozen=True)
class Row:
    """What one shape of batch takes.

    Attributes:
        bucket: the largest of its resolution and length.
        degree: ranks that share a clip.
        clips: on a rank at a time.
        memory: of a rank at its peak.
        model_flops: of a step over all ranks, without recomputation.
        flops: executed.
        seconds: a step.
    """

    bucket: Bucket
    degree: int
    clips: int
    memory: Memory
    model_flops: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """A config on a layout.

    Attributes:
        parameters: trained, exactly.
    """

    layout: Layout
    parameters: int
    rows: tuple[Row, ...]

    @property
    def peak(self) -> Row:
        """The row with the most memory."""
        return max(self.rows, key=lambda row: row.memory.total)


def forecast(config: TrainConfig, ranks: int, target: Device, *, rate: float) -> Forecast:
    """What a run takes on `ranks` devices.

    Args:
        rate: FLOP/s that a device sustains over a step.

    Raises:
        UsageError: the layout does not fit the ranks, or the task is not text_to_video.
    """
    if not isinstance(config.task, TextToVideoConfig):
        raise UsageError("opensora plan knows the task text_to_video only; a VAE is small")
    buckets = _largest(config)
    needs = [need_of(config, ranks, bucket, target) for bucket in buckets]
    rows = [_row(config, *pair, rate) for pair in zip(needs, buckets, strict=True)]
    return Forecast(needs[0].share.layout, num_parameters(config.task), tuple(rows))


def _largest(config: TrainConfig) -> list[Bucket]:
    """Of every resolution and length the bucket with most tokens."""
    assert isinstance(config.task, TextToVideoConfig)
    with torch.device("meta"):
        stride = (config.task.vae or zoo.VAEConfig()).stride
    found = levels(config.data.buckets, stride=stride, patch=config.task.model.patch)
    return [
        max(length, key=lambda bucket: bucket.num_tokens)
        for level in found
        for length in level.buckets
    ]


@dataclass(frozen=True)
class Share:
    """What a rank has of a bucket's batch: `clips` at a time, each shared by `degree` ranks."""

    layout: Layout
    degree: int
    clips: int


@dataclass(frozen=True)
class Need:
    """What a bucket takes of a rank."""

    share: Share
    footprint: Footprint
    memory: Memory


def share_of(config: TrainConfig, ranks: int, bucket: Bucket) -> Share:
    """How the ranks share a bucket's batch.

    Raises:
        UsageError: its clips are too few for them.
    """
    layout = resolve(config.parallel, ranks, shards=shards(config.engine))
    degree = layout.degree_for(bucket.num_tokens, config.parallel.max_tokens)
    parts = layout.world_size // (degree * layout.tp)
    if bucket.batch_size < parts:
        more = next(
            n for n in range(2, parts + 1) if parts % n == 0 and parts // n <= bucket.batch_size
        )
        raise UsageError(
            f"the bucket {bucket.shape} has a batch size of {bucket.batch_size}, too few for "
            f"{parts} data-parallel ranks; raise it, or share clips with "
            f"parallel.ulysses={layout.ulysses * more}"
        )
    mine = ceil(bucket.batch_size / parts)
    return Share(layout, degree, min(mine, config.micro_batch or mine))


def need_of(config: TrainConfig, ranks: int, bucket: Bucket, target: Device) -> Need:
    """What a bucket takes of a rank, rehearsed.

    Raises:
        UsageError: as `share_of`.
    """
    share = share_of(config, ranks, bucket)
    footprint = _at_depth(config, share, bucket)
    return Need(share, footprint, memory_of(config, share.layout, footprint, target))


def memory_of(config: TrainConfig, layout: Layout, footprint: Footprint, target: Device) -> Memory:
    """A rank's memory, given what its step takes."""
    task = config.task
    assert isinstance(task, TextToVideoConfig)
    units = block_parameters(task, layout.tp)
    bf16 = isinstance(config.engine, FsdpConfig) and config.engine.gather_dtype == "bf16"
    used = planner.memory(
        footprint,
        engines.held(config.engine, layout, footprint.parameters),
        target,
        averages=config.ema is not None,
        frozen_bytes=_frozen_bytes(task),
        unit_parameters=max(*units, footprint.parameters - sum(units)),
        gather_bytes=2 if bf16 else 4,
    )
    # Where the optimizer's own step is the worst moment, what it takes stands for activations.
    update = footprint.update - footprint.state
    return replace(used, activations=float(max(update, used.activations)))


def _row(config: TrainConfig, need: Need, bucket: Bucket, rate: float) -> Row:
    assert isinstance(config.task, TextToVideoConfig)
    share, took = need.share, need.footprint
    # Passes of a rank's size, over all ranks.
    times = bucket.batch_size * share.degree * share.layout.tp / share.clips
    plain = took.flops - took.again
    if config.recompute.tiles > 1:  # what tiles have in common, each of them does
        whole = config.model_copy(update={"recompute": RecomputeConfig()})
        plain = _at_depth(whole, share, bucket).flops
    seconds = took.flops * times / (rate * share.layout.world_size)
    flops = {"model_flops": plain * times, "flops": took.flops * times}
    return Row(bucket, share.degree, share.clips, need.memory, seconds=seconds, **flops)


def _at_depth(config: TrainConfig, share: Share, bucket: Bucket) -> Footprint:
    task, saving = config.task, config.recompute
    layout, degree, clips = share.layout, share.degree, share.clips
    assert isinstance(task, TextToVideoConfig)

    def at(depths: dict[str, int]) -> Footprint:
        shared = (layout.ring, layout.ulysses, layout.tp, degree)
        sizes = (*depths.values(), *shared, clips, TEXT_TOKENS)
        key = (sizes, bucket, *choices)
        if key not in _REHEARSED:
            _REHEARSED[key] = rehearsed(depths)
        return _REHEARSED[key]

    def rehearsed(depths: dict[str, int]) -> Footprint:
        model = task.model.model_copy(update=depths)
        make = partial(
            loss_of, task.model_copy(update={"model": model}), layout, bucket, degree, clips, saving
        )
        return rehearse(
            make,
            partial(optim.build, config.optim),
            precision=torch.float32 if config.precision == "fp32" else torch.bfloat16,
            keeps_gradients=engines.held(config.engine, layout, 0).whole,
        )

    parts = (task, config.optim, saving)
    choices = (*(part.model_dump_json() for part in parts), config.precision, shards(config.engine))
    return planner.extrapolate(at, layers(task.model))


def layers(model: zoo.DenoiserConfig) -> dict[str, tuple[int, ...]]:
    """The depths of a model, as `planner.extrapolate` takes them."""
    return {key: (getattr(model, key), *rule) for key, rule in model.layers.items()}


def loss_of(
    config: TextToVideoConfig,
    layout: Layout,
    bucket: Bucket,
    degree: int,
    clips: int,
    saving: RecomputeConfig,
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The task and its loss on a micro-batch of a bucket, built where tensors have no data."""
    vae = zoo.build_vae(config.vae or zoo.VAEConfig()).requires_grad_(False)
    task = TextToVideo(config, vae=vae, text=_text(config), seed=0)
    tensor.imagine(task.model, layout.tp)
    recompute.apply(task.model, saving)
    if layout.sequence > 1:
        task.sequence = SequenceParallel(ImaginedMesh(layout))  # type: ignore[arg-type]
    frames = 1 + (bucket.num_frames - 1) // vae.stride[0]
    size = (bucket.height // vae.stride[1], bucket.width // vae.stride[2])
    latents = torch.empty(clips, vae.latent_channels, frames, *size)
    words = config.model.text_channels
    cond = Condition(
        torch.empty(clips, TEXT_TOKENS, words),
        torch.ones(clips, TEXT_TOKENS, dtype=torch.bool),
        torch.empty(clips, config.model.pooled_channels) if config.model.pooled_channels else None,
        fps=torch.empty(clips),
        size=torch.empty(clips, 2),
    )
    noise, t = torch.empty_like(latents), torch.empty(clips, frames)
    return task, lambda: task.loss_at(latents, noise, t, cond, degree).sum()


def _text(config: TextToVideoConfig) -> Any:
    """The text encoder, where it is trained along; a pretrained one is stood in for."""
    if config.text.kind == "words":
        return zoo.build_text(config.text)
    widths = {"channels": config.model.text_channels}
    return SimpleNamespace(trainable=False, pooled_channels=config.model.pooled_channels, **widths)


def num_parameters(config: TextToVideoConfig) -> int:
    """Trained parameters, exactly."""
    with torch.device("meta"):
        vae = zoo.build_vae(config.vae or zoo.VAEConfig()).requires_grad_(False)
        task = TextToVideo(config, vae=vae, text=_text(config), seed=0)
    return sum(p.numel() for p in task.parameters() if p.requires_grad)


def block_parameters(config: TextToVideoConfig, degree: int = 1) -> list[int]:
    """Parameters of every block that one of `degree` ranks has, which share the layers."""
    with torch.device("meta"):
        model = zoo.DENOISERS[config.model.kind](config.model, in_channels=1)
        tensor.imagine(model, degree)
    return [sum(p.numel() for p in block.parameters()) for block in model.blocks]


def _frozen_bytes(config: TextToVideoConfig) -> float:
    with torch.device("meta"):
        vae = zoo.build_vae(config.vae or zoo.VAEConfig())
    return sum(float(p.nbytes) for p in vae.state_dict().values())
