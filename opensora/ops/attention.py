"""One attention for the whole project.

`attend(q, k, v)` with tensors (B, L, K, d); models call nothing else. The implementation behind it
is torch's scaled_dot_product_attention, which picks its own kernel on each device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention over the second dim.

    Args:
        q: float (B, L, K, d).
        k: float (B, S, K, d).
        v: float (B, S, K, d).
        mask: bool (B, S), True where a key may be seen; every row needs at least one.
        causal: query i sees keys 0..i only (L == S).
        scale: factor on the logits; 1 / sqrt(d) by default.

    Returns:
        float (B, L, K, d) in q's dtype.
    """
    if causal and mask is not None:
        raise ValueError("a key mask and causal order cannot be combined; fold both into a mask")
    attention_mask = None if mask is None else mask[:, None, None, :]
    out = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=attention_mask,
        is_causal=causal,
        scale=scale,
    )
    return out.transpose(1, 2)


class FlashBlock:
    """Attention to a part of the keys by torch's fused kernels, with the lse that merging needs.

    CPUs and CUDA; the kernels' own backward takes the merged output and lse as they are. Shapes as
    in `opensora.dist.ring.BlockAttention`. CUDA has never been run.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
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
    ) -> tuple[Tensor, Tensor, Tensor]:
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


class PlainBlock:
    """The same in plain arithmetic: any device and dtype, memory of all logits; the reference."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        logits = self._logits(q, k, causal, scale)
        lse = logits.logsumexp(-1)  # B K L
        weights = (logits - lse.unsqueeze(-1)).exp()
        return torch.einsum("bkls,bskd->blkd", weights, v.to(weights.dtype)).to(
            q.dtype
        ), lse.transpose(1, 2)

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = self._logits(q, k, causal, scale)
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

    def _logits(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = torch.einsum("blkd,bskd->bkls", q.to(wide), k.to(wide)) * scale
        if causal:
            seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
            logits = logits.masked_fill(~seen, -torch.inf)
        return logits
