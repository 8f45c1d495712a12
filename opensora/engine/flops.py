"""Counting FLOPs: those of matrix products, convolutions and attention, by torch's formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from opensora.dist.sharded import local


def _attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(gradient.shape, q.shape, k.shape, v.shape)


_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""What torch's table lacks. As in its other entries, attention's backward pass is five products:
the logits are made again."""


def _xformers_forward(*args: Any, out_val: Any = None) -> int:
    """xformers' arguments: q, k, v, ends of q and k, keys in use, longest q and k, ..."""
    if args[3] is None:
        return sdpa_flop_count(*(x.transpose(1, 2).shape for x in args[:3]))
    packed = flop_registry[torch.ops.aten._flash_attention_forward]
    return packed(*args[:5], *args[6:8], out_val=out_val)


def _xformers_backward(*args: Any, out_val: Any = None) -> int:
    """The gradient, q, k, v, out, lse, ends of q and k, longest q and k, ... from the second on."""
    if args[7] is None:
        return sdpa_backward_flop_count(*(x.transpose(1, 2).shape for x in args[1:5]))
    packed = flop_registry[torch.ops.aten._flash_attention_backward]
    return packed(*args[1:11], out_val=out_val)


_BY_NAME = {
    "xformers_flash.flash_fwd": _xformers_forward,
    "xformers_flash.flash_bwd": _xformers_backward,
}
"""Operators that are there once their package is imported (xformers 0.0.35)."""


_repeats = ContextVar("repeats", default=False)


@contextmanager
def repeated() -> Iterator[None]:
    """Inside it forward work is done once more, because its results were not kept."""
    before = _repeats.set(True)
    try:
        yield
    finally:
        _repeats.reset(before)


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of what runs inside it and changes nothing.

    torch's own FlopCounterMode takes operators apart, which rounds some of them differently: a
    resumed run, which counts again, would no longer be the uninterrupted one.

    Attributes:
        total: FLOPs so far.
        again: those among them of work `repeated` for the backward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.again = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        packet = function.overloadpacket
        formula = flop_registry.get(packet) or _ON_CPU.get(packet) or _BY_NAME.get(str(packet))
        if formula is not None:
            shapes = tree_map(local, (args, kwargs))  # of a shared matrix, this rank's part
            flops = formula(*shapes[0], **shapes[1], out_val=result)
            self.total += flops
            self.again += flops * _repeats.get()
        return result


@contextmanager
def rehearsal(device: torch.device) -> Iterator[tuple[FlopCounter, Callable[[Tensor], Tensor]]]:
    """Inside it tensors have shapes but no data, so that any work is counted at no cost.

    Gives the counter, and a function that makes a stand-in of a real tensor. What is computed has
    to be built inside, since real parameters are not accepted.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    no_data, counter = FakeTensorMode(), FlopCounter()
    with torch.random.fork_rng(devices=[]), no_data, torch.device(device), counter:
        yield counter, no_data.from_tensor
