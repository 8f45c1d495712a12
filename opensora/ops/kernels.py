"""Ways to compute attention, one function each, all with the same arguments.

Every function takes (q, k, v, mask, causal, scale), tensors (B, L, K, d) of one dtype, and returns
(B, L, K, d); `mask` is one of the patterns that `opensora.ops.backends` lets through to it. What a
kernel lacks is made of what it has: frames of a clip and packed sequences are attended to part by
part. Those that need a GPU have never been run; their arguments are tested with stand-ins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from opensora.errors import require
from opensora.ops.patterns import Frames, Packed, Pattern, visible

CHUNK = 128
"""Queries at a time where frames are smaller than that: a fused kernel's block."""


def plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Pattern, causal: bool, scale: float | None
) -> Tensor:
    """The formula (Vaswani et al. 2017, equation 1) with all logits in memory, in fp32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        logits = torch.einsum("blkd,bskd->bkls", q.to(wide), k.to(wide))
        logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
        seen = visible(mask, q.shape[1], k.shape[1], causal=causal, device=q.device)
        if seen is not None:
            logits = logits.masked_fill(~seen, -torch.inf)
        out = torch.einsum("bkls,bskd->blkd", logits.softmax(-1), v.to(wide))
    return out.to(q.dtype)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Pattern, causal: bool, scale: float | None
) -> Tensor:
    """torch's scaled_dot_product_attention, which picks its own kernel on each device."""
    if isinstance(mask, Frames):
        return _by_frames(q, k, v, mask, scale)
    if isinstance(mask, Packed):
        return _one_by_one(q, k, v, mask, causal, scale)
    return _dense(q, k, v, None if mask is None else mask[:, None, None, :], causal, scale)


def sdpa_by(
    kernels: Sequence[SDPBackend],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Pattern,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """`sdpa` by the first of these kernels that can."""
    with sdpa_kernel(list(kernels), set_priority=True):
        return sdpa(q, k, v, mask, causal, scale)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    out = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=seen,
        is_causal=causal,
        scale=scale,
    )
    return out.transpose(1, 2)


def _by_frames(q: Tensor, k: Tensor, v: Tensor, frames: Frames, scale: float | None) -> Tensor:
    """Queries frame by frame, each with the keys that it sees: nothing hidden is computed.

    Frames of fewer tokens than a kernel's block go several at a time, under a mask.
    """
    together = max(1, CHUNK // frames.size)
    size = together * frames.size
    outs = []
    for start in range(0, q.shape[1], size):
        rows = q[:, start : start + size]
        number = start // frames.size
        last = number + (rows.shape[1] - 1) // frames.size
        begin, _ = frames.span(frames.first + number, k.shape[1])
        _, end = frames.span(frames.first + last, k.shape[1])
        seen = None
        if last > number:
            # The same order, counted from the frame where these keys begin.
            shifted = Frames(
                frames.size,
                frames.before,
                frames.after,
                frames.first + number - begin // frames.size,
            )
            seen = visible(shifted, rows.shape[1], end - begin, causal=False, device=q.device)
        outs.append(_dense(rows, k[:, begin:end], v[:, begin:end], seen, False, scale))
    return torch.cat(outs, dim=1) if outs else torch.empty_like(q)


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, causal: bool, scale: float | None
) -> Tensor:
    """Sequence after sequence."""
    parts: Iterator[tuple[Tensor, ...]] = zip(
        q.split(packed.queries, dim=1),
        k.split(packed.key_lengths, dim=1),
        v.split(packed.key_lengths, dim=1),
        strict=True,
    )
    outs = [_dense(*part, None, causal, scale) if part[0].shape[1] else part[0] for part in parts]
    return torch.cat(outs, dim=1)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, mask: Pattern, causal: bool, scale: float | None
) -> Tensor:
    """torch.nn.attention.varlen: packed sequences in one launch; a batch is packed on the way.

    CUDA only, and not run so far.
    """
    from torch.nn.attention.varlen import varlen_attn

    packed = mask if isinstance(mask, Packed) else _batch(*q.shape[:2], k.shape[1])
    found = varlen_attn(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        *packed.offsets(q.device),
        max(packed.queries),
        max(packed.key_lengths),
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
    )
    assert isinstance(found, Tensor)
    return found.unflatten(0, q.shape[:2])


@lru_cache(maxsize=32)
def _batch(size: int, num_queries: int, num_keys: int) -> Packed:
    """A batch as packed sequences; remembered, so that its offsets are on the device already."""
    return Packed((num_queries,) * size, (num_keys,) * size)


def xformers(
    q: Tensor, k: Tensor, v: Tensor, mask: Pattern, causal: bool, scale: float | None
) -> Tensor:
    """xformers' memory_efficient_attention, packed sequences by its block-diagonal masks.

    CUDA only, and not run so far.
    """
    purpose = "attention=xformers"
    fmha = require("xformers.ops.fmha", extra="xformers", purpose=purpose)
    biases = require("xformers.ops.fmha.attn_bias", extra="xformers", purpose=purpose)
    bias = biases.LowerTriangularMask() if causal else None
    if isinstance(mask, Packed):
        bias = mask.kept(
            ("xformers", q.device, causal), partial(_block_diagonal, biases, mask, causal, q.device)
        )
    return fmha.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)


def _block_diagonal(biases: Any, packed: Packed, causal: bool, device: torch.device) -> Any:
    keys = None if packed.keys is None else list(packed.keys)
    bias = biases.BlockDiagonalMask.from_seqlens(list(packed.queries), keys, device=device)
    return bias.make_causal() if causal else bias


def flex(
    q: Tensor, k: Tensor, v: Tensor, mask: Pattern, causal: bool, scale: float | None
) -> Tensor:
    """torch's flex_attention, compiled, which skips blocks of keys that nobody sees.

    On CPUs torch has no backward pass for it. On CUDA it has not been run so far.
    """
    assert isinstance(mask, Frames), "other patterns are refused by the backend's table"
    blocks = frame_blocks(mask, q.shape[1], k.shape[1], q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _compiled_flex()(q, k, v, block_mask=blocks, scale=scale).transpose(1, 2)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=32)
def frame_blocks(
    frames: Frames, num_queries: int, num_keys: int, device: torch.device, block: int = CHUNK
) -> Any:
    """flex_attention's BlockMask of an order of frames, from the ends of blocks alone.

    torch's create_block_mask would write out all L x S booleans, 84 GB at 300K tokens. What a block
    of queries sees of the keys lies between two ends: up to the widest ones some query of it sees,
    within the narrowest ones every query does.

    Returns:
        BlockMask of (1, 1, L, S).
    """
    from torch.nn.attention.flex_attention import BlockMask

    starts = range(0, num_queries, block)
    columns = torch.arange(-(-num_keys // block), device=device)
    stops = (min(start + block, num_queries) for start in starts)
    pairs = zip(starts, stops, strict=True)
    ends = torch.tensor([_block_ends(frames, *pair, num_keys) for pair in pairs], device=device)
    begin, end, begin_full, end_full = ends[:, :, None].unbind(1)  # rows 1 each
    first, last = columns * block, ((columns + 1) * block).clamp(max=num_keys)
    some = (last > begin) & (first < end)  # rows columns
    # A last block with fewer keys or queries than it could hold has to be masked.
    whole = (columns + 1) * block <= num_keys
    every = (first >= begin_full) & (last <= end_full) & whole
    if num_queries % block:
        every[-1] = False
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every),
        *_listed(every),
        BLOCK_SIZE=block,
        mask_mod=_mask_mod(frames),
        seq_lengths=(num_queries, num_keys),
    )


def _block_ends(frames: Frames, start: int, stop: int, num_keys: int) -> tuple[int, int, int, int]:
    """Of queries [start, stop): ends of the keys that some of them see, and that all do."""
    earliest = frames.span(frames.first + start // frames.size, num_keys)
    latest = frames.span(frames.first + (stop - 1) // frames.size, num_keys)
    return earliest[0], latest[1], latest[0], earliest[1]


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Booleans (rows, columns) as numbers of blocks (1, 1, rows) and their places in front."""
    order = torch.argsort(blocks.int(), dim=1, descending=True, stable=True)
    return blocks.sum(1).int()[None, None], order.int()[None, None]


def _mask_mod(frames: Frames) -> Any:
    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ahead = key // frames.size - (query // frames.size + frames.first)
        found = ahead == ahead
        if frames.before is not None:
            found = found & (ahead >= -frames.before)
        if frames.after is not None:
            found = found & (ahead <= frames.after)
        return found

    return seen
