"""Ulysses, ring and both at once are attention: output and gradients, any lengths and heads.

The tolerance is that of float64 sums in another order; a bf16 run is held to bf16's rounding.
"""

import pytest
import torch
from dist_support import ThreadGroup, groups, randn, run
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from opensora.dist.collectives import share, shares
from opensora.dist.groups import traffic
from opensora.dist.ring import merge
from opensora.dist.ulysses import SequenceGroups, attend_sharded
from opensora.ops.attention import ChosenBlock, FlashBlock, PlainBlock, attend

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (3, 2), (2, 4), (4, 2), (8, 1), (1, 8)]
BATCH, LENGTH, HEADS, DIM, TEXT = 2, 13, 3, 4, 5


def reference(q, k, v, causal=False):
    parts = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(*parts, is_causal=causal).transpose(1, 2)


def tensors(length, dtype=torch.float64):
    """q, k, v and the weight of the output in the loss."""
    return [randn(BATCH, length, HEADS, DIM, seed=i + length, dtype=dtype) for i in range(4)]


def ends(ulysses: int, ring: int) -> list[SequenceGroups]:
    """The groups of every rank, ring-major."""
    inner: list[list[ThreadGroup]] = [groups(ulysses) for _ in range(ring)]
    outer: list[list[ThreadGroup]] = [groups(ring) for _ in range(ulysses)]
    return [SequenceGroups(inner[r][u], outer[u][r]) for r in range(ring) for u in range(ulysses)]


def sharded(layout, block, *, causal=False, dtype=torch.float64, length=LENGTH, whole=None):
    """Outputs and gradients of the ranks put together: out, dq, dk, dv."""
    ulysses, ring = layout
    size = ulysses * ring
    q, k, v, weight = tensors(length, dtype)
    every = ends(ulysses, ring)

    def work(rank):
        part = share(length, rank, size)
        mine = [x[:, part].clone().requires_grad_() for x in (q, k, v)]
        out = attend_sharded(
            *mine,
            every[rank],
            block,
            lengths=tuple(shares(length, size)),
            causal=causal,
            whole=whole,
        )
        return out.detach(), *torch.autograd.grad((out * weight[:, part]).sum(), mine)

    return [torch.cat(parts, dim=1) for parts in zip(*run(size, work), strict=True)]


def whole(*, causal=False, dtype=torch.float64, length=LENGTH):
    q, k, v, weight = tensors(length, dtype)
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    out = reference(*given, causal=causal)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), given)]


@pytest.mark.parametrize("block", [PlainBlock(), FlashBlock()], ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_shards_attend_as_the_whole(layout, causal, block):
    found = sharded(layout, block, causal=causal)
    for mine, expected in zip(found, whole(causal=causal), strict=True):
        assert_close(mine, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (4, 1), (2, 2), (1, 2)], ids=str)
def test_whole_sequences_are_attended_to_by_the_chosen_backend(layout, causal):
    """Unless a ring is across; four ranks leave one without heads."""
    calls = []

    def counting(*args, **options):
        calls.append(args[0].shape[2])
        return attend(*args, **options)

    found = sharded(layout, ChosenBlock(), causal=causal, whole=counting)
    for mine, expected in zip(found, whole(causal=causal), strict=True):
        assert_close(mine, expected, rtol=1e-10, atol=1e-12)
    assert sum(calls) == (HEADS if layout[1] == 1 else 0)


@pytest.mark.parametrize("layout", [(2, 2), (1, 4), (4, 1)], ids=str)
def test_parts_may_be_empty(layout):
    for mine, expected in zip(sharded(layout, FlashBlock(), length=3), whole(length=3), strict=True):
        assert_close(mine, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", [(2, 1), (1, 4), (2, 2)], ids=str)
def test_in_bf16_the_error_is_that_of_bf16(layout):
    found = sharded(layout, FlashBlock(), dtype=torch.bfloat16)
    wide = [x.bfloat16().double() for x in tensors(LENGTH, torch.bfloat16)]
    given = [x.requires_grad_() for x in wide[:3]]
    out = reference(*given)
    exact = [out.detach(), *torch.autograd.grad((out * wide[3]).sum(), given)]
    for mine, expected in zip(found, exact, strict=True):
        # Two roundings of an output, each half of 2^-8, and those of the weights in between.
        assert (mine.double() - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize("block", [PlainBlock(), FlashBlock()], ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=str)
def test_hidden_text_is_seen_by_nobody(layout, block):
    """Rows of a batch see 5 and 2 tokens of the text, the rest of which is huge."""
    size, every = layout[0] * layout[1], ends(*layout)
    mask = torch.arange(TEXT)[None] < torch.tensor([TEXT, 2])[:, None]
    video, text = tensors(LENGTH), [x.clone() for x in tensors(TEXT)]
    for x in text[1:3]:
        x[1, 2:] = 1e3
    given = [torch.cat(pair, dim=1).requires_grad_() for pair in zip(text, video, strict=True)]
    seen = torch.cat([mask, torch.ones(BATCH, LENGTH, dtype=torch.bool)], dim=1)[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in given[:3])
    out = scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)[:, TEXT:]
    expected = torch.autograd.grad((out * video[3]).sum(), given[:3])

    def work(rank):
        part = share(LENGTH, rank, size)
        mine = [x[:, part].clone().requires_grad_() for x in video[:3]]
        words = [x.clone().requires_grad_() for x in text[:3]]
        lengths = tuple(shares(LENGTH, size))
        found, _ = attend_sharded(
            *mine, every[rank], block, lengths=lengths, text=tuple(words), mask=mask
        )
        loss = (found * video[3][:, part]).sum()
        return found.detach(), torch.autograd.grad(loss, [*words[1:], *mine])

    results = run(size, work)
    found = torch.cat([seen for seen, _ in results], dim=1)
    assert_close(found, out.detach(), rtol=1e-10, atol=1e-12)
    for index, gradient in enumerate(expected[1:]):
        words = sum(gradients[index] for _, gradients in results)
        frames = torch.cat([gradients[index + 3] for _, gradients in results], dim=1)
        assert_close(torch.cat([words, frames], dim=1), gradient, rtol=1e-9, atol=1e-11)
        assert not words[1, 2:].any()


@pytest.mark.parametrize(
    ("layout", "attends"), [*((at, None) for at in LAYOUTS), ((2, 1), attend), ((2, 2), attend)]
)
def test_text_joins_the_attention_and_stays_the_same_on_every_rank(layout, attends):
    ulysses, ring = layout
    size = ulysses * ring
    video, text = tensors(LENGTH), tensors(TEXT)
    every = ends(ulysses, ring)
    joined = [torch.cat(pair, dim=1).requires_grad_() for pair in zip(text, video, strict=True)]
    out = reference(*joined[:3])
    # Each rank's loss has its own video and a share of the text, as text's further path has.
    expected = torch.autograd.grad((out * joined[3]).sum(), joined[:3])

    def work(rank):
        part = share(LENGTH, rank, size)
        mine = [x[:, part].clone().requires_grad_() for x in video[:3]]
        words = [x.clone().requires_grad_() for x in text[:3]]
        outs = attend_sharded(
            *mine,
            every[rank],
            FlashBlock(),
            lengths=tuple(shares(LENGTH, size)),
            text=tuple(words),
            whole=attends,
        )
        loss = (outs[0] * video[3][:, part]).sum() + (outs[1] * text[3]).sum() * (rank + 1)
        return outs[1].detach(), outs[0].detach(), torch.autograd.grad(loss, [*words, *mine])

    results = run(size, work)
    factor = size * (size + 1) / 2  # the ranks' shares of the text's loss add up to this
    weights = torch.cat([text[3] * factor, video[3]], dim=1)
    expected = torch.autograd.grad((reference(*joined[:3]) * weights).sum(), joined[:3])
    for written, _, _ in results:
        assert_close(written, out[:, :TEXT].detach(), rtol=1e-10, atol=1e-12)
    assert_close(
        torch.cat([seen for _, seen, _ in results], dim=1), out[:, TEXT:].detach(), rtol=1e-10,
        atol=1e-12,
    )  # fmt: skip
    for index, gradient in enumerate(expected):
        words = sum(gradients[index] for _, _, gradients in results)
        frames = torch.cat([gradients[index + 3] for _, _, gradients in results], dim=1)
        assert_close(torch.cat([words, frames], dim=1), gradient, rtol=1e-10, atol=1e-11)


def test_causal_order_and_text_do_not_mix():
    x = torch.ones(1, 2, 1, 4)
    with pytest.raises(ValueError, match="no causal order"):
        attend_sharded(
            x, x, x, SequenceGroups(), PlainBlock(), lengths=(2,), text=(x, x, x), causal=True
        )


def test_merging_is_associative_and_forgets_parts_that_saw_nothing():
    outs, lses = randn(3, 2, 5, 1, 4), randn(3, 2, 5, 1, seed=1) * 30
    left = merge(*merge(outs[0], lses[0], outs[1], lses[1]), outs[2], lses[2])
    right = merge(outs[0], lses[0], *merge(outs[1], lses[1], outs[2], lses[2]))
    for one, other in zip(left, right, strict=True):
        assert_close(one, other, rtol=1e-12, atol=1e-12)
    nothing = merge(torch.zeros_like(outs[0]), torch.full_like(lses[0], -torch.inf), outs[0], lses[0])
    assert torch.equal(nothing[0], outs[0]) and torch.equal(nothing[1], lses[0])


def test_a_ring_never_holds_the_whole_sequence():
    """What a rank sends in a pass is (P - 1) parts of keys and values; Ulysses 3 and 1 of 1/P."""
    length, size = 16, 4
    q, k, v, _ = tensors(length, torch.float32)
    bytes_of_part = q.nbytes // size

    def work(rank, every):
        part = share(length, rank, size)
        with traffic() as ledger:
            attend_sharded(
                q[:, part], k[:, part], v[:, part], every[rank], FlashBlock(), lengths=(4,) * 4
            )
        return ledger.sent

    ring = ends(1, size)
    assert run(size, lambda rank: work(rank, ring)) == [2 * (size - 1) * bytes_of_part] * size
    ulysses = ends(size, 1)
    sent = run(size, lambda rank: work(rank, ulysses))
    # 3 heads over 4 ranks: what leaves a rank is all but its own heads, and comes back so.
    heads = shares(HEADS, size)
    expected = [3 * bytes_of_part * (HEADS - h) / HEADS + (size - 1) * bytes_of_part * h / HEADS for h in heads]
    assert sent == pytest.approx(expected)
