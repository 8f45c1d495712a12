"""Pyramid attention broadcast: layers that change slowly give what they gave some steps ago."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opensora.engine.sequence import Sharded
from opensora.infer.caching.cache import Cache, inside
from opensora.infer.caching.configs import BroadcastConfig, PyramidBroadcastConfig
from opensora.models.mmdit import Heads, Places
from opensora.types import Condition


@dataclass
class Outputs:
    """What the layers of one branch gave.

    Attributes:
        rows: of the branch, B.
        steps: kind of layer -> for each row, the step in which it was computed, or None.
        values: layer -> (B, ...), what it gave.
    """

    rows: int
    steps: dict[str, list[int | None]] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Now:
    """What the call that is running does.

    Attributes:
        rows: int64, those of the branch that it is for.
        reused: the kinds of layers that are not computed.
        kept: those whose results are kept.
    """

    state: Outputs
    rows: Tensor
    reused: frozenset[str]
    kept: frozenset[str]


@dataclass(frozen=True)
class Sparing:
    """Places of an MMDiT in which heads of no features pass, and others attend as they do."""

    places: Places

    @property
    def grid(self) -> tuple[int, int]:
        return self.places.grid

    def turned(self, heads: Heads) -> Heads:
        return self.places.turned(heads) if heads[0].shape[-1] else heads

    def attend(self, video: Heads, text: Heads, mask: Tensor) -> tuple[Tensor, Tensor]:
        if video[0].shape[-1]:
            return self.places.attend(video, text, mask)
        return video[0], text[0]


class PyramidBroadcast(Cache[Outputs]):
    """Attention, and if wanted MLPs, computed in some steps only."""

    def __init__(self, model: nn.Module, config: PyramidBroadcastConfig):
        super().__init__(model)
        layers = self.kind.layers(model)
        self.layers = {
            kind: blocks[: self._of(config, kind).blocks]
            for kind, blocks in layers.items()
            if self._of(config, kind).every > 1
        }
        self.configs = {kind: self._of(config, kind) for kind in self.layers}
        self.now: Now | None = None

    @staticmethod
    def _of(config: PyramidBroadcastConfig, kind: str) -> BroadcastConfig:
        return getattr(config, kind)

    def fresh(self, rows: int) -> Outputs:
        return Outputs(rows, {kind: [None] * rows for kind in self.layers})

    def run(self, state: Outputs, plan: Sharded, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        here = {kind: inside(config, t) for kind, config in self.configs.items()}
        # Rows that do the same are computed together.
        alike: dict[tuple[frozenset[str], frozenset[str]], list[int]] = {}
        for row in range(len(x)):
            kept = frozenset(kind for kind in self.configs if here[kind][row])
            reused = frozenset(kind for kind in kept if self._fresh_enough(state, kind, row))
            alike.setdefault((reused, kept - reused), []).append(row)
        out = None
        for (reused, kept), chosen in alike.items():
            rows = torch.tensor(chosen, device=x.device)
            self.now = Now(state, rows, reused, kept)
            try:
                if len(chosen) == len(x):
                    return self._forward(plan, x, t, cond)
                part = self._forward(plan, x[rows], t[rows], cond[rows])
            finally:
                self.now = None
            out = part.new_empty(len(x), *part.shape[1:]) if out is None else out
            out[rows] = part
        assert out is not None, "a batch has rows"
        return out

    def _fresh_enough(self, state: Outputs, kind: str, row: int) -> bool:
        computed = state.steps[kind][row]
        if computed is not None and self.step - computed < self.configs[kind].every:
            return True
        state.steps[kind][row] = self.step
        return False

    def _forward(self, plan: Sharded, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert self.now is not None
        stream = plan.enter(self.model, x, t, cond)
        if "joint" in self.now.reused:
            stream = replace(stream, places=Sparing(stream.places))
        return plan.leave(self.model, plan.through(self.model, stream))

    def patched(self, patch: Any) -> None:
        for kind, blocks in self.layers.items():
            for layer in (layer for block in blocks for layer in block):
                if kind != "joint":
                    patch(layer, "forward", partial(self._layer, kind, layer, layer.forward))
                    continue
                heads: Any = layer.heads
                patch(layer, "heads", partial(self._heads, heads))
                proj: Any = layer.proj
                patch(proj, "forward", partial(self._layer, kind, proj, proj.forward))

    def _layer(self, kind: str, layer: nn.Module, forward: Any, *inputs: Any) -> Tensor:
        """What a layer gives, or gave. Rows may be cut into frames or places: (B n, ...)."""
        now = self.now
        assert now is not None, "the model's forward is the cache's"
        values = now.state.values
        if kind in now.reused:
            self.reused += len(now.rows)
            return values[id(layer)][now.rows].flatten(0, 1)
        out: Tensor = forward(*inputs)
        self.computed += len(now.rows)
        if kind in now.kept:
            each = len(out) // len(now.rows)  # 0 where other ranks have all frames
            parts = out.unflatten(0, (len(now.rows), each))
            if id(layer) not in values:
                values[id(layer)] = parts.new_zeros(now.state.rows, *parts.shape[1:])
            values[id(layer)][now.rows] = parts
        return out

    def _heads(self, heads: Any, x: Tensor) -> Heads:
        """Queries, keys and values of a joint attention, of no features where it is not done."""
        now = self.now
        assert now is not None, "the model's forward is the cache's"
        if "joint" in now.reused:
            empty = x[..., :0].unsqueeze(2)  # B L 1 0
            return empty, empty, empty
        return heads(x)
