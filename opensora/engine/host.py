"""Tensors that wait in the host's memory while a device has none to spare.

A rehearsal (`opensora.engine.footprint`) runs on a device that is not there and cannot tell host
from device by where a tensor is; `allocating` tells it.
"""

from __future__ import annotations

from contextvars import ContextVar

import torch
from torch import Tensor

_allocating = ContextVar("allocating", default=False)


def allocating() -> bool:
    """Whether what is allocated now is the host's."""
    return _allocating.get()


def to_host(value: Tensor) -> Tensor:
    """A copy in host memory, pinned where the value is on a GPU; on a CPU simply a copy."""
    token = _allocating.set(True)
    try:
        waiting = torch.empty(
            value.shape, dtype=value.dtype, device="cpu", pin_memory=value.device.type == "cuda"
        )
    finally:
        _allocating.reset(token)
    return waiting.copy_(value)


def keep_on_host() -> torch.autograd.graph.saved_tensors_hooks:
    """A context whose graph keeps on the host what it needs for the backward pass."""
    return torch.autograd.graph.saved_tensors_hooks(
        lambda value: (value.device, to_host(value)), lambda kept: kept[1].to(kept[0], copy=True)
    )
