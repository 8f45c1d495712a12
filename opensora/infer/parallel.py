"""Several ranks that draw the same videos together, each with the same noise and the same weights.

`sequence` shares the frames of every call of the model, as in training (`engine.sequence`);
`branches` gives the branches of guidance to different ranks. Both may be combined. What comes back
is whole on every rank, so nothing else in sampling knows of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from opensora.diffusion.guidance import Branch
from opensora.dist.collectives import shares
from opensora.dist.groups import Group
from opensora.dist.mesh import Layout, Mesh
from opensora.engine import sequence
from opensora.engine.sequence import SequenceParallel
from opensora.errors import UsageError
from opensora.runtime import Runtime
from opensora.types import Condition

SHARING = ("prompts", "sequence", "guidance", "both")
"""What ranks may share."""


@dataclass(frozen=True)
class Team:
    """How ranks share a video.

    Attributes:
        sequence: how they share its frames.
        branches: the ranks that have the same frames and different branches of guidance.
    """

    sequence: SequenceParallel = field(default_factory=SequenceParallel)
    branches: Group | None = None

    def run(self, model: nn.Module, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """model(x, t, cond), whole on every rank.

        Args:
            x, t, cond: the same on every rank.
        """
        mine = self.sequence.run(model, x, t, cond, self.sequence.most)
        group = self.sequence.groups(self.sequence.most).flat
        if group is None:
            return mine
        batch, channels, frames, *size = x.shape
        parts = [(batch, channels, count, *size) for count in shares(frames, group.size)]
        return torch.cat(group.all_gather(mine, parts), dim=2)

    def agree(self, here: bool, device: torch.device) -> bool:
        """Whether all ranks that share frames say so: they call the model as often as each other.
        Collective."""
        group = self.sequence.groups(self.sequence.most).flat
        if group is None:
            return here
        mine = torch.tensor([int(here)], device=device)
        return all(int(vote) for vote in group.all_gather(mine, [(1,)] * group.size))

    def spread(self, branches: Sequence[Branch], like: Tensor) -> list[Tensor]:
        """The estimate of every branch; each rank computes its own, one after the other."""
        group = self.branches
        if group is None:
            return [branch() for branch in branches]
        owner = [number % group.size for number in range(len(branches))]
        mine = [one() for one, rank in zip(branches, owner, strict=True) if rank == group.rank]
        stacked = torch.stack(mine) if mine else like.new_empty(0, *like.shape)
        shapes = [(owner.count(rank), *like.shape) for rank in range(group.size)]
        rows = [list(part) for part in group.all_gather(stacked, shapes)]
        return [rows[rank].pop(0) for rank in owner]


def team_of(sharing: str, place: Runtime, model: nn.Module) -> Team | None:
    """The team of all ranks, or None where each draws videos of its own. Collective.

    Args:
        sharing: one of SHARING.

    Raises:
        UsageError: the ranks cannot be divided so, or the model has no plan for it.
    """
    world = place.world_size
    if sharing == "prompts" or world == 1:
        return None
    copies = {"sequence": 1, "guidance": world, "both": 2}[sharing]
    if copies > 3 or world % copies:
        raise UsageError(
            f"--share {sharing} on {world} ranks: guidance has two or three branches, so it takes "
            "2 or 3 ranks, and both takes an even number"
        )
    layout = Layout(dp_replicate=copies, ulysses=world // copies)
    sequence.check(model, layout)
    mesh = Mesh(layout, place.rank, place.device.type)
    return Team(SequenceParallel(mesh), mesh.copies)
