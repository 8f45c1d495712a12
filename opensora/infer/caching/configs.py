"""The table of step caches. Levels are this project's, 0 data to 1 noise; public code counts to
1000.

All of them draw a slightly other video in less time, and none does when its threshold is 0 or its
levels are empty.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from opensora.config import Config


class Levels(Config):
    """Where on the way from noise to data something is used again."""

    levels: tuple[float, float] = Field(
        default=(0.0, 1.0),
        description="between these levels (both excluded) of the frames that move, work may be "
        "spared; outside all is computed",
    )

    @field_validator("levels")
    @classmethod
    def _ordered(cls, levels: tuple[float, float]) -> tuple[float, float]:
        low, high = levels
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"levels are {list(levels)}; they need 0 <= low <= high <= 1")
        return levels


class BroadcastConfig(Levels):
    """How one kind of layer is used again."""

    levels: tuple[float, float] = Field(
        default=(0.1, 0.95), description="between these levels (both excluded)"
    )
    every: int = Field(
        default=2, ge=1, description="steps from one computation to the next; 1 is off"
    )
    blocks: int | None = Field(
        default=None, ge=1, description="of the first so many blocks only; None: of all"
    )


class PyramidBroadcastConfig(Config):
    """Pyramid attention broadcast (Zhao et al. 2024, arXiv 2408.12588): the less a kind of layer
    changes from step to step, the longer what it gave is used again.

    VideoSys has 2, 4 and 6 steps for spatial, temporal and cross-attention between timesteps 450
    and 930 for Open-Sora (`videosys/pipelines/open_sora`), and MLPs apart; every second step of
    everything gave more speed and less error here (docs/sampling-speed.md). What is kept is the
    output before its gate, so the gate is always that of the level.
    """

    kind: Literal["pab"] = "pab"
    spatial: BroadcastConfig = Field(
        default=BroadcastConfig(), description="attention within frames"
    )
    temporal: BroadcastConfig = Field(
        default=BroadcastConfig(), description="attention across frames"
    )
    cross: BroadcastConfig = Field(default=BroadcastConfig(), description="attention to the text")
    joint: BroadcastConfig = Field(
        default=BroadcastConfig(),
        description="attention of an MMDiT, to all frames and the text",
    )
    mlp: BroadcastConfig = Field(default=BroadcastConfig(), description="the MLPs")


class TeaCacheConfig(Levels):
    """TeaCache (Liu et al. 2024, arXiv 2411.19108): the blocks are skipped, and what they added is
    added again, until the relative L1 changes of the first block's modulated input add up to a
    threshold.

    The public code (`ali-vilab/TeaCache`) rescales a change by a polynomial that was fitted for
    each model; the default leaves it as it is. The other defaults are those of
    docs/sampling-speed.md.
    """

    kind: Literal["teacache"] = "teacache"
    levels: tuple[float, float] = Field(
        default=(0.1, 0.95),
        description="between these levels (both excluded) of the frames that move; the first steps "
        "and the last ones decide most",
    )
    threshold: float = Field(default=0.1, ge=0.0, description="sum of changes; 0 is off")
    coefficients: tuple[float, ...] = Field(
        default=(1.0, 0.0),
        min_length=1,
        description="of the polynomial of a change, the highest power first; what falls below 0 "
        "counts as 0",
    )


class FirstBlockConfig(Levels):
    """First-block cache (ParaAttention's; diffusers' `FirstBlockCacheConfig`): the first pair of
    blocks is always computed; while what it adds differs from what it added when all was last
    computed by less than a threshold, the rest adds what it added then.
    """

    kind: Literal["first_block"] = "first_block"
    threshold: float = Field(default=0.1, ge=0.0, description="relative L1 change; 0 is off")


CacheConfig = Annotated[
    PyramidBroadcastConfig | TeaCacheConfig | FirstBlockConfig, Field(discriminator="kind")
]
