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
from opensora.engine import host
from opensora.engine.flops import rehearsal

_DEVICE = torch.ops.prim.device.default


class LiveMemory(TorchDispatchMode):
    """Bytes of tensors alive at the same time that operators inside it made.

    Attributes:
        live: bytes now.
        peak: the most there were since the last `reset`.
        host, host_peak: the same of what was put on the host (`opensora.engine.host`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.host = self.host_peak = 0
        self._known: set[int] = set()

    def reset(self) -> None:
        """Begin to look for the peak anew."""
        self.peak, self.host_peak = self.live, self.host

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # a wrapper that takes longer than what is in it; nothing here is compiled

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is _DEVICE:  # two of three calls
            return args[0].fake_device
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        on_host = host.allocating()
        self._known.add(key)
        self._count(storage.nbytes(), on_host)
        weakref.finalize(storage, self._forget, key, storage.nbytes(), on_host)

    def _count(self, size: int, on_host: bool) -> None:
        if on_host:
            self.host += size
            self.host_peak = max(self.host_peak, self.host)
        else:
            self.live += size
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int, on_host: bool) -> None:
        self._known.discard(key)
        self._count(-size, on_host)


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
        again: of them, those of recomputation.
        forward, backward: peak bytes of either pass beside the parameters; with full gradients
            where they are kept.
        update: peak bytes of the optimizer's step beside the parameters: gradients, state and what
            it takes in between; 0 where gradients are sharded.
        state: bytes of the optimizer's state on the device, whole.
        host: peak bytes that forward and backward keep on the host.
        host_state: bytes of the optimizer's state there, whole.
    """

    parameters: int
    flops: int
    forward: int
    backward: int
    update: int
    state: int
    host: int = 0
    host_state: int = 0
    again: int = 0

    @property
    def activations(self) -> int:
        """Peak bytes of forward and backward."""
        return max(self.forward, self.backward)


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
        # Where parameters are sharded, their casts are not kept (see `FsdpEngine.autocast`).
        with torch.autocast(
            "cpu", precision, precision != torch.float32, cache_enabled=keeps_gradients
        ):
            loss = call()
        forward = memory.peak - before
        memory.reset()
        loss.backward()
        backward, host_peak = memory.peak - before, memory.host_peak
        flops, again = counter.total, counter.again
        del loss
        for parameter in trained:  # what was let go, and what lies before the rehearsed call
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
        update, state, host_state = _update(module, build, memory, before)
    update = update if keeps_gradients else 0
    parameters = sum(p.numel() for p in trained)
    return Footprint(
        parameters, flops, forward, backward, update, state, host_peak, host_state, again
    )


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


def _update(
    module: nn.Module,
    build: Callable[[nn.Module], list[torch.optim.Optimizer]],
    memory: LiveMemory,
    before: int,
) -> tuple[int, int, int]:
    optimizers = build(module)
    memory.reset()
    live, on_host = memory.live, memory.host
    for optimizer in optimizers:
        optimizer.step()
    return memory.peak - before, memory.live - live, memory.host - on_host
