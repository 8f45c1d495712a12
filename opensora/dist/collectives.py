"""Differentiable movements of a sharded tensor, and how a length is shared.

Gradients follow one convention: the loss is the *sum* of what the ranks compute, and every rank's
gradient of a parameter is its share of that sum. The engine adds the shares up. Without a group,
or with a group of one, nothing moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opensora.dist.groups import Group


def shares(length: int, size: int) -> list[int]:
    """How many of `length` units each of `size` ranks holds: as even as can be, the first more."""
    whole, rest = divmod(length, size)
    return [whole + (rank < rest) for rank in range(size)]


def share(length: int, rank: int, size: int) -> slice:
    """The units of one rank."""
    sizes = shares(length, size)
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


def exchange(
    x: Tensor,
    group: Group | None,
    *,
    split: int,
    join: int,
    split_sizes: Sequence[int],
    join_sizes: Sequence[int],
) -> Tensor:
    """Shard another dim: whole along `split` and sharded along `join` before, vice versa after.

    One all-to-all. Its gradient is the exchange back.

    Args:
        split: the dim of x that is cut, of length sum(split_sizes).
        join: the dim of x that is sharded, of which this rank holds join_sizes[rank].
        split_sizes: what each rank has of `split` afterwards.
        join_sizes: what each rank has of `join` before.
    """
    if group is None or group.size == 1:
        return x
    return _Exchange.apply(x, group, split, join, tuple(split_sizes), tuple(join_sizes))


def gather(x: Tensor, group: Group | None, *, dim: int, sizes: Sequence[int]) -> Tensor:
    """The whole of a tensor that is sharded along `dim`, on every rank.

    The gradient of a part is the sum of what all ranks made of it.
    """
    if group is None or group.size == 1:
        return x
    return _Gather.apply(x, group, dim, tuple(sizes))


def _exchanged(
    x: Tensor, group: Group, split: int, join: int, split_sizes: Sequence, join_sizes: Sequence
) -> Tensor:
    shapes = []
    for size in join_sizes:
        shape = list(x.shape)
        shape[split], shape[join] = split_sizes[group.rank], size
        shapes.append(shape)
    received = group.all_to_all(x.split(list(split_sizes), dim=split), shapes)
    return torch.cat(received, dim=join)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, *layout: Any) -> Tensor:
        ctx.group, ctx.layout = group, layout
        return _exchanged(x, group, *layout)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        split, join, split_sizes, join_sizes = ctx.layout
        back = _exchanged(gradients[0], ctx.group, join, split, join_sizes, split_sizes)
        return back, None, None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, sizes: Sequence[int]) -> Tensor:
        ctx.group, ctx.dim, ctx.sizes = group, dim, sizes
        shapes = [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in sizes]
        return torch.cat(group.all_gather(x, shapes), dim=dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        parts = gradients[0].split(list(ctx.sizes), dim=ctx.dim)
        shape = parts[ctx.group.rank].shape
        received = ctx.group.all_to_all(parts, [shape] * ctx.group.size)
        return torch.stack(received).sum(0), None, None, None
