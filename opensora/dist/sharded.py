"""Tensors that are sharded over ranks (torch's DTensor) and plain ones, treated alike.

torch's module of them takes a second to import, so it is not where nothing is sharded.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(value: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def whole(value: Tensor) -> Tensor:
    """The full tensor on every rank. Collective where the value is sharded."""
    return value.full_tensor() if is_sharded(value) else value


def local(value: Tensor) -> Tensor:
    """This rank's part, sharing memory."""
    return cast(Tensor, value.to_local()) if is_sharded(value) else value


def placed(value: Tensor, like: Tensor) -> Tensor:
    """A full tensor that every rank has, sharded as `like` is; nothing is sent. What is sharded
    already stays as it is."""
    if not is_sharded(like) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def room(shape: torch.Size, dtype: torch.dtype, like: Tensor | None) -> Tensor:
    """An uninitialised tensor: sharded as `like` is where it is sharded and of this shape,
    otherwise whole and on the CPU."""
    if like is not None and like.shape == shape and is_sharded(like):
        return torch.empty_like(like, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype)


def alike(values: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors by what they are sharded over, plain ones together: torch's operators on lists take
    no mixtures."""
    found: dict[Any, list[Tensor]] = defaultdict(list)
    for value in values:
        found[value.device_mesh if is_sharded(value) else None].append(value)
    return list(found.values())


def norm(values: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all of them together, on every rank. Collective where a value is sharded."""
    parts = [whole(torch.nn.utils.get_total_norm(part)) for part in alike(values)]
    return torch.linalg.vector_norm(torch.stack(parts)) if len(parts) > 1 else parts[0]
