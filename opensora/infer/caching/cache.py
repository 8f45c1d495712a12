"""What all step caches have in common.

State belongs to the time of one video. Every branch of guidance has its own, and every row of a
batch decides by itself: what a video looks like depends neither on the others drawn with it nor on
whether branches share a call, or are on one rank. Ranks that share the frames of a video decide as
one: levels are the whole clip's, and what they measure they add up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from opensora.engine.sequence import Sharded, plan_of
from opensora.errors import UsageError
from opensora.infer.caching.configs import Levels
from opensora.infer.caching.kinds import kind_of
from opensora.types import Condition

State = TypeVar("State")


class Cache(ABC, Generic[State]):
    """One cache on one model for the time of one video.

    A branch of guidance is told by the condition that it passes, which is the same object at every
    step, and by how many calls of this step had it before: a solver's second stage, or a branch
    that is told the same but not shown the given frames, has a state of its own.

    Attributes:
        step: number of the sampler's step.
        computed, reused: results so far, of the blocks of one row, or for `pab` of one layer.
    """

    def __init__(self, model: nn.Module):
        self.model, self.kind = model, kind_of(model)
        self.step = self.computed = self.reused = 0
        self._calls: dict[int, int] = {}
        self._states: dict[tuple[int, int], tuple[Condition, State]] = {}
        whole = plan_of(model)
        assert whole is not None, "each kind with caches has a plan"
        self._whole = whole()

    def tick(self) -> None:
        """A step of the sampler is over."""
        self.step += 1
        self._calls.clear()

    def __call__(
        self, x: Tensor, t: Tensor, cond: Condition, *, plan: Sharded | None = None
    ) -> Tensor:
        """The model's `forward`."""
        if torch.is_grad_enabled():
            raise UsageError("a step cache serves sampling only: call the model under no_grad")
        call = self._calls.get(id(cond), 0)
        self._calls[id(cond)] = call + 1
        # The condition is kept, so that no other one comes to have its id.
        _, state = self._states.setdefault((id(cond), call), (cond, self.fresh(len(x))))
        t = (t[:, None] if t.dim() == 1 else t).expand(len(x), x.shape[2])
        return self.run(state, plan or self._whole, x, t, cond)

    @abstractmethod
    def fresh(self, rows: int) -> State:
        """The state of a branch that nothing was computed of."""

    @abstractmethod
    def run(self, state: State, plan: Sharded, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The prediction for x (B, C, T, H, W) at levels t (B, T), for this rank's frames."""

    def patched(self, patch: Any) -> None:
        """Put more in the place of parts of the model, with `patch(owner, name, value)`."""


def moving(t: Tensor) -> Tensor:
    """bool (B, T): the frames that a step changes. They are between data and noise; where none is,
    those that are not given, as at the first step."""
    between = (t > 0) & (t < 1)
    return torch.where(between.any(dim=1, keepdim=True), between, t > 0)


def inside(levels: Levels, t: Tensor) -> list[bool]:
    """For each row of t (B, T), whether its frames that move are between the levels."""
    low, high = levels.levels
    level = t.masked_fill(~moving(t), 0.0).amax(dim=1)
    return ((level > low) & (level < high)).tolist()
