"""Attention as the formula says, and what the tests of attention compare by."""

import torch

from opensora.ops.patterns import visible


def naive(q, k, v, *, mask=None, causal=False, scale=None):
    """Vaswani et al. 2017, equation 1, head by head."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for head in range(q.shape[2]):
            logits = q[b, :, head] @ k[b, :, head].T * scale
            if mask is not None:
                logits = logits.masked_fill(~mask[b], float("-inf"))
            if causal:
                future = torch.ones_like(logits, dtype=torch.bool).triu(1)
                logits = logits.masked_fill(future, float("-inf"))
            out[b, :, head] = logits.softmax(dim=-1) @ v[b, :, head]
    return out


def reference(q, k, v, *, mask=None, causal=False, seen=None):
    """The same with a pattern, or with booleans (L, S), in the dtype of the tensors."""
    if seen is None:
        seen = visible(mask, q.shape[1], k.shape[1], causal=causal, device=q.device)
    logits = torch.einsum("blkd,bskd->bkls", q, k) * q.shape[-1] ** -0.5
    if seen is not None:
        logits = logits.masked_fill(~seen, float("-inf"))
    return torch.einsum("bkls,bskd->blkd", logits.softmax(-1), v)


def randn(batch, length, keys, heads, dim, *, seed=0, dtype=torch.float64, device="cpu"):
    """q, k, v that ask for gradients; values that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, n, heads, dim, generator=generator)
        .bfloat16()
        .to(device, dtype)
        .requires_grad_()
        for n in (length, keys, keys)
    ]


def gradients_of(function, inputs, **options):
    """Output, dq, dk, dv of a weighted sum of the output."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs, **options)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device)
    upstream = upstream.view(out.shape).bfloat16().to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * upstream).sum(), inputs)]


def bound(dtype):
    """Error of a fused kernel as a share of the largest value.

    Kernels add up in fp32 and round to their dtype what enters a matrix product: weights, and in
    the backward pass the output, which comes back in the row sums, and gradients of logits; the
    result once more. Four roundings of half an ulp (2^-9 of a bf16's value), which errors of one
    sign at most double, since the largest value may be what is left of larger terms; in fp32
    sums of 128 terms, 128 * 2^-24, take their place.
    """
    return {torch.bfloat16: 8 * 2**-9, torch.float16: 8 * 2**-12, torch.float32: 2 * 2**-17}[dtype]
