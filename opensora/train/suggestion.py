"""What to change in a config that does not fit: the cheapest of the known changes that help.

Most of them are ruled out by arithmetic alone, since what they keep is known without a rehearsal;
what is left is rehearsed in the order of its cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opensora.data.buckets import Bucket
from opensora.dist.mesh import ParallelConfig
from opensora.engine.engines import shards
from opensora.engine.footprint import Footprint
from opensora.engine.fsdp import FsdpConfig
from opensora.engine.planner import Device
from opensora.engine.recompute import RecomputeConfig
from opensora.train.config import TrainConfig
from opensora.train.forecast import block_parameters, memory_of, need_of, share_of
from opensora.train.text_to_video import TextToVideoConfig

WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"policy": "selective"},
    {"policy": "block"},
    {"policy": "block", "tiles": 8},
    {"policy": "pair", "tiles": 16},
    {"policy": "block", "tiles": 16, "offload": True},
)
"""Ways to save memory for activations, in the order of what they cost."""

KEPT = {"none": 16.0, "selective": 3.0, "block": 1.0, "pair": 0.5}
"""Residuals that a block keeps at the least, each as large as the tokens: without recomputation
inputs of its products, queries, keys, values and the MLP's hidden layer, twice."""


@dataclass(frozen=True)
class Attempt:
    """A change that was looked at.

    Attributes:
        config: with the change.
        memory: bytes on a rank; where `rehearsed` is False no more than a lower bound.
    """

    config: TrainConfig
    memory: float
    rehearsed: bool


def search(config: TrainConfig, ranks: int, target: Device, bucket: Bucket) -> list[Attempt]:
    """Changes in the order of their cost, up to the first under which a bucket fits."""
    tried = []
    for candidate in _candidates(config, ranks, bucket):
        least = at_least(candidate, ranks, bucket, target)
        if least > target.memory:
            tried.append(Attempt(candidate, least, rehearsed=False))
            continue
        found = need_of(candidate, ranks, bucket, target).memory.total
        tried.append(Attempt(candidate, found, rehearsed=True))
        if found <= target.memory:
            break
    return tried


def fitting(tried: list[Attempt], target: Device) -> TrainConfig | None:
    """The config at which a search came to its end, or None where nothing fits."""
    last = tried[-1]
    return last.config if last.rehearsed and last.memory <= target.memory else None


def _candidates(config: TrainConfig, ranks: int, bucket: Bucket) -> list[TrainConfig]:
    """Every placement with every way; then with the optimizer's state on the host too."""
    ways = [{"recompute": RecomputeConfig(**way)} for way in WAYS]
    away = {"optim": config.optim.model_copy(update={"offload": True})}
    return [
        config.model_copy(update={**placement, **way, **more})
        for more in ({}, away)
        for placement in _placements(config, ranks, bucket)
        for way in (ways if not more else ways[-2:])
    ]


def _placements(config: TrainConfig, ranks: int, bucket: Bucket) -> list[dict[str, Any]]:
    """Engines and ways to share clips: as the config says, then sharded, then shared by more."""
    found: list[dict[str, Any]] = [{}]
    engine = config.engine if shards(config.engine) else FsdpConfig()
    degrees = [d for d in range(1, ranks + 1) if ranks % d == 0 and d & (d - 1) == 0]
    for degree in degrees if ranks > 1 else ():
        if bucket.batch_size * degree >= ranks:
            found.append({"engine": engine, "parallel": ParallelConfig(ulysses=degree)})
    return found


def at_least(config: TrainConfig, ranks: int, bucket: Bucket, target: Device) -> float:
    """A lower bound of a rank's memory, found without a rehearsal."""
    task, saving, share = config.task, config.recompute, share_of(config, ranks, bucket)
    assert isinstance(task, TextToVideoConfig)
    units = block_parameters(task, share.layout.tp)
    blocks, parameters = len(units), sum(units)
    tokens = share.clips * bucket.num_tokens / share.degree
    residual = tokens * task.model.width * (4 if config.precision == "fp32" else 2)
    kept = KEPT[saving.policy] * blocks * residual / share.layout.tp
    kept = 0.0 if saving.offload else kept
    moments = (
        0 if config.optim.offload else parameters * (config.optim.kind == "adamw") + parameters
    )
    state = moments * (2 if config.optim.state_dtype == "bf16" else 4)
    least = Footprint(parameters, 0, round(kept + 2 * residual), 0, 0, state)
    return memory_of(config, share.layout, least, target).total
