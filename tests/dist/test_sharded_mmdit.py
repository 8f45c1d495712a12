"""MMDiT on several ranks is MMDiT on one: prediction and every gradient."""

import pytest
import torch
from dist_support import ThreadMesh, ends, randn, run
from torch.testing import assert_close

from opensora.dist.groups import traffic
from opensora.dist.mesh import Layout
from opensora.engine.sequence import SequenceParallel
from opensora.models.mmdit import MMDiT, MMDiTConfig
from opensora.types import Condition

BATCH, CHANNELS, WORDS = 2, 3, 5


def build(dtype=torch.float64, **changes) -> MMDiT:
    torch.manual_seed(0)
    config = {"width": 24, "depth": 2, "single_depth": 3, "num_heads": 3, "rope": (2, 4, 2)}
    config |= {"text_channels": 6, "pooled_channels": 4, **changes}
    model = MMDiT(MMDiTConfig(**config), in_channels=CHANNELS).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(frames: int, height: int, width: int, dtype=torch.float64):
    x = randn(BATCH, CHANNELS, frames, height, width)
    t = torch.rand(BATCH, frames, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t[1, 0] = 0
    mask = torch.arange(WORDS)[None] < torch.tensor([WORDS, 2])[:, None]
    tokens = randn(BATCH, WORDS, 6, seed=2).masked_fill(~mask[..., None], 50.0)
    cond = Condition(tokens, mask, randn(BATCH, 4, seed=4), fps=torch.tensor([8.0, 24.0]))
    return x.to(dtype), t.to(dtype), cond.to("cpu", dtype)


def on_ranks(shape, layout, dtype=torch.float64, **changes):
    """Predictions put together, gradients added up, and what every rank sent."""
    ulysses, ring = layout
    size, every = ulysses * ring, ends(*layout)
    weight = randn(BATCH, CHANNELS, *shape, seed=3).to(dtype)
    models = [build(dtype, **changes) for _ in range(size)]  # not by the threads

    def work(rank):
        model = models[rank]
        mesh = ThreadMesh(Layout(ring=ring, ulysses=ulysses), every, rank)
        parallel = SequenceParallel(mesh)
        with traffic() as ledger:
            out = parallel.run(model, *inputs(*shape, dtype), size)
        mine = parallel.frames(shape[0], size)
        (out * weight[:, :, mine]).sum().backward()
        return out.detach(), {n: p.grad for n, p in model.named_parameters()}, ledger

    outs, gradients, ledgers = zip(*run(size, work), strict=True)
    added = {n: sum(g[n] for g in gradients) for n in gradients[0]}
    return torch.cat(outs, dim=2), added, ledgers


def on_one(shape, dtype=torch.float64, **changes):
    model = build(dtype, **changes)
    out = model(*inputs(*shape, dtype))
    (out * randn(BATCH, CHANNELS, *shape, seed=3).to(dtype)).sum().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters()}


LAYOUTS = [(2, 1), (1, 2), (2, 2), (3, 1), (1, 3), (4, 1), (4, 2), (2, 4), (8, 1), (1, 8)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_shared_clip_is_the_clip(layout):
    """5 frames of 5 x 3 tokens and 3 heads: no degree divides all; above 5 ranks some have none."""
    shape = (5, 10, 6)
    out, gradients, _ = on_ranks(shape, layout)
    expected, expected_gradients = on_one(shape)
    assert_close(out, expected, rtol=1e-9, atol=1e-10)
    assert gradients.keys() == expected_gradients.keys()
    for name, value in expected_gradients.items():
        scale = float(value.abs().max())
        assert_close(gradients[name], value, rtol=1e-8, atol=1e-10 * scale + 1e-12, msg=name)


@pytest.mark.parametrize("layout", [(2, 1), (1, 2), (2, 2)], ids=str)
def test_in_float32_it_is_the_clip_to_its_rounding(layout):
    shape = (3, 6, 2)
    out, gradients, _ = on_ranks(shape, layout, torch.float32)
    expected, expected_gradients = on_one(shape, torch.float32)
    assert (out - expected).norm() <= 1e-5 * expected.norm()
    for name, value in expected_gradients.items():
        assert (gradients[name] - value).norm() <= 1e-5 * value.norm(), name


def test_a_picture_is_shared_though_one_rank_has_its_only_frame():
    shape = (1, 4, 4)
    out, gradients, _ = on_ranks(shape, (2, 1))
    expected, expected_gradients = on_one(shape)
    assert_close(out, expected, rtol=1e-9, atol=1e-10)
    for name, value in expected_gradients.items():
        assert_close(gradients[name], value, rtol=1e-8, atol=1e-9, msg=name)


def test_what_travels_is_the_video_and_of_the_text_its_result_only():
    """Keys of the text are everywhere: Ulysses sends q, k, v and the result, and the text's result."""
    shape, size, heads, wide = (4, 4, 4), 2, 2, 8
    _, _, ledgers = on_ranks(shape, (size, 1), width=24, num_heads=heads, rope=(4, 4, 4))
    blocks, video = 5, BATCH * 2 * 4 * 24 * wide  # a rank's 2 frames of 4 tokens
    text = BATCH * WORDS * 12 * wide  # the heads of one rank
    assert {(t.calls, t.sent) for t in ledgers} == {
        (3 * blocks, blocks * (4 * video // size + text))
    }
