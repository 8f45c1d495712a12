"""`attend` is softmax attention as the formula says, forward and backward, by every backend."""

import dataclasses

import pytest
import torch
from attention_support import bound, gradients_of, naive, randn, reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from opensora.ops.attention import attend
from opensora.ops.backends import BACKENDS, preferring
from opensora.ops.patterns import Frames, Packed

EXACT = {"rtol": 0.0, "atol": 1e-13}
"""float64 sums of at most 16 products of values of about one: 16 * 2.2e-16, twice, with room."""

MASK = torch.arange(7)[None] < torch.tensor([[7], [1], [4]])
SERVING = ["auto", "plain"]
"""What runs on a CPU: sdpa, and plain."""

DENSE = [
    (5, 5, {}),
    (5, 7, {}),
    (5, 7, {"mask": MASK}),
    (6, 6, {"causal": True}),
    (5, 7, {"scale": 0.7}),
    (1, 7, {"mask": MASK, "scale": 2.0}),
]


@pytest.mark.parametrize("name", SERVING)
@pytest.mark.parametrize(("length", "keys", "options"), DENSE)
def test_it_is_the_formula_with_its_gradients(length, keys, options, name):
    inputs = randn(3, length, keys, 2, 8)
    with preferring(name):
        found = gradients_of(attend, inputs, **options)
    for ours, theirs in zip(found, gradients_of(naive, inputs, **options), strict=True):
        assert_close(ours, theirs, **EXACT)


PATTERNS = {
    "none": {},
    "causal": {"causal": True},
    "frames": {"mask": Frames(12)},
    "windows of frames": {"mask": Frames(5, before=2, after=1)},
    "a window of tokens": {"mask": Frames(1, before=9)},
    "packed": {"mask": Packed((30, 1, 0, 36))},
    "packed and causal": {"mask": Packed((30, 1, 36)), "causal": True},
}


@pytest.mark.parametrize("name", SERVING)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("head_dim", [8, 72, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_pattern_is_the_formula_in_its_precision(dtype, head_dim, pattern, name):
    inputs = randn(1, 67, 67, 2, head_dim, dtype=dtype)
    with preferring(name):
        found = gradients_of(attend, inputs, **PATTERNS[pattern])
    expected = gradients_of(reference, [x.double() for x in inputs], **PATTERNS[pattern])
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        assert (mine - theirs).abs().max() <= bound(dtype) * theirs.abs().max()


def test_the_kernels_that_other_backends_force_are_the_formula():
    """cudnn's way of asking torch for kernels, where torch falls back to those of a CPU."""
    inputs = randn(2, 67, 33, 2, 16)

    def cudnn(q, k, v):
        return BACKENDS["cudnn"].attend(q, k, v, None, False, None)

    for mine, theirs in zip(
        gradients_of(cudnn, inputs), gradients_of(reference, inputs), strict=True
    ):
        assert_close(mine, theirs, rtol=0.0, atol=1e-12)


lengths = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=5)


@pytest.mark.parametrize("name", SERVING)
@settings(deadline=None, max_examples=40)
@given(pairs=lengths, own=st.booleans(), causal=st.booleans())
def test_packed_sequences_are_each_as_if_alone(name, pairs, own, causal):
    queries, keys = (tuple(side) for side in zip(*pairs, strict=True))
    assume(any(queries))
    causal = causal and own
    packed = Packed(queries) if own else Packed(queries, keys)
    inputs = randn(1, sum(queries), sum(packed.key_lengths), 2, 8)

    def alone(q, k, v):
        parts = zip(*(x.split(n, 1) for x, n in (
            (q, packed.queries), (k, packed.key_lengths), (v, packed.key_lengths)
        )), strict=True)  # fmt: skip
        return torch.cat([attend(*part, causal=causal) for part in parts], dim=1)

    with preferring(name):
        found = gradients_of(attend, inputs, mask=packed, causal=causal)
    for mine, theirs in zip(found, gradients_of(alone, inputs), strict=True):
        assert_close(mine, theirs, **EXACT)


nearby = st.one_of(st.none(), st.integers(0, 4))


@pytest.mark.parametrize("name", SERVING)
@settings(deadline=None, max_examples=60)
@given(
    size=st.sampled_from([1, 2, 5, 40, 150]),
    before=nearby,
    after=nearby,
    first=st.integers(0, 3),
    num_queries=st.integers(1, 300),
    num_keys=st.integers(1, 300),
)
def test_frames_see_those_near_their_own(name, size, before, after, first, num_queries, num_keys):
    frames = Frames(size, before, after, first)
    inputs = [x[:, :, :1] for x in randn(1, num_queries, num_keys, 1, 4)]
    of_query = torch.arange(num_queries)[:, None] // size + first
    of_key = torch.arange(num_keys)[None] // size
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if before is not None:
        seen &= of_key >= of_query - before
    if after is not None:
        seen &= of_key <= of_query + after
    if not seen.any(1).all():
        with pytest.raises(ValueError, match="see no key"):
            attend(*inputs, mask=frames)
        return
    with preferring(name):
        found = gradients_of(attend, inputs, mask=frames)
    for mine, theirs in zip(found, gradients_of(reference, inputs, seen=seen), strict=True):
        assert_close(mine, theirs, rtol=0.0, atol=1e-12)


def test_masked_keys_have_no_influence():
    q, k, v = randn(3, 5, 7, 2, 8)
    out = attend(q, k, v, mask=MASK)
    hidden = ~MASK[:, :, None, None]
    other = attend(q, k.masked_fill(hidden, 1e3), v.masked_fill(hidden, -1e3), mask=MASK)
    assert torch.equal(out, other)


def test_the_first_of_a_causal_sequence_sees_itself_only():
    q, k, v = randn(3, 6, 6, 2, 8)
    assert_close(attend(q, k, v, causal=True)[:, 0], v[:, 0], **EXACT)


@pytest.mark.parametrize("name", SERVING)
def test_it_returns_the_dtype_of_its_queries_or_of_autocast(name):
    q, k, v = randn(3, 5, 7, 2, 8, dtype=torch.float32)
    with preferring(name):
        assert attend(q.bfloat16(), k.bfloat16(), v.bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            mixed = attend(q, k.bfloat16(), v, mask=MASK)
        assert mixed.dtype == torch.bfloat16
        assert_close(
            mixed, attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask=MASK), rtol=0, atol=0
        )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mask": MASK, "causal": True}, "cannot be combined"),
        ({"mask": Frames(2), "causal": True}, "cannot be combined"),
        ({"causal": True}, "as many keys as queries, found 7 and 5"),
        ({"mask": Packed((2, 3), (3, 4))}, "a batch of 1"),
        ({"mask": Frames(2, before=0, first=4)}, "see no key"),
    ],
)
def test_what_does_not_fit_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        attend(*randn(3, 5, 7, 2, 8), **options)


def test_packed_causal_order_needs_a_key_for_each_query():
    with pytest.raises(ValueError, match="in each sequence"):
        attend(*randn(1, 5, 7, 2, 8), mask=Packed((2, 3), (3, 4)), causal=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Frames(0),
        lambda: Frames(2, before=-1),
        lambda: Packed((1, 2), (3,)),
        lambda: Packed((1,), (0,)),
        lambda: Packed((0, 0), (1, 2)),
    ],
)
def test_impossible_patterns_are_refused(make):
    with pytest.raises(ValueError, match=r"at least|same sequences"):
        make()


def test_the_chosen_backend_is_the_one_that_is_called(monkeypatch):
    called = []
    for name in ("sdpa", "plain"):

        def spy(*args, name=name, backend=BACKENDS[name]):
            called.append(name)
            return backend.attend(*args)

        monkeypatch.setitem(BACKENDS, name, dataclasses.replace(BACKENDS[name], attend=spy))
    inputs = randn(1, 5, 5, 2, 8)
    attend(*inputs)
    with preferring("plain"):
        attend(*inputs)
    attend(*inputs)
    assert called == ["sdpa", "plain", "sdpa"]


def test_a_compiled_graph_holds_the_backend_and_is_traced_anew_for_another():
    graphs = []

    def look(graph, example):
        graphs.append(str(graph.code))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: attend(q, k, v) + 1, backend=look, dynamic=False)
    inputs = [x.detach() for x in randn(1, 5, 7, 2, 8)]
    first = compiled(*inputs)
    compiled(*inputs)
    with preferring("plain"):
        second = compiled(*inputs)
    assert ["scaled_dot_product_attention" in code for code in graphs] == [True, False]
    assert_close(first, second, **EXACT)
    torch._dynamo.reset()
