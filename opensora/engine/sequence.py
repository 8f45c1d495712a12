"""Sequence parallelism applied to a model from outside: each rank has some frames of a clip.

A plan says how a model's blocks run on sharded tokens. In an MMDiT all attention is shared, and
every rank has the text (joint attention of USP). STDiT's spatial blocks need no exchange. Its
temporal blocks see all frames of a window: with as many windows as ranks, frames are traded for
windows and back, two exchanges for a pair of blocks (DSP, Zhao et al. 2024, arXiv 2403.10266); with
fewer, the frames stay where they are and attention itself is shared (Ulysses, ring, or both).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from opensora.dist.collectives import exchange, share, shares
from opensora.dist.groups import Group
from opensora.dist.mesh import Layout, Mesh
from opensora.dist.ulysses import SequenceGroups, attend_sharded
from opensora.errors import DataError, UsageError
from opensora.models import mmdit, stdit
from opensora.models.mmdit import Heads, MMDiT
from opensora.models.stdit import Places, STDiT
from opensora.ops.attention import ChosenBlock, attend
from opensora.types import Condition

Sharing = Literal["auto", "attention"]


@dataclass(frozen=True)
class SequenceParallel:
    """How the clips of a run are shared.

    Attributes:
        mesh: the groups of ranks; None on one rank.
        max_tokens: as in `ParallelConfig`.
        sharing: 'auto' trades frames for windows where it can, 'attention' never does.
    """

    mesh: Mesh | None = None
    max_tokens: int | None = None
    sharing: Sharing = "auto"

    @property
    def _layout(self) -> Layout:
        return Layout() if self.mesh is None else self.mesh.layout

    def degree(self, num_tokens: int) -> int:
        """By how many ranks a training clip of so many tokens is shared."""
        return self._layout.degree_for(num_tokens, self.max_tokens)

    @property
    def most(self) -> int:
        """By how many ranks every other clip is shared, in validation."""
        return self._layout.sequence

    @property
    def copies(self) -> int:
        """How many ranks do the same work on a part of a clip, with parts of the layers."""
        return self._layout.tp

    @property
    def counts(self) -> bool:
        """Whether this rank is the one of them whose work is counted."""
        return self._layers is None or self._layers.rank == 0

    @property
    def _layers(self) -> Group | None:
        return self.mesh.layers if self.mesh is not None and self.copies > 1 else None

    def groups(self, degree: int) -> SequenceGroups:
        """The ranks that share a clip with this one."""
        return SequenceGroups() if self.mesh is None else self.mesh.sequence(degree)

    def frames(self, num_frames: int, degree: int) -> slice:
        """This rank's frames of a clip."""
        groups = self.groups(degree)
        return share(num_frames, groups.rank, groups.size)

    def check_same(self, sample_ids: Tensor, degree: int, device: torch.device) -> None:
        """See that the ranks which share clips, or layers, have read the same ones.

        Args:
            sample_ids: int64 (B,).

        Raises:
            DataError: one of them had to replace a sample that others could read.
        """
        for group in (self.groups(degree).flat, self._layers):
            if group is not None:
                self._check_same(sample_ids.to(device), group)

    def _check_same(self, mine: Tensor, group: Group) -> None:
        others = group.all_gather(mine, [mine.shape] * group.size)
        if not all(torch.equal(mine, other) for other in others):
            raise DataError(
                "ranks that share a clip have read different samples, "
                f"{[other.tolist() for other in others]}: a file can be read on some ranks only. "
                "Look at the storage of each, then run the same command again"
            )

    def run(self, model: nn.Module, x: Tensor, t: Tensor, cond: Condition, degree: int) -> Tensor:
        """model(x, t, cond) for this rank's frames.

        Args:
            x, t, cond: of the whole clips, the same on every rank that shares them.

        Returns:
            float (B, C, this rank's frames, H, W). Gradients of parameters are this rank's share.
        """
        groups = self.groups(degree)
        if groups.size == 1:
            return model(x, t, cond)
        plan = plan_of(model)
        assert plan is not None, "`check` has refused the model"
        return model(x, t, cond, plan=plan(groups, self.sharing))


@dataclass(frozen=True)
class Sharded(ABC):
    """How a model's parts run on some frames of a clip; of groups of one rank, on all of them.

    Whatever runs a model otherwise than whole, such as a step cache, does so through these parts
    and serves any number of ranks.
    """

    groups: SequenceGroups = field(default_factory=SequenceGroups)
    sharing: Sharing = "auto"

    def __call__(self, model: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """(B, C, this rank's frames, H, W)."""
        return self.leave(model, self.through(model, self.enter(model, x, t, cond)))

    def mine(self, num_frames: int) -> slice:
        """This rank's frames of a clip."""
        return share(num_frames, self.groups.rank, self.groups.size)

    @abstractmethod
    def enter(self, model: Any, x: Tensor, t: Tensor, cond: Condition) -> Any:
        """The stream of this rank's frames before the blocks."""

    @abstractmethod
    def through(self, model: Any, stream: Any, pairs: slice = slice(None)) -> Any:
        """The stream after some pairs of blocks."""

    @abstractmethod
    def leave(self, model: Any, stream: Any) -> Tensor:
        """What comes after the blocks: (B, C, this rank's frames, H, W)."""


class ShardedSTDiT(Sharded):
    """The stream's level and modulation are those of all frames, its places the whole clip's."""

    def enter(self, model: STDiT, x: Tensor, t: Tensor, cond: Condition) -> stdit.Stream:
        return model.enter(x, t, cond, frames=self.mine(x.shape[2]))

    def through(
        self, model: STDiT, stream: stdit.Stream, pairs: slice = slice(None)
    ) -> stdit.Stream:
        groups, num_frames = self.groups, stream.modulation.shape[1]
        mine, frames = self.mine(num_frames), shares(num_frames, groups.size)
        several = groups.size > 1
        trade = self.sharing == "auto" and stream.places.num_windows >= groups.size
        run_temporal = _traded(stream.places, frames, groups) if several and trade else None
        places = stream.places
        if several and not trade:
            places = _shared(places, frames, mine, groups)
        here = (stream.text, stream.mask, stream.modulation[:, mine], places)
        whole_clip = (stream.text, stream.mask, stream.modulation)

        def pair(tokens: Tensor, spatial: nn.Module, temporal: nn.Module) -> Tensor:
            tokens = spatial(tokens, *here)
            if run_temporal is None:
                return temporal(tokens, *here)
            return run_temporal(lambda x, local: temporal(x, *whole_clip, local), tokens)

        tokens = stream.tokens
        for blocks in model.pairs[pairs]:
            tokens = model.group(pair, tokens, *blocks)
        return replace(stream, tokens=tokens)

    def leave(self, model: STDiT, stream: stdit.Stream) -> Tensor:
        level = stream.level[:, self.mine(stream.level.shape[1])]
        frames_here = model.leave(stream.tokens, level, stream.places.grid)
        # Of no frames it is a view of the tokens, at which FSDP's hooks take offence.
        return frames_here if frames_here.numel() else frames_here.clone()


def _traded(
    places: Places, frames: list[int], groups: SequenceGroups
) -> Callable[[Callable[[Tensor, Places], Tensor], Tensor], Tensor]:
    """Run a temporal block on all frames of this rank's windows."""
    windows = shares(places.num_windows, groups.size)
    down, across = places.window
    # Windows below one another are a picture of the same kind.
    local = replace(places, grid=(windows[groups.rank] * down, across))

    def run(block: Callable[[Tensor, Places], Tensor], tokens: Tensor) -> Tensor:
        x = places.by_window(tokens).flatten(3)  # B T' W (M D)
        x = exchange(x, groups.flat, split=2, join=1, split_sizes=windows, join_sizes=frames)
        x = rearrange(x, "b t w (m d) -> b t (w m) d", m=down * across)  # B T W'M D
        x = rearrange(block(x, local), "b t (w m) d -> b t w (m d)", m=down * across)
        x = exchange(x, groups.flat, split=1, join=2, split_sizes=frames, join_sizes=windows)
        return places.by_row(x.unflatten(3, (down * across, -1)))  # B T' N D

    return run


def _shared(places: Places, frames: list[int], mine: slice, groups: SequenceGroups) -> Places:
    """Temporal attention whose sequence is sharded frame by frame."""
    size = places.window[0] * places.window[1]
    shared = partial(
        attend_sharded,
        groups=groups,
        block=ChosenBlock(),
        whole=attend,
        lengths=tuple(count * size for count in frames),
    )
    phases = places.phases.unflatten(0, (-1, size))[mine].flatten(0, 1)
    return replace(places, phases=phases, attend=shared)


class ShardedMMDiT(Sharded):
    """Every rank runs the text's layers as well: its gradients there are what reaches them from its
    own frames, so that they add up to the whole and nothing is counted twice."""

    def enter(self, model: MMDiT, x: Tensor, t: Tensor, cond: Condition) -> mmdit.Stream:
        groups, num_frames = self.groups, x.shape[2]
        stream = model.enter(x, t, cond, frames=self.mine(num_frames))
        if groups.size == 1:
            return stream
        lengths = tuple(n * stream.tokens.shape[2] for n in shares(num_frames, groups.size))

        def together(video: Heads, text: Heads, mask: Tensor) -> tuple[Tensor, Tensor]:
            joint: dict[str, Any] = {"text": text, "mask": mask, "lengths": lengths}
            out = attend_sharded(*video, groups, ChosenBlock(), whole=attend, **joint)
            assert isinstance(out, tuple)
            return out

        return replace(stream, places=replace(stream.places, attend=together))

    def through(
        self, model: MMDiT, stream: mmdit.Stream, pairs: slice = slice(None)
    ) -> mmdit.Stream:
        return model.through(stream, pairs)

    def leave(self, model: MMDiT, stream: mmdit.Stream) -> Tensor:
        return model.leave(stream)


PLANS: dict[type[nn.Module], type[Sharded]] = {STDiT: ShardedSTDiT, MMDiT: ShardedMMDiT}


def plan_of(model: nn.Module) -> type[Sharded] | None:
    """The plan of a kind of model; None where there is none."""
    return next((plan for kind, plan in PLANS.items() if isinstance(model, kind)), None)


def check(model: nn.Module, layout: Layout) -> None:
    """Refuse what no plan covers.

    Raises:
        UsageError: the model has no plan.
    """
    if layout.sequence > 1 and plan_of(model) is None:
        known = ", ".join(kind.__name__ for kind in PLANS)
        raise UsageError(
            f"{type(model).__name__} cannot share sequences: set parallel.ring=1 and "
            f"parallel.ulysses=1, or use one of {known}"
        )
