"""STDiT on several ranks is STDiT on one: prediction and every gradient, in float64."""

import pytest
import torch
from dist_support import ThreadMesh, ends, randn, run
from torch.testing import assert_close

from opensora.dist.collectives import share
from opensora.dist.groups import traffic
from opensora.dist.mesh import Layout
from opensora.engine import recompute
from opensora.engine.recompute import RecomputeConfig
from opensora.engine.sequence import PLANS, SequenceParallel, check
from opensora.errors import DataError, UsageError
from opensora.models.mmdit import MMDiT
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.types import Condition

BATCH, CHANNELS, WORDS = 2, 3, 4


def build(**changes) -> STDiT:
    torch.manual_seed(0)
    config = {"width": 36, "depth": 2, "num_heads": 3, "text_channels": 6, "absolute_time": True}
    config |= changes
    model = STDiT(STDiTConfig(**config), in_channels=CHANNELS).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(frames: int, height: int, width: int):
    x = randn(BATCH, CHANNELS, frames, height, width)
    t = torch.rand(BATCH, frames, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.arange(WORDS)[None] < torch.tensor([4, 2])[:, None]
    fps = torch.tensor([8.0, 24.0], dtype=torch.float64)
    return x, t, Condition(randn(BATCH, WORDS, 6, seed=2), mask, fps=fps)


def on_ranks(shape, layout, sharing, *, saving=None, **changes):
    """Predictions put together, gradients added up, and bytes and calls of every rank."""
    ulysses, ring = layout
    size, every = ulysses * ring, ends(*layout)
    weight = randn(BATCH, CHANNELS, *shape, seed=3)
    models = [build(**changes) for _ in range(size)]  # not by the threads: they share a generator
    for model in models if saving is not None else ():
        recompute.apply(model, saving)

    def work(rank):
        model = models[rank]
        mesh = ThreadMesh(Layout(ring=ring, ulysses=ulysses), every, rank)
        parallel = SequenceParallel(mesh, sharing=sharing)
        with traffic() as ledger:
            out = parallel.run(model, *inputs(*shape), size)
        mine = parallel.frames(shape[0], size)
        assert mine == share(shape[0], rank, size)
        (out * weight[:, :, mine]).sum().backward()
        return out.detach(), {n: p.grad for n, p in model.named_parameters()}, ledger

    outs, gradients, ledgers = zip(*run(size, work), strict=True)
    added = {n: sum(g[n] for g in gradients) for n in gradients[0]}
    return torch.cat(outs, dim=2), added, ledgers


def on_one(shape, **changes):
    model = build(**changes)
    out = model(*inputs(*shape))
    (out * randn(BATCH, CHANNELS, *shape, seed=3)).sum().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("sharing", ["auto", "attention"])
@pytest.mark.parametrize("window", [None, (2, 3), (64, 64)], ids=str)
@pytest.mark.parametrize("layout", [(2, 1), (1, 2), (2, 2), (3, 1), (4, 2), (8, 1)], ids=str)
def test_a_shared_clip_is_the_clip(layout, window, sharing):
    shape = (5, 10, 6)  # 5 frames of 5 x 3 tokens: nothing divides by the ranks
    out, gradients, _ = on_ranks(shape, layout, sharing, window=window)
    expected, expected_gradients = on_one(shape, window=window)
    assert_close(out, expected, rtol=1e-9, atol=1e-10)
    for name, value in expected_gradients.items():
        scale = float(value.abs().max())
        assert_close(gradients[name], value, rtol=1e-8, atol=1e-10 * scale + 1e-12, msg=name)


@pytest.mark.parametrize("sharing", ["auto", "attention"])
@pytest.mark.parametrize("window", [None, (1, 3), (64, 64)], ids=str)
@pytest.mark.parametrize("policy", ["block", "pair"])
def test_a_shared_clip_is_the_clip_in_tiles_too(policy, window, sharing):
    shape, saving = (5, 10, 6), RecomputeConfig(policy=policy, tiles=3)
    out, gradients, _ = on_ranks(shape, (2, 2), sharing, saving=saving, window=window)
    expected, expected_gradients = on_one(shape, window=window)
    assert_close(out, expected, rtol=1e-9, atol=1e-10)
    for name, value in expected_gradients.items():
        scale = float(value.abs().max())
        assert_close(gradients[name], value, rtol=1e-8, atol=1e-10 * scale + 1e-12, msg=name)


def test_a_picture_is_shared_though_one_rank_has_its_only_frame():
    shape = (1, 4, 4)
    out, gradients, _ = on_ranks(shape, (2, 1), "auto", window=None)
    expected, expected_gradients = on_one(shape, window=None)
    assert_close(out, expected, rtol=1e-9, atol=1e-10)
    for name, value in expected_gradients.items():
        assert_close(gradients[name], value, rtol=1e-8, atol=1e-9, msg=name)


def test_a_pair_of_blocks_takes_two_exchanges_and_half_the_bytes_of_ulysses():
    shape = (4, 8, 8)
    depth, size, tokens_bytes = 2, 4, BATCH * 4 * 16 * 36 * 8
    _, _, traded = on_ranks(shape, (size, 1), "auto", window=None)
    _, _, shared = on_ranks(shape, (size, 1), "attention", window=None, num_heads=2)
    # All but this rank's own part of a quarter of the tokens leaves it in each exchange.
    assert {(t.calls, t.sent) for t in traded} == {
        (2 * depth, 2 * depth * (size - 1) * tokens_bytes // size**2)
    }
    assert {t.calls for t in shared} == {2 * depth}  # q, k, v packed in one, the result in another
    assert sum(t.sent for t in traded) * 2 <= sum(t.sent for t in shared)


def test_ranks_that_read_different_samples_of_a_clip_are_found_out():
    every = ends(2, 1)

    def work(rank, other):
        mesh = ThreadMesh(Layout(ulysses=2), every, rank)
        ids = torch.tensor([3, 4 if rank == 0 else other])
        SequenceParallel(mesh).check_same(ids, 2, torch.device("cpu"))
        return True

    assert all(run(2, lambda rank: work(rank, 4)))
    with pytest.raises(DataError, match=r"\[\[3, 4\], \[3, 9\]\]"):
        run(2, lambda rank: work(rank, 9))


def test_models_without_a_plan_are_refused():
    with pytest.raises(UsageError, match="Linear cannot share sequences"):
        check(torch.nn.Linear(1, 1), Layout(ulysses=2))
    check(torch.nn.Linear(1, 1), Layout(dp_replicate=2))
    assert set(PLANS) == {STDiT, MMDiT}
