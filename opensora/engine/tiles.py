"""A module computed tile by tile, so that what lies within it is never whole.

Of the whole sequence only the module's input, its output and their gradients exist. Nothing but
the input is kept: the backward pass computes each tile again and takes it back at once, which
costs one more forward pass of the module and no more, since nothing else is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from opensora.engine import compiling
from opensora.engine.flops import repeated
from opensora.ops.pieces import Divisible, Stage

Call = Callable[..., Any]


def apply(module: nn.Module, tiles: int) -> None:
    """Run a module that offers `stages` in about so many tiles; names of parameters stay."""
    # Where it lies within something that is compiled, it is a call out of that.
    module.forward = torch.compiler.disable(partial(_forward, module, module.forward, tiles))


def joined(module: nn.Module, call: Call, tiles: int, run: Call, x: Tensor, *others: Any) -> Tensor:
    """`call` in tiles that `run(tile's work, its tokens, *others)` takes care of."""
    if tiles == 1 or not divisible(module):
        return run(call, x, *others)
    for stage in cast(Divisible, module).stages(call, tiles, x, *others):
        parts = [run(piece.run, x[piece.index], *others) for piece in stage]
        x = torch.cat(parts, len(stage[0].index) - 1)
    return x


def divisible(module: nn.Module) -> bool:
    """Whether a module says how it can be computed piece by piece."""
    return hasattr(module, "stages")


def _forward(module: nn.Module, call: Call, tiles: int, x: Tensor, *others: Any) -> Tensor:
    stages = cast(Divisible, module).stages(call, tiles, x, *others)
    work = _Work(stages, others, _autocast_of(x.device.type))
    if not torch.is_grad_enabled():
        return work.forward(x)
    parameters = tuple(p for p in module.parameters() if p.requires_grad)
    kept = _Kept.apply(torch.empty(0, device=x.device, requires_grad=True), x).grad_fn
    given = tuple(value for value in others if _differentiable(value))
    return _Tiled.apply(work, kept, parameters, x, *given, *parameters)


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _autocast_of(device: str) -> Callable[[], torch.autocast]:
    """The autocast that is on now, to be entered again. Casts of weights are not remembered: one
    made without a graph would be taken for one with a graph."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return partial(torch.autocast, device, dtype, enabled, cache_enabled=False)


@dataclass(frozen=True)
class _Work:
    """What is to be done with tokens.

    Attributes:
        others: what the module is given besides them.
        autocast: makes the context of the forward pass.
    """

    stages: list[Stage]
    others: tuple[Any, ...]
    autocast: Callable[[], torch.autocast]

    def forward(self, x: Tensor, stages: Sequence[Stage] | None = None) -> Tensor:
        """The result of all stages, or of some, without a graph."""
        with torch.no_grad(), self.autocast(), compiling.in_training():
            for stage in self.stages if stages is None else stages:
                x = self._stage(stage, x)
        return x

    def _stage(self, stage: Stage, x: Tensor) -> Tensor:
        out = None
        for piece in stage:
            part = piece.run(x[piece.index], *self.others)
            if out is None:
                out = part.new_empty(*x.shape[:-1], part.shape[-1])
            out[piece.index] = part
        assert out is not None
        return out

    def backward(self, x: Tensor, gradient: Tensor, sums: _Sums) -> Tensor:
        """The gradient of x; those of what `sums` is about are added up there."""
        for last in range(len(self.stages) - 1, -1, -1):
            with repeated():
                entered = self.forward(x, self.stages[:last])
            gradient = self._stage_backward(self.stages[last], entered, gradient, sums)
        return gradient

    def _stage_backward(self, stage: Stage, x: Tensor, gradient: Tensor, sums: _Sums) -> Tensor:
        found = torch.empty_like(x)
        for piece in stage:
            part = x[piece.index].detach().requires_grad_()
            with torch.enable_grad(), self.autocast(), compiling.in_training(), repeated():
                out = piece.run(part, *self.others)
            inputs = [part, *sums.leaves]
            first, *rest = torch.autograd.grad(
                out, inputs, gradient[piece.index], allow_unused=True
            )
            del out
            found[piece.index] = first
            sums.add(rest)
        return found


class _Sums:
    """Gradients added up over tiles, in float32 at least."""

    def __init__(self, leaves: Sequence[Tensor]):
        self.leaves = leaves
        self._sums: list[Tensor | None] = [None] * len(leaves)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        for k, gradient in enumerate(gradients):
            total = self._sums[k]
            if gradient is None:
                continue
            if total is None:
                wide = torch.promote_types(gradient.dtype, torch.float32)
                self._sums[k] = gradient.to(wide)
            else:
                total.add_(gradient)

    @property
    def totals(self) -> list[Tensor | None]:
        pairs = zip(self._sums, self.leaves, strict=True)
        return [None if total is None else total.to(leaf.dtype) for total, leaf in pairs]


class _Kept(torch.autograd.Function):
    """Shows a tensor to the hooks that decide what becomes of it before anything is computed.

    So a checkpoint around several modules, which stops computing again as soon as it has all that
    was kept, stops before the last of them and not after it.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, kept: Any, parameters: tuple, x: Tensor, *rest: Tensor):
        ctx.work, ctx.kept, ctx.parameters = work, kept, parameters
        return work.forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.kept.saved_tensors
        given = [v.detach().requires_grad_() if _differentiable(v) else v for v in ctx.work.others]
        work = replace(ctx.work, others=tuple(given))
        sums = _Sums([*filter(_differentiable, given), *ctx.parameters])
        ctx.work = ctx.kept = None  # the graph may live longer than what it holds
        first = work.backward(x, gradients[0], sums)
        return None, None, None, first, *sums.totals
