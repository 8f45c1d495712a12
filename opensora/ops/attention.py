"""One attention for the whole project.

`attend(q, k, v)` with tensors (B, L, K, d); models call nothing else. Which backend serves a call
is decided by `opensora.ops.backends`. The blocks below are attention to a part of the keys, for
ranks that share a sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from opensora.ops.backends import BACKENDS, Request, machine, preferred, serving
from opensora.ops.patterns import Frames, Packed, Pattern, kind_of


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Pattern = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention over the second dim.

    Args:
        q: float (B, L, K, d).
        k: float (B, S, K, d).
        v: float (B, S, K, d).
        mask: which keys a query sees. bool (B, S): those where it is True, of which every row needs
            one. `Frames`: those of frames near its own. `Packed`: those of its own sequence, of
            several that lie one after the other in a batch of one. None: all.
        causal: query i sees keys 0..i only (L == S); of packed sequences each.
        scale: factor on the logits; 1 / sqrt(d) by default.

    Returns:
        float (B, L, K, d) in q's dtype, under autocast in that of autocast.

    Raises:
        ValueError: mask and causal cannot be combined, or do not fit the tensors.
    """
    kind = kind_of(mask)
    if causal or kind in ("frames", "packed"):
        _check(q, k, mask, causal)
    device, dtype = q.device, q.dtype
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    if on and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    name = serving(device, dtype, q.shape[-1], kind, causal, preferred())
    return BACKENDS[name].attend(q, k, v, mask, causal, scale)


def _check(q: Tensor, k: Tensor, mask: Pattern, causal: bool) -> None:
    if isinstance(mask, Packed):
        mask.check(q, k)
        if causal and mask.queries != mask.key_lengths:
            raise ValueError(
                f"causal order needs as many keys as queries in each sequence, found {mask}"
            )
    elif causal and mask is not None:
        raise ValueError("a mask of keys or frames cannot be combined with causal order")
    elif isinstance(mask, Frames):
        mask.check(q.shape[1], k.shape[1])
    elif q.shape[1] != k.shape[1]:
        raise ValueError(
            f"causal order needs as many keys as queries, found {k.shape[1]} and {q.shape[1]}; "
            "where the queries are the last ones, use Frames(1, first=...)"
        )


HIDING, HIDDEN = 8, -1e4
"""Features that hide keys, and their value: together they take 8e4 scale off a hidden key's logit,
so that its weight is an exact zero; any dtype has the value, and any kernel the width."""


def _hide(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A mask of keys (B, S) as features of queries and keys, for kernels that know no masks."""
    asks = q.new_ones(*q.shape[:-1], HIDING)
    hides = k.new_full((), HIDDEN) * ~mask[:, :, None, None]
    hides = hides.to(k.dtype).expand(*k.shape[:-1], HIDING)
    return torch.cat([q, asks], -1), torch.cat([k, hides], -1), _widen(v)


def _widen(x: Tensor) -> Tensor:
    return functional.pad(x, (0, HIDING))


class FlashBlock:
    """Attention to a part of the keys by torch's fused kernels, with the lse that merging needs.

    CPUs and CUDA; the kernels' own backward takes the merged output and lse as they are. Shapes as
    in `opensora.dist.ring.BlockAttention`. CUDA has never been run.
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
        if mask is not None:
            out, lse = self.forward(*_hide(q, k, v, mask), causal=causal, scale=scale)
            return out[..., : q.shape[-1]], lse
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        aten = torch.ops.aten
        if q.device.type == "cuda":
            out, lse, *_ = aten._scaled_dot_product_flash_attention(
                q, k, v, 0.0, causal, False, scale=scale
            )
        else:
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, causal, attn_mask=None, scale=scale
            )
        return out.transpose(1, 2), lse.transpose(1, 2)

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
        if mask is not None:
            hidden = (_widen(gradient), *_hide(q, k, v, mask), _widen(out), lse)
            found = self.backward(*hidden, causal=causal, scale=scale)
            dq, dk, dv = (x[..., : q.shape[-1]] for x in found)
            return dq, dk, dv
        gradient, q, k, v, out = (x.transpose(1, 2) for x in (gradient, q, k, v, out))
        lse = lse.transpose(1, 2)
        aten = torch.ops.aten
        if q.device.type == "cuda":
            lengths = (None, None, q.shape[2], k.shape[2])
            seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
            found = aten._scaled_dot_product_flash_attention_backward(
                gradient, q, k, v, out, lse.contiguous(), *lengths, 0.0, causal,
                seed, seed.new_empty(()), scale=scale,
            )  # fmt: skip
        else:
            found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient, q, k, v, out, lse, 0.0, causal, attn_mask=None, scale=scale
            )
        return tuple(x.transpose(1, 2) for x in found)


def block_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> FlashBlock | PlainBlock:
    """What attends to a part of the keys: torch's fused kernels where they can, else arithmetic.

    FlashAttention 3 and 4 stand behind the same operator where the config names them.
    """
    request = Request(dtype, head_dim)
    flash = BACKENDS["flash2"]
    fused = device.type == "cpu" or not (flash.lacking(machine(device)) or flash.refuses(request))
    return FlashBlock() if fused and preferred() != "plain" else PlainBlock()


class ChosenBlock:
    """`block_for` whatever comes, which under autocast nobody knows before."""

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
        return self._of(q).forward(q, k, v, causal=causal, scale=scale, mask=mask)

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
        options: dict[str, Any] = {"causal": causal, "scale": scale, "mask": mask}
        return self._of(q).backward(gradient, q, k, v, out, lse, **options)

    def _of(self, q: Tensor) -> FlashBlock | PlainBlock:
        return block_for(q.device, q.dtype, q.shape[-1])


class PlainBlock:
    """The same in plain arithmetic: any device and dtype, memory of all logits; the reference."""

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
        with torch.autocast(q.device.type, enabled=False):
            logits = self._logits(q, k, causal, scale, mask)
            lse = logits.logsumexp(-1)  # B K L
            weights = (logits - lse.unsqueeze(-1)).exp()
            out = torch.einsum("bkls,bskd->blkd", weights, v.to(weights.dtype))
        return out.to(q.dtype), lse.transpose(1, 2)

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
        logits = self._logits(q, k, causal, scale, mask)
        wide = logits.dtype
        weights = (logits - lse.transpose(1, 2).unsqueeze(-1)).exp()  # B K L S
        gradient, out = gradient.to(wide), out.to(wide)
        dv = torch.einsum("bkls,blkd->bskd", weights, gradient)
        dweights = torch.einsum("blkd,bskd->bkls", gradient, v.to(wide))
        # Dao et al. 2022, equation 4: the row sums come from the output.
        rows = (gradient * out).sum(-1).transpose(1, 2).unsqueeze(-1)  # B K L 1
        dlogits = weights * (dweights - rows) * scale
        dq = torch.einsum("bkls,bskd->blkd", dlogits, k.to(wide))
        dk = torch.einsum("bkls,blkd->bskd", dlogits, q.to(wide))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def _logits(
        self, q: Tensor, k: Tensor, causal: bool, scale: float, mask: Tensor | None
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = torch.einsum("blkd,bskd->bkls", q.to(wide), k.to(wide)) * scale
        if causal:
            seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
            logits = logits.masked_fill(~seen, -torch.inf)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None, :], -torch.inf)
        return logits
