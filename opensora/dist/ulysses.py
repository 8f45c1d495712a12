"""Ulysses and USP: the ranks trade parts of the sequence for heads, and attend to whole sequences.

Queries, keys and values go in one all-to-all and the result comes back in another (Jacobs et al.
2023, arXiv 2309.14509). With a ring across, each group of Ulysses ranks gathers a part of the
sequence and the ring attends over the parts (USP, Fang & Zhao 2024, arXiv 2405.07719). Neither the
number of heads nor the length has to divide by the ranks: shares differ by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opensora.dist.collectives import exchange, gather, share, shares
from opensora.dist.groups import Group
from opensora.dist.ring import BlockAttention, Prefix, Ring, ring_attend

Text = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class SequenceGroups:
    """The ranks that share a sequence: ring-major, so rank = ring rank * ulysses size + rank in it.

    Attributes:
        ulysses: ranks that trade heads, or None.
        ring: ranks that pass keys and values around, or None.
        flat: all of them as one group, or None.
    """

    ulysses: Group | None = None
    ring: Group | None = None
    flat: Group | None = None

    @property
    def size(self) -> int:
        return self.ulysses_size * self.ring_size

    @property
    def rank(self) -> int:
        return self.ring_rank * self.ulysses_size + self.ulysses_rank

    @property
    def ulysses_size(self) -> int:
        return 1 if self.ulysses is None else self.ulysses.size

    @property
    def ulysses_rank(self) -> int:
        return 0 if self.ulysses is None else self.ulysses.rank

    @property
    def ring_size(self) -> int:
        return 1 if self.ring is None else self.ring.size

    @property
    def ring_rank(self) -> int:
        return 0 if self.ring is None else self.ring.rank


def attend_sharded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: SequenceGroups,
    block: BlockAttention,
    *,
    lengths: tuple[int, ...],
    text: Text | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    whole: Callable[..., Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a sequence, of which this rank holds a contiguous part, to the whole of it.

    Args:
        q, k, v: float (B, L, K, d), this rank's part; position codes are applied already.
        block: attends to one part; its `forward` and `backward` are all that runs on the device.
        lengths: tokens of every rank's part, of groups.size ranks.
        text: q, k and v (B, S, K, d) of tokens that every rank has, for joint attention; they come
            first, see everything and are seen by everything.
        mask: bool (B, S), which tokens of the text are seen; all where it is None.
        causal: over the whole sequence; not with text.
        scale: factor on the logits; 1 / sqrt(d) by default.
        whole: attends to whole sequences, as `opensora.ops.attention.attend`; serves instead of
            `block` where no ring is across.

    Returns:
        float (B, L, K, d); with text also its output (B, S, K, d), the same on every rank.
    """
    if causal and text is not None:
        raise ValueError("joint attention with text has no causal order")
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    heads = shares(q.shape[2], groups.ulysses_size)
    mine = share(q.shape[2], groups.ulysses_rank, groups.ulysses_size)
    start = groups.ring_rank * groups.ulysses_size
    parts = lengths[start : start + groups.ulysses_size]
    packed = torch.stack([q, k, v])  # 3 B L K d
    packed = exchange(
        packed, groups.ulysses, split=3, join=2, split_sizes=heads, join_sizes=parts
    )
    q, k, v = packed.unbind(0)  # B L' K' d, with all tokens of the Ulysses ranks and some heads
    rings = [
        sum(lengths[i : i + groups.ulysses_size])
        for i in range(0, len(lengths), groups.ulysses_size)
    ]
    ring = Ring(groups.ring, tuple(rings), block, causal, factor)
    num_text = 0
    prefix = None
    if text is not None:
        num_text = text[0].shape[1]
        text_q, text_k, text_v = (t[:, :, mine] for t in text)  # B S K' d
        q, prefix = torch.cat([text_q, q], dim=1), Prefix(text_k, text_v, mask)
    if whole is not None and groups.ring_size == 1 and q.numel():
        out = _attend_whole(whole, q, k, v, prefix, causal=causal, scale=factor)
    else:
        out = ring_attend(q, k, v, ring, prefix=prefix)
    video = exchange(
        out[:, num_text:], groups.ulysses, split=1, join=2, split_sizes=parts, join_sizes=heads
    )  # B L K d
    if text is None:
        return video
    return video, gather(out[:, :num_text], groups.ulysses, dim=2, sizes=heads)


def _attend_whole(
    attend: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: Prefix | None,
    **options: Any,
) -> Tensor:
    """Attention of this rank's heads, with what comes first."""
    if prefix is None:
        return attend(q, k, v, **options)
    mask = prefix.mask
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(len(k), k.shape[1])], dim=1)
    k, v = torch.cat([prefix.k, k], dim=1), torch.cat([prefix.v, v], dim=1)
    return attend(q, k, v, mask=mask, **options)
