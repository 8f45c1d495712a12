"""One attention for the whole project.

`attend(q, k, v)` with tensors (B, L, K, d); models call nothing else. The implementation behind it
is torch's scaled_dot_product_attention, which picks its own kernel on each device.
"""

from __future__ import annotations

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
