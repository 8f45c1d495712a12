"""Ring attention: keys and values travel around the ranks, queries stay.

Each rank holds one contiguous part of a sequence and never more than two parts' keys and values,
so memory is O(N / P) (Liu et al. 2023, arXiv 2310.01889). Partial results are merged by their
log-sum-exp, and the backward pass sends keys and values around once more, with their gradients.
How a block is attended to comes in as a callable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from opensora.dist.groups import Group

Pair = tuple[Tensor, Tensor]


class BlockAttention(Protocol):
    """Attention of some queries to some keys, with what merging needs.

    Tensors are (B, L, K, d); lse is float (B, L, K), the log of the sum of exponents of a query's
    logits. With a mask (B, S) only keys where it is True are seen, one of a row at least.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        scale: float,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output and its lse."""
        ...

    def backward(
        self,
        gradient: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, where `out` and `lse` are those over *all* keys."""
        ...


@dataclass(frozen=True)
class Prefix:
    """Keys and values (B, S, K, d) that every rank has and that do not travel, such as the text of
    joint attention, and which of them are seen, bool (B, S); all where `mask` is None."""

    k: Tensor
    v: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Ring:
    """One ring and how it attends.

    Attributes:
        group: its ranks; None for one rank.
        lengths: tokens of each rank's part; parts may differ and be empty.
        block: attends to one part.
        causal: a token sees those before it and itself, over the whole sequence.
        scale: factor on the logits.
    """

    group: Group | None
    lengths: tuple[int, ...]
    block: BlockAttention
    causal: bool
    scale: float

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank

    def parts(self, *travelling: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """(owner, its tensors) for every part, this rank's own first.

        The next part is under way while this one is worked on.
        """
        size = len(self.lengths)
        here = list(travelling)
        for step in range(size):
            owner = (self.rank - step) % size
            wait = None
            if self.group is not None and step + 1 < size:
                wait = self.group.shift(here, _shapes(here, self.lengths[(owner - 1) % size]))
            yield owner, here
            if wait is not None:
                here = wait()

    def sees(self, owner: int) -> bool:
        """Whether this rank's queries look at a part at all."""
        return self.lengths[owner] > 0 and not (self.causal and owner > self.rank)


def ring_attend(
    q: Tensor, k: Tensor, v: Tensor, ring: Ring, *, prefix: Prefix | None = None
) -> Tensor:
    """Attention over the whole sequence.

    Args:
        q: float (B, Lq, K, d) this rank's queries; more than its part where a prefix asks as well.
        k, v: float (B, L, K, d) this rank's part.
        prefix: what comes first on every rank.

    Returns:
        float (B, Lq, K, d) in q's dtype.
    """
    empty = k.new_empty(k.shape[0], 0, *k.shape[2:])
    prefix = Prefix(empty, empty) if prefix is None else prefix
    return _RingAttention.apply(q, k, v, prefix.k, prefix.v, prefix.mask, ring)


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> Pair:
    """Two partial results over disjoint keys as one: (B, L, K, d) and (B, L, K), float32 or wider.

    A part that saw nothing has an lse of -inf.
    """
    total = torch.logaddexp(lse, more_lse)
    weight, more_weight = ((part - total).exp().unsqueeze(-1) for part in (lse, more_lse))
    return out * weight + more * more_weight, total


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        first: Tensor,
        second: Tensor,
        mask: Tensor | None,
        ring: Ring,
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros_like(q, dtype=wide)
        lse = torch.full(q.shape[:-1], -torch.inf, dtype=wide, device=q.device)
        parts = (
            (ring.sees(o), *kv, {"causal": ring.causal and o == ring.rank})
            for o, kv in ring.parts(k, v)
        )
        prefix = (first.shape[1], first, second, {"causal": False, "mask": mask})
        options: dict[str, Any]
        for seen, keys, values, options in chain([prefix], parts):
            if seen and q.numel():
                more, more_lse = ring.block.forward(q, keys, values, scale=ring.scale, **options)
                out, lse = merge(out, lse, more.to(wide), more_lse.to(wide))
        out = out.to(q.dtype)
        ctx.ring = ring
        ctx.save_for_backward(q, k, v, first, second, mask, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v, first, second, mask, out, lse = ctx.saved_tensors
        ring: Ring = ctx.ring
        gradient, wide = gradients[0], lse.dtype
        dq = torch.zeros_like(q, dtype=wide)
        dfirst, dsecond = torch.zeros_like(first), torch.zeros_like(second)
        rest = (q, out, lse)
        if first.shape[1] and q.numel():
            dq_, dfirst, dsecond = _block_backward(
                ring, gradient, rest, first, second, causal=False, mask=mask
            )
            dq += dq_
        # The gradients of a part follow it: each rank adds its own and passes them on.
        travelled: list[Tensor] = []
        for owner, (keys, values) in ring.parts(k, v):
            if travelled:
                travelled = _pass_on(ring, travelled, owner)
            else:
                travelled = [torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)]
            if ring.sees(owner) and q.numel():
                causal = ring.causal and owner == ring.rank
                dq_, dk, dv = _block_backward(ring, gradient, rest, keys, values, causal=causal)
                dq += dq_
                travelled[0] += dk
                travelled[1] += dv
        dk, dv = _pass_on(ring, travelled, ring.rank)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dfirst, dsecond, None, None


def _block_backward(
    ring: Ring,
    gradient: Tensor,
    rest: tuple[Tensor, Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    q, out, lse = rest
    return ring.block.backward(gradient, q, keys, values, out, lse, scale=ring.scale, **options)


def _pass_on(ring: Ring, tensors: list[Tensor], owner: int) -> list[Tensor]:
    """Gradients go to the next rank; what comes belongs to the part of `owner`."""
    if ring.group is None:
        return tensors
    return ring.group.shift(tensors, _shapes(tensors, ring.lengths[owner]))()


def _shapes(tensors: Sequence[Tensor], length: int) -> list[tuple[int, ...]]:
    return [(t.shape[0], length, *t.shape[2:]) for t in tensors]
