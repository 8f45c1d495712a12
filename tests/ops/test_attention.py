"""`attend` is softmax attention as the formula says, forward and backward."""

import pytest
import torch
from torch.testing import assert_close

from opensora.ops.attention import attend

EXACT = {"rtol": 0.0, "atol": 1e-13}
"""float64 sums of at most 16 products of values of about one: 16 * 2.2e-16, twice, with room."""


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


def draw(length: int, keys: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, length, 2, 8), (3, keys, 2, 8), (3, keys, 2, 8)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]


MASK = torch.arange(7)[None] < torch.tensor([[7], [1], [4]])


@pytest.mark.parametrize(
    ("length", "keys", "options"),
    [
        (5, 5, {}),
        (5, 7, {}),
        (5, 7, {"mask": MASK}),
        (6, 6, {"causal": True}),
        (5, 7, {"scale": 0.7}),
        (1, 7, {"mask": MASK, "scale": 2.0}),
    ],
)
def test_it_is_the_formula_with_its_gradients(length, keys, options):
    def with_gradients(function):
        inputs = draw(length, keys)
        out = function(*inputs, **options)
        upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        return [out, *torch.autograd.grad((out * upstream).sum(), inputs)]

    for ours, theirs in zip(with_gradients(attend), with_gradients(naive), strict=True):
        assert_close(ours, theirs, **EXACT)


def test_masked_keys_have_no_influence():
    q, k, v = draw(5, 7)
    out = attend(q, k, v, mask=MASK)
    hidden = ~MASK[:, :, None, None]
    other = attend(q, k.masked_fill(hidden, 1e3), v.masked_fill(hidden, -1e3), mask=MASK)
    assert torch.equal(out, other)


def test_the_first_of_a_causal_sequence_sees_itself_only():
    q, k, v = draw(6, 6)
    assert_close(attend(q, k, v, causal=True)[:, 0], v[:, 0], **EXACT)


def test_it_returns_the_dtype_of_its_queries():
    q, k, v = (tensor.detach().bfloat16() for tensor in draw(5, 7))
    assert attend(q, k, v, mask=MASK).dtype == torch.bfloat16
