"""What a step would take, found out without data and without a device.

A rehearsal runs the real code on tensors that have shapes only: recompute, tiles, sequence
parallelism and the optimizer are what they are in the run. Memory is that of tensors alive at the
same time; what allocators and libraries take on top is not seen here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from opensora.dist.groups import Shape, Wait
from opensora.dist.mesh import Layout
from opensora.dist.ulysses import SequenceGroups
from opensora.engine.flops import rehearsal


class LiveMemory(TorchDispatchMode):
    """Bytes of tensors alive at the same time that operators inside it made.

    Attributes:
        live: bytes now.
        peak: the most there were since the last `reset`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def reset(self) -> None:
        """Begin to look for the peak anew."""
        self.peak = self.live

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class Imagined:
    """A group of ranks that are not there: what they send has its shape and nothing else.

    This rank is the first, whose share is the largest.
    """

    rank = 0

    def __init__(self, size: int):
        self.size = size

    def all_to_all(self, pieces: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        return [pieces[0].new_empty(tuple(shape)) for shape in shapes]

    def all_gather(self, piece: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return [piece.new_empty(tuple(shape)) for shape in shapes]

    def shift(self, tensors: Sequence[Tensor], shapes: Sequence[Shape]) -> Wait:
        received = [t.new_empty(tuple(shape)) for t, shape in zip(tensors, shapes, strict=True)]
        return lambda: received


class ImaginedMesh:
    """Stands for `dist.mesh.Mesh` in a rehearsal."""

    def __init__(self, layout: Layout):
        self.layout = layout

    def sequence(self, degree: int) -> SequenceGroups:
        size = min(degree, self.layout.ulysses)
        sizes = (size, degree // size, degree)
        return SequenceGroups(*(Imagined(n) if n > 1 else None for n in sizes))


@dataclass(frozen=True)
class Footprint:
    """What a step of one rank takes.

    Attributes:
        parameters: of the module, trained.
        flops: executed, recomputation included.
        activations: peak bytes of forward and backward beside the parameters; with full gradients
            where they are kept.
        update: peak bytes of the optimizer's step beside the parameters: gradients, state and what
            it takes in between.
        state: bytes of the optimizer's state.
    """

    parameters: int
    flops: int
    activations: int
    update: int
    state: int


def rehearse(
    make: Callable[[], tuple[nn.Module, Callable[[], Tensor]]],
    build: Callable[[nn.Module], list[torch.optim.Optimizer]],
    *,
    precision: torch.dtype,
    keeps_gradients: bool,
) -> Footprint:
    """The footprint of a step.

    Args:
        make: builds the module and a call that gives the loss of a micro-batch.
        build: builds its optimizers.
        keeps_gradients: whether full gradients stay until the step; an engine that shards lets
            each go as soon as it is there.
    """
    device = torch.device("cpu")
    memory = LiveMemory()
    with rehearsal(device) as (counter, _), memory:
        module, call = make()
        trained = [p for p in module.parameters() if p.requires_grad]
        before = memory.live
        if not keeps_gradients:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(_let_go)
        memory.reset()
        with torch.autocast("cpu", precision, precision != torch.float32):
            loss = call()
        loss.backward()
        activations, flops = memory.peak - before, counter.total
        del loss
        update, state = _update(module, build, memory, before) if keeps_gradients else (0, 0)
    return Footprint(sum(p.numel() for p in trained), flops, activations, update, state)


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


def _update(
    module: nn.Module,
    build: Callable[[nn.Module], list[torch.optim.Optimizer]],
    memory: LiveMemory,
    before: int,
) -> tuple[int, int]:
    optimizers = build(module)
    memory.reset()
    for optimizer in optimizers:
        optimizer.step()
    state = sum(
        value.nbytes
        for optimizer in optimizers
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, Tensor)
    )
    return memory.peak - before, state
