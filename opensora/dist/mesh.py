"""One mesh for every kind of parallelism, checked before any memory is taken.

Axes, outermost first: dp_replicate (copies of everything), dp_shard (parameters are sharded, data
differ), ring and ulysses (one sequence is shared), tp (one layer is shared). Ranks that share a
sequence are neighbours, so that on clusters they are in one machine. Parameters are sharded over
dp_shard, ring and ulysses together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch.distributed as dist
from pydantic import Field
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from opensora.config import Config
from opensora.dist.groups import TorchGroup
from opensora.dist.ulysses import SequenceGroups
from opensora.errors import UsageError

AXES = ("dp_replicate", "dp_shard", "ring", "ulysses", "tp")


class ParallelConfig(Config):
    """How many ranks each axis has; their product is the number of ranks."""

    dp_replicate: int | None = Field(
        default=None, ge=1, description="copies of the model; None: what the other axes leave"
    )
    dp_shard: int | None = Field(
        default=None,
        ge=1,
        description="ranks that share parameters; None: what the other axes leave to an engine "
        "that shards, 1 for one that does not",
    )
    ring: int = Field(default=1, ge=1, description="ranks that pass keys and values around")
    ulysses: int = Field(
        default=1, ge=1, description="ranks that trade tokens for heads, or frames for places (DSP)"
    )
    tp: int = Field(default=1, ge=1, description="ranks that share every layer's matrices")
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="video tokens of one clip that a rank takes alone; clips with more are shared "
        "by as few of the ring x ulysses ranks as keep to it. None: all of them share every clip",
    )


@dataclass(frozen=True)
class Layout:
    """Ranks by axis, resolved; all at least 1."""

    dp_replicate: int = 1
    dp_shard: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def world_size(self) -> int:
        return prod(self.sizes)

    @property
    def sequence(self) -> int:
        """Ranks that may share a sequence."""
        return self.ring * self.ulysses

    @property
    def degrees(self) -> list[int]:
        """By how many ranks a sequence may be shared: parts of the Ulysses ranks, then whole rings
        of them."""
        inner = [d for d in range(1, self.ulysses + 1) if self.ulysses % d == 0]
        outer = [self.ulysses * d for d in range(2, self.ring + 1) if self.ring % d == 0]
        return inner + outer

    def degree_for(self, num_tokens: int, max_tokens: int | None) -> int:
        """The least degree at which a rank has no more than `max_tokens` of a clip's tokens."""
        if max_tokens is None:
            return self.sequence
        enough = (d for d in self.degrees if num_tokens <= d * max_tokens)
        return next(enough, self.sequence)

    def part(self, rank: int, degree: int) -> tuple[int, int]:
        """(index, count): which part of a step's samples a rank takes when every clip is shared by
        `degree` ranks; those take the same part."""
        together = degree * self.tp
        return rank // together, self.world_size // together


def resolve(config: ParallelConfig, world_size: int, *, shards: bool) -> Layout:
    """The layout of a config on some number of ranks.

    Args:
        shards: whether the engine shards parameters; then dp_shard takes what is left, otherwise
            dp_replicate does.

    Raises:
        UsageError: the axes do not multiply to the number of ranks, or the engine does not shard.
    """
    inner = config.ring * config.ulysses * config.tp
    replicate, shard = config.dp_replicate, config.dp_shard
    if not shards and (shard or 1) > 1:
        raise UsageError(
            f"parallel.dp_shard={shard} needs an engine that shards parameters: set "
            "engine.kind=fsdp, or parallel.dp_shard=1"
        )
    if replicate is None and (shard is not None or not shards):
        replicate = max(1, world_size // (inner * (shard or 1)))
    replicate = replicate or 1
    if shard is None:
        shard = max(1, world_size // (inner * replicate)) if shards else 1
    layout = Layout(replicate, shard, config.ring, config.ulysses, config.tp)
    if layout.world_size != world_size:
        wanted = " x ".join(f"{a}={n}" for a, n in zip(AXES, layout.sizes, strict=True) if n > 1)
        raise UsageError(
            f"parallel asks for {wanted or 'one rank'} = {layout.world_size} ranks, but there are "
            f"{world_size}: start that many with torchrun --nproc-per-node, or change an axis"
        )
    return layout


class Mesh:
    """This rank's place in a layout, and the process groups through it.

    Making it is collective: every rank of the job does, in the same order.
    """

    def __init__(self, layout: Layout, rank: int, device_type: str = "cpu"):
        self.layout, self.rank, self.device_type = layout, rank, device_type
        self._groups = {
            degree: self._make_groups(degree) for degree in layout.degrees if degree > 1
        }

        whole_models = layout.world_size // layout.tp
        self.replicas = self._subgroup(whole_models, 1) if layout.tp > 1 else None
        """Where layers are shared: the ranks that have the same part of them as this one."""

    @cached_property
    def devices(self) -> DeviceMesh:
        """The ranks as torch's mesh: (replicate, shard, tp), where shard joins dp_shard, ring and
        ulysses. Making it is collective."""
        layout = self.layout
        sizes = (layout.dp_replicate, layout.dp_shard * layout.sequence, layout.tp)
        names = ("replicate", "shard", "tp")
        mesh = init_device_mesh(self.device_type, sizes, mesh_dim_names=names)
        if min(sizes[1:]) > 1:  # sums over both are made in one go, the same on every rank
            mesh["shard", "tp"]._flatten("shard_tp")
        return mesh

    @cached_property
    def layers(self) -> TorchGroup | None:
        """The ranks that share layers with this one."""
        return TorchGroup(self.devices["tp"].get_group()) if self.layout.tp > 1 else None

    @cached_property
    def copies(self) -> TorchGroup | None:
        """The ranks that have the same place as this one in other copies of the model. Making it is
        collective."""
        layout = self.layout
        return self._subgroup(layout.dp_replicate, layout.dp_shard * layout.sequence)

    def _make_groups(self, degree: int) -> SequenceGroups:
        """Groups of `degree` neighbours: Ulysses inside, ring across."""
        size = min(degree, self.layout.ulysses)
        ulysses = self._subgroup(size, 1)
        ring = self._subgroup(degree // size, size)
        both = ulysses is not None and ring is not None
        return SequenceGroups(ulysses, ring, self._subgroup(degree, 1) if both else ulysses or ring)

    def _subgroup(self, size: int, stride: int) -> TorchGroup | None:
        """This rank's group of ranks that are `stride` apart within the sequence axes."""
        if size == 1:
            return None
        stride *= self.layout.tp
        mine = None
        for start in range(0, self.layout.world_size, size * stride):
            for offset in range(stride):
                ranks = [start + offset + stride * k for k in range(size)]
                group = dist.new_group(ranks)
                if self.rank in ranks:
                    mine = group
        assert isinstance(mine, dist.ProcessGroup)
        return TorchGroup(mine)

    def sequence(self, degree: int) -> SequenceGroups:
        """The ranks that share a sequence with this one at some degree."""
        return self._groups.get(degree, SequenceGroups())

    def part(self, degree: int) -> tuple[int, int]:
        """`Layout.part` of this rank."""
        return self.layout.part(self.rank, degree)
