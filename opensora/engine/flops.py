"""Counting FLOPs: those of matrix products, convolutions and attention, by torch's formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)


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


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of what runs inside it and changes nothing.

    torch's own FlopCounterMode takes operators apart, which rounds some of them differently: a
    resumed run, which counts again, would no longer be the uninterrupted one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        packet = function.overloadpacket
        formula = flop_registry.get(packet) or _ON_CPU.get(packet)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
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
