"""Backends state what they can, one rule chooses, and GPU kernels get the arguments they expect.

The kernels themselves are stood in for: nothing here has run on CUDA, but for the tests marked gpu.
"""

import dataclasses
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from attention_support import bound, gradients_of, randn, reference
from torch.nn.attention import _registry
from torch.nn.attention.flex_attention import create_block_mask
from torch.testing import assert_close

from opensora.errors import MissingPackageError, UsageError
from opensora.ops import backends, kernels, selection
from opensora.ops.attention import FlashBlock, PlainBlock, attend, block_for
from opensora.ops.backends import BACKENDS, PARTS, Machine, Request, choose
from opensora.ops.patterns import Frames, Packed, kind_of, visible

CPU = torch.device("cpu")
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
EVERYTHING = frozenset(PARTS)
HOST = Machine("cpu", (0, 0), EVERYTHING)
A100 = Machine("cuda", (8, 0), EVERYTHING)
H200 = Machine("cuda", (9, 0), EVERYTHING)
B200 = Machine("cuda", (10, 0), EVERYTHING)
BARE = Machine("cuda", (9, 0))
V100 = Machine("cuda", (7, 0), EVERYTHING)


@pytest.mark.parametrize(
    ("machine", "request_", "wanted", "chosen"),
    [
        (HOST, Request(FP32, 64), "auto", "sdpa"),
        (HOST, Request(BF16, 72, "packed"), "auto", "sdpa"),
        (HOST, Request(FP32, 64, "frames"), "auto", "sdpa"),
        (HOST, Request(FP32, 64, "keys"), "plain", "plain"),
        (Machine("mps"), Request(FP32, 64), "auto", "sdpa"),
        (A100, Request(BF16, 128), "auto", "sdpa"),
        (H200, Request(BF16, 128), "auto", "cudnn"),
        (B200, Request(BF16, 72), "auto", "cudnn"),
        (H200, Request(BF16, 72, causal=True), "auto", "cudnn"),
        (H200, Request(FP32, 128), "auto", "sdpa"),
        (H200, Request(BF16, 256), "auto", "sdpa"),
        (H200, Request(BF16, 12), "auto", "sdpa"),
        (H200, Request(BF16, 128, "keys"), "auto", "sdpa"),
        (H200, Request(BF16, 64, "packed"), "auto", "varlen"),
        (H200, Request(FP32, 64, "packed"), "auto", "sdpa"),
        (H200, Request(BF16, 64, "frames"), "auto", "flex"),
        (H200, Request(FP64, 64, "frames"), "auto", "sdpa"),
        (BARE, Request(BF16, 64, "packed"), "auto", "sdpa"),
        (BARE, Request(BF16, 64, "frames"), "auto", "sdpa"),
        (V100, Request(BF16, 64, "packed"), "auto", "sdpa"),
        (H200, Request(BF16, 64), "flash3", "flash3"),
        (H200, Request(BF16, 64, "keys"), "flash3", "sdpa"),
        (H200, Request(BF16, 64, "packed"), "flash3", "varlen"),
        (B200, Request(BF16, 64), "flash3", "cudnn"),
        (A100, Request(BF16, 64), "flash3", "sdpa"),
        (BARE, Request(BF16, 64), "flash3", "cudnn"),
        (B200, Request(BF16, 128), "flash4", "flash4"),
        (B200, Request(BF16, 192), "flash4", "sdpa"),
        (A100, Request(BF16, 192), "flash2", "flash2"),
        (A100, Request(BF16, 64, "packed"), "xformers", "xformers"),
        (A100, Request(BF16, 64, "keys"), "xformers", "sdpa"),
        (A100, Request(BF16, 64), "varlen", "varlen"),
        (HOST, Request(BF16, 64), "varlen", "sdpa"),
    ],
)
def test_the_first_that_can_serves(machine, request_, wanted, chosen):
    assert choose(request_, machine, wanted).name == chosen


@pytest.mark.parametrize("machine", [HOST, A100, H200, B200, BARE, V100, Machine("mps")])
@pytest.mark.parametrize("wanted", ["auto", *BACKENDS])
def test_every_call_is_served_by_what_says_that_it_can(machine, wanted):
    for dtype in backends.FLOAT:
        for head_dim in (1, 8, 72, 128, 512):
            for kind in backends.MASKS:
                request = Request(dtype, head_dim, kind)
                chosen = choose(request, machine, wanted)
                assert chosen.lacking(machine) is None
                assert chosen.refuses(request) is None


@pytest.mark.parametrize(
    ("name", "machine", "told"),
    [
        ("flash3", HOST, "it runs on cuda, and this is cpu"),
        ("flash3", B200, "compute capability 9.x, and this GPU has 10.0"),
        ("flash4", BARE, "flash-attn-4"),
        ("xformers", BARE, r"opensora\[xformers\]"),
        ("sdpa", HOST, None),
    ],
)
def test_what_lacks_is_said(name, machine, told):
    reason = BACKENDS[name].lacking(machine)
    assert reason is None if told is None else re.search(told, reason)


def test_looking_for_parts_never_fails():
    assert all(isinstance(part.found(), bool) for part in PARTS.values())


def test_a_backend_that_cannot_serve_is_refused_with_what_can():
    with pytest.raises(
        UsageError,
        match=r"attention=flash3 cannot serve this run: it runs on "
        r"cuda, and this is cpu\. Set attention=auto or one of sdpa, plain",
    ):
        selection.select("flash3", CPU, FP32, 64)  # fmt: skip
    assert backends.preferred() == "auto"


def test_a_selection_is_in_force_and_told():
    try:
        chosen = selection.select("plain", CPU, FP32, 72)
        assert backends.preferred() == "plain"
        assert str(chosen) == "plain for self-attention, plain for cross"
        assert isinstance(block_for(CPU, FP32, 72), PlainBlock)
    finally:
        backends.prefer("auto")
    chosen = selection.select("auto", CPU, BF16, 72)
    assert chosen.names == ("sdpa", "sdpa")
    assert all("aten._scaled_dot_product_flash_attention_for_cpu" in o for o in chosen.operators)
    assert isinstance(block_for(CPU, BF16, 72), FlashBlock)


@pytest.mark.parametrize("fault", ["forward", "backward", "raises"])
def test_a_kernel_that_is_wrong_is_found_at_the_start(monkeypatch, fault):
    def wrong(q, k, v, *rest):
        if fault == "raises":
            raise RuntimeError("no kernel image\nis available")
        other = q * 1.3 if fault == "forward" else q * 1.3 - q.detach() * 0.3
        return kernels.sdpa(other, k, v, *rest)

    monkeypatch.setitem(BACKENDS, "sdpa", dataclasses.replace(BACKENDS["sdpa"], attend=wrong))
    told = "RuntimeError: no kernel image" if fault == "raises" else "does not compute attention"
    with pytest.raises(UsageError, match=told):
        selection.select("sdpa", CPU, FP32, 16)
    assert backends.preferred() == "auto"


def test_the_survey_names_every_backend():
    found = {backend.name: reason for backend, reason in selection.survey(CPU)}
    assert found.keys() == BACKENDS.keys()
    assert {name for name, reason in found.items() if reason is None} == {"sdpa", "plain"}


def test_flash_attention_3_is_active_while_it_is_preferred(monkeypatch):
    log = []

    def register():
        log.append("on")
        return SimpleNamespace(remove=lambda: log.append("off"))

    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", register)
    with backends.preferring("flash3"):
        assert torch.nn.attention.current_flash_attention_impl() == "FA3"
        with backends.preferring("flash3"):
            pass
        assert log == ["on"]
    assert log == ["on", "off"]
    assert torch.nn.attention.current_flash_attention_impl() is None


# What stands in for a GPU's kernels.


def both(shape, mask, causal, way):
    """Outputs and gradients of a way and of the formula, pair by pair."""
    inputs = randn(*shape)
    found = gradients_of(lambda *x: way(*x, mask, causal, None), inputs)
    return zip(found, gradients_of(reference, inputs, mask=mask, causal=causal), strict=True)


PACKED = [
    ((1, 12, 12, 2, 8), Packed((5, 0, 7)), False),
    ((1, 12, 12, 2, 8), Packed((5, 7)), True),
    ((1, 6, 12, 2, 8), Packed((5, 0, 1), (3, 2, 7)), False),
]
BATCHES = [((3, 5, 5, 2, 8), None, True), ((3, 5, 7, 2, 8), None, False)]


@pytest.mark.parametrize(("shape", "mask", "causal"), [*PACKED, *BATCHES])
def test_varlen_gets_offsets_and_the_longest(monkeypatch, shape, mask, causal):
    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert cu_q.dtype == cu_k.dtype == torch.int32 and q.dim() == 3
        assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        assert window_size == ((-1, 0) if causal else (-1, -1)) and scale is None
        packed = Packed(tuple(cu_q.diff().tolist()), tuple(cu_k.diff().tolist()))
        q, k, v = q[None], k[None], v[None]
        return kernels.plain(q, k, v, packed, causal, None)[0]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    for mine, theirs in both(shape, mask, causal, kernels.varlen):
        assert_close(mine, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("shape", "mask", "causal"), [*PACKED, *BATCHES])
def test_xformers_gets_its_own_masks(monkeypatch, shape, mask, causal):
    """The stand-ins have the names and signatures of xformers 0.0.35."""

    class LowerTriangularMask:
        pass

    @dataclasses.dataclass
    class BlockDiagonalMask:
        q: list
        k: list
        causal: bool = False

        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            assert device == CPU
            return cls(q_seqlen, kv_seqlen or q_seqlen)

        def make_causal(self):
            return BlockDiagonalMask(self.q, self.k, True)

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        packed = None
        ordered = isinstance(attn_bias, LowerTriangularMask)
        if isinstance(attn_bias, BlockDiagonalMask):
            packed = Packed(tuple(attn_bias.q), tuple(attn_bias.k))
            ordered = attn_bias.causal
        return kernels.plain(query, key, value, packed, ordered, scale)

    found = {
        "xformers.ops.fmha": {"memory_efficient_attention": memory_efficient_attention},
        "xformers.ops.fmha.attn_bias": {
            "LowerTriangularMask": LowerTriangularMask, "BlockDiagonalMask": BlockDiagonalMask
        },
    }  # fmt: skip
    for name in ("xformers", "xformers.ops", *found):
        module = ModuleType(name)
        vars(module).update(found.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    for mine, theirs in both(shape, mask, causal, kernels.xformers):
        assert_close(mine, theirs, rtol=0, atol=1e-13)


def test_without_xformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", None)
    with pytest.raises(MissingPackageError, match=r"opensora\[xformers\]"):
        kernels.xformers(*randn(1, 2, 2, 1, 8), None, False, None)


ORDERS = [
    (Frames(3), 20, 20),
    (Frames(16), 64, 64),
    (Frames(5, before=1, after=1), 41, 57),
    (Frames(7, before=0, first=2), 9, 30),
    (Frames(1), 33, 33),
    (Frames(4, before=2, after=None), 40, 31),
    (Frames(100), 40, 40),
]


@pytest.mark.parametrize(("frames", "queries", "keys"), ORDERS, ids=str)
def test_blocks_of_frames_are_those_of_the_mask_written_out(frames, queries, keys):
    found = kernels.frame_blocks(frames, queries, keys, CPU, block=8)
    seen = visible(frames, queries, keys, causal=False, device=CPU)
    expected = create_block_mask(
        lambda b, h, i, j: seen[i.clamp(max=queries - 1), j.clamp(max=keys - 1)],
        None, None, queries, keys, device="cpu", BLOCK_SIZE=8,
    )  # fmt: skip
    assert torch.equal(found.to_dense(), expected.to_dense())
    assert torch.equal(found.full_kv_num_blocks, expected.full_kv_num_blocks)
    assert torch.equal(found.kv_num_blocks, expected.kv_num_blocks)
    written = found.mask_mod(0, 0, torch.arange(queries)[:, None], torch.arange(keys)[None])
    assert torch.equal(written, seen)


@pytest.mark.slow
def test_flex_compiled_for_a_cpu_is_the_formula():
    """Forward only: torch has no backward pass of it on CPUs."""
    mask = Frames(40, before=2)
    q, k, v = (x.detach() for x in randn(1, 300, 300, 2, 16, dtype=FP32))
    out = kernels.flex(q, k, v, mask, False, None)
    expected = reference(q.double(), k.double(), v.double(), mask=mask)
    assert (out - expected).abs().max() <= bound(FP32) * expected.abs().max()


GPU_PATTERNS = {
    "none": {},
    "causal": {"causal": True},
    "keys": {"mask": torch.arange(300)[None] < 211},
    "frames": {"mask": Frames(60, before=2)},
    "packed": {"mask": Packed((130, 1, 169))},
    "packed and causal": {"mask": Packed((130, 1, 169)), "causal": True},
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("pattern", GPU_PATTERNS)
@pytest.mark.parametrize("head_dim", [64, 72, 128])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_on_cuda_every_backend_is_the_formula(dtype, head_dim, pattern, name):
    device = torch.device("cuda")
    options = dict(GPU_PATTERNS[pattern])
    if pattern == "keys":
        options["mask"] = options["mask"].to(device)
    backend = BACKENDS[name]
    request = Request(dtype, head_dim, kind_of(options.get("mask")))
    reason = backend.lacking(backends.machine(device)) or backend.refuses(request)
    if reason:
        pytest.skip(f"{name}: {reason}")
    inputs = randn(1, 300, 300, 2, head_dim, dtype=dtype, device="cuda")
    with backends.preferring(name):
        found = gradients_of(attend, inputs, **options)
    expected = gradients_of(reference, [x.double() for x in inputs], **options)
    # TF32 is off by default; compiled kernels of fp32 may use it all the same.
    limit = bound(dtype) if dtype == BF16 else 2**-9
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).abs().max() <= limit * theirs.abs().max()


def test_the_choice_is_a_constant_to_the_compiler_as_torch_marks_one():
    marked = torch.compiler.assume_constant_result(lambda: 0)
    assert vars(marked)
    assert vars(marked).items() <= vars(backends.serving).items()
