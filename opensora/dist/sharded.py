"""Tensors that are sharded over ranks (torch's DTensor) and plain ones, treated alike."""

from __future__ import annotations

from typing import cast

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value: Tensor) -> Tensor:
    """The full tensor on every rank. Collective where the value is sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """This rank's part, sharing memory."""
    return cast(Tensor, value.to_local()) if isinstance(value, DTensor) else value


def placed(value: Tensor, like: Tensor) -> Tensor:
    """A full tensor that every rank has, sharded as `like` is; nothing is sent."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
