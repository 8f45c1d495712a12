"""Caches that skip blocks: what they added to the tokens is added once more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from opensora.dist.groups import Group
from opensora.engine.sequence import Sharded
from opensora.errors import UsageError
from opensora.infer.caching.cache import Cache, inside, moving
from opensora.infer.caching.configs import FirstBlockConfig, TeaCacheConfig
from opensora.infer.caching.kinds import rows_of
from opensora.types import Condition


@dataclass
class Skipped:
    """What is known of the rows of one branch.

    Attributes:
        seen: (B, T, N, D) that the next one is compared with.
        added: (B, T, N, D) by the blocks when they were last computed.
        changes: of each row, since then.
    """

    changes: list[float]
    seen: Tensor | None = None
    added: Tensor | None = None


def relative_change(new: Tensor, old: Tensor, frames: Tensor, group: Group | None = None) -> Tensor:
    """(B,): sum of |new - old| over that of |old| of some frames, in float32.

    Args:
        new, old: (B, T, N, D).
        frames: bool (B, T).
        group: the ranks that have the clip's other frames; all find the same, to the bit.
    """
    weight = frames[:, :, None, None]
    size = old.float().abs().mul(weight).sum(dim=(1, 2, 3))
    change = (new.float() - old.float()).abs().mul(weight).sum(dim=(1, 2, 3))
    both = torch.stack([change, size])  # 2 B
    if group is not None:
        both = torch.stack(group.all_gather(both, [both.shape] * group.size)).sum(0)
    return both[0] / both[1].clamp(min=torch.finfo(torch.float32).tiny)


class _Skipping(Cache[Skipped]):
    """What both have in common."""

    def fresh(self, rows: int) -> Skipped:
        return Skipped([0.0] * rows)

    def _changes(self, new: Tensor, old: Tensor, plan: Sharded, t: Tensor) -> list[float]:
        """Of each row, of the frames that move."""
        mine = moving(t)[:, plan.mine(t.shape[1])]
        return relative_change(new, old, mine, plan.groups.flat).tolist()

    def _through(
        self, state: Skipped, plan: Sharded, stream: Any, pairs: slice, skip: list[bool]
    ) -> Any:
        """The stream after some pairs of blocks, which rows to skip do without."""
        self.reused += sum(skip)
        self.computed += len(skip) - sum(skip)
        if not any(skip):
            done = plan.through(self.model, stream, pairs)
            state.added = done.tokens - stream.tokens
            return done
        assert state.added is not None, "only what was computed is used again"
        if not all(skip):
            rows = torch.tensor([i for i, s in enumerate(skip) if not s])
            rows = rows.to(stream.tokens.device)
            some = rows_of(stream, rows)
            done = plan.through(self.model, some, pairs)
            state.added[rows] = done.tokens - some.tokens
            tokens = stream.tokens + state.added
            tokens[rows] = done.tokens
        else:
            tokens = stream.tokens + state.added
        return replace(stream, tokens=tokens)


class TeaCache(_Skipping):
    """All blocks, until changes of the first one's modulated input add up."""

    def __init__(self, model: nn.Module, config: TeaCacheConfig):
        super().__init__(model)
        self.config = config

    def run(self, state: Skipped, plan: Sharded, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        stream = plan.enter(self.model, x, t, cond)
        signature = self.kind.modulated(self.model, stream, plan.mine(t.shape[1]))
        skip = [False] * len(x)
        if state.seen is not None:
            changes = self._changes(signature, state.seen, plan, t)
            for row, (here, change) in enumerate(zip(inside(self.config, t), changes, strict=True)):
                state.changes[row] += max(0.0, self._rescaled(change))
                skip[row] = here and state.changes[row] < self.config.threshold
        state.changes = [c if s else 0.0 for c, s in zip(state.changes, skip, strict=True)]
        state.seen = signature
        stream = self._through(state, plan, stream, slice(None), skip)
        return plan.leave(self.model, stream)

    def _rescaled(self, change: float) -> float:
        total = 0.0
        for coefficient in self.config.coefficients:
            total = total * change + coefficient
        return total


class FirstBlock(_Skipping):
    """All pairs of blocks but the first."""

    def __init__(self, model: nn.Module, config: FirstBlockConfig):
        super().__init__(model)
        self.config = config
        if len(model.pairs) < 2:  # type: ignore[arg-type]
            raise UsageError(
                "sampling.cache.kind=first_block skips what follows the first pair of blocks, and "
                "this model has no more: use teacache or pab"
            )

    def run(self, state: Skipped, plan: Sharded, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        before = plan.enter(self.model, x, t, cond)
        first = plan.through(self.model, before, slice(0, 1))
        added = first.tokens - before.tokens
        skip = [False] * len(x)
        if state.seen is not None:
            changes = self._changes(added, state.seen, plan, t)
            here = inside(self.config, t)
            skip = [h and c < self.config.threshold for h, c in zip(here, changes, strict=True)]
        kept = torch.tensor(skip, device=x.device)[:, None, None, None]
        state.seen = added if state.seen is None else torch.where(kept, state.seen, added)
        stream = self._through(state, plan, first, slice(1, None), skip)
        return plan.leave(self.model, stream)
