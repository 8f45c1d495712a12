"""A step cache spares work, changes a video a little, and leaves the model as it was."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from opensora import config as configs
from opensora.diffusion import guidance
from opensora.engine.flops import FlopCounter
from opensora.errors import UsageError
from opensora.infer.caching.applied import applied
from opensora.infer.caching.cache import inside, moving
from opensora.infer.caching.configs import (
    BroadcastConfig,
    CacheConfig,
    FirstBlockConfig,
    PyramidBroadcastConfig,
    TeaCacheConfig,
)
from opensora.infer.caching.skipping import relative_change
from opensora.infer.pipeline import SamplingConfig
from opensora.models.mmdit import MMDiT, MMDiTConfig
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.types import Condition
from tests.infer.conftest import build_pipeline

ALL = (0.0, 1.0)
EVERYTHING = ("spatial", "temporal", "cross", "joint", "mlp")
OFF = {
    "teacache": TeaCacheConfig(threshold=0),
    "teacache outside its levels": TeaCacheConfig(threshold=9, levels=(0.5, 0.5)),
    "first_block": FirstBlockConfig(threshold=0),
    "pab": PyramidBroadcastConfig.model_validate(
        {kind: {"levels": [0.5, 0.5]} for kind in EVERYTHING}
    ),
    "pab of one step": PyramidBroadcastConfig.model_validate(
        {kind: {"every": 1} for kind in EVERYTHING}
    ),
}
EVERY = BroadcastConfig(every=2, levels=ALL)
ON = {
    "teacache": TeaCacheConfig(threshold=0.5),
    "first_block": FirstBlockConfig(threshold=0.5),
    "pab": PyramidBroadcastConfig(
        spatial=EVERY, temporal=EVERY, cross=EVERY, joint=EVERY, mlp=BroadcastConfig(every=1)
    ),
    "pab with mlps": PyramidBroadcastConfig(
        spatial=EVERY, temporal=EVERY, cross=EVERY, joint=EVERY, mlp=EVERY
    ),
}


def model_of(kind: str) -> nn.Module:
    """Random weights, none of them zero."""
    torch.manual_seed(3)
    if kind == "stdit":
        config = STDiTConfig(width=16, depth=3, num_heads=2, text_channels=8)
        model: nn.Module = STDiT(config, in_channels=2)
    else:
        sizes = {"width": 16, "depth": 3, "single_depth": 2, "num_heads": 2, "rope": (4, 2, 2)}
        model = MMDiT(MMDiTConfig(**sizes, text_channels=8, pooled_channels=0), in_channels=2)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.fixture(scope="module", params=["stdit", "mmdit"])
def model(request) -> nn.Module:
    torch.set_num_threads(1)
    return model_of(request.param)


def condition(rows: int, seed: int = 0) -> Condition:
    tokens = torch.randn(rows, 3, 8, generator=torch.Generator().manual_seed(seed))
    return Condition(tokens, torch.ones(rows, 3, dtype=torch.bool), fps=torch.full((rows,), 8.0))


def noise(rows: int) -> torch.Tensor:
    return torch.randn(rows, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def walk(model, config, x, predict=None, *, steps=8, first=1.0, given=0):
    """Euler's method on velocities; `given` frames stay at level 0."""
    predict = predict or partial(_told, model, condition(len(x)))
    levels = torch.linspace(first, 0, steps + 1)
    with torch.no_grad(), applied(model, config) as cache:
        for here, there in pairwise(levels):
            t = here.expand(len(x), x.shape[2]).clone()
            t[:, :given] = 0
            velocity = predict(x, t)
            velocity[:, :, :given] = 0
            x = x + (there - here) * velocity
            if cache is not None:
                cache.tick()
    return x, cache


def _told(model, cond, x, t):
    return model(x, t, cond)


@pytest.mark.parametrize("name", OFF)
def test_a_cache_that_is_off_changes_no_bit(name, model):
    plain, _ = walk(model, None, noise(2))
    found, cache = walk(model, OFF[name], noise(2))
    assert torch.equal(found, plain)
    assert cache is not None and cache.reused == 0


@pytest.mark.parametrize("name", ON)
def test_a_cache_that_is_on_spares_work_and_stays_near(name, model):
    with FlopCounter() as whole:
        plain, _ = walk(model, None, noise(2))
    with FlopCounter() as less:
        found, cache = walk(model, ON[name], noise(2))
    assert cache is not None and cache.reused > 0 and cache.computed > 0
    assert less.total < 0.95 * whole.total
    moved = (plain - noise(2)).norm()
    assert 0 < (found - plain).norm() < 0.3 * moved


@pytest.mark.parametrize("name", ON)
def test_afterwards_the_model_is_what_it_was(name, model):
    def own():
        return [(id(m), sorted(vars(m))) for m in model.modules()]

    before, plain = own(), walk(model, None, noise(1))[0]
    walk(model, ON[name], noise(1))
    assert own() == before
    with pytest.raises(RuntimeError, match="stopped"), applied(model, ON[name]):
        raise RuntimeError("stopped")
    assert own() == before
    assert torch.equal(walk(model, None, noise(1))[0], plain)


@pytest.mark.parametrize("name", ON)
def test_every_video_begins_anew(name, model):
    first, _ = walk(model, ON[name], noise(2))
    walk(model, ON[name], -noise(2))
    assert torch.equal(walk(model, ON[name], noise(2))[0], first)


@pytest.mark.parametrize("name", ON)
def test_a_video_does_not_depend_on_its_batch(name, model):
    """Rows that begin elsewhere change at another pace; products of other sizes round by 1e-6."""
    x = torch.cat([noise(2), 4 * noise(2)])
    cond = condition(4)
    together, _ = walk(model, ON[name], x, partial(_told, model, cond))
    for row in range(4):
        alone, _ = walk(model, ON[name], x[row : row + 1], partial(_told, model, cond[[row]]))
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)


def guided(model, config, *, batched=True, interval=(0.0, 1.0)):
    guide = guidance.classifier_free(
        model, condition(2), condition(1, 7), 3.0, batched=batched, interval=interval
    )
    return walk(model, config, noise(2), guide, steps=10)


@pytest.mark.parametrize("name", ON)
def test_branches_of_guidance_in_one_call_or_two_are_equal(name, model):
    one, first = guided(model, ON[name])
    two, second = guided(model, ON[name], batched=False)
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    assert (first.computed, first.reused) == (second.computed, second.reused)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", ON)
def test_guidance_that_rests_does_not_bring_back_what_is_old(name, batched, model):
    """A branch that is not asked for some steps starts with what those steps made of it."""
    options = {"batched": batched, "interval": (0.3, 0.8)}
    plain, _ = guided(model, None, **options)
    found, cache = guided(model, ON[name], **options)
    assert cache.reused > 0
    assert (found - plain).norm() < 0.3 * (plain - noise(2)).norm()


@pytest.mark.parametrize("name", ON)
def test_two_calls_of_a_step_with_the_same_words_do_not_share(name, model):
    """As those of a solver's two stages, or of guidance by given frames."""
    cond = condition(1)

    def predict(x, t):
        other = model(torch.full_like(x, 5.0), torch.ones_like(t), cond)
        assert other.shape == x.shape
        return model(x, t, cond)

    found, _ = walk(model, ON[name], noise(1), predict)
    alone, _ = walk(model, ON[name], noise(1), partial(_told, model, cond))
    # The other call comes first in every step, so this one is the second of its step throughout.
    assert torch.equal(found, alone)


def test_given_frames_do_not_hide_that_others_move():
    """Two of three frames are given: the change is that of the third, not a third of it."""
    old, new = torch.ones(1, 3, 4, 2), torch.ones(1, 3, 4, 2)
    new[:, 2] = 1.5
    frames = torch.tensor([[False, False, True]])
    assert relative_change(new, old, frames).item() == pytest.approx(0.5)
    assert relative_change(new, old, ~frames).item() == 0


@pytest.mark.parametrize("name", ON)
def test_the_level_is_that_of_the_frames_that_move(name, model):
    """With frames at 0 beside them, work is spared as without."""
    _, plain = walk(model, ON[name], noise(1))
    _, beside = walk(model, ON[name], noise(1), given=1)
    assert beside is not None and plain is not None and beside.reused > 0
    if name.startswith("pab"):
        assert (beside.computed, beside.reused) == (plain.computed, plain.reused)


def test_frames_that_wait_at_noise_do_not_move():
    """As in an autoregressive schedule: one is done, one moves, one waits. At first none moves."""
    t = torch.tensor([[0.0, 0.5, 1.0], [0.0, 1.0, 1.0]])
    assert moving(t).tolist() == [[False, True, False], [False, True, True]]
    assert inside(TeaCacheConfig(levels=(0.1, 0.9)), t) == [True, False]


def test_rows_at_other_levels_decide_by_themselves(model):
    levels = (0.0, 0.5)
    config = TeaCacheConfig(threshold=9, levels=levels)
    cond = condition(2)
    with torch.no_grad(), applied(model, config) as cache:
        for step in range(3):
            model(noise(2), torch.tensor([0.9, 0.4 - 0.1 * step]), cond)
            cache.tick()
    assert (cache.computed, cache.reused) == (4, 2)  # the first is never spared


def test_broadcast_computes_in_the_steps_that_its_kind_says():
    model = model_of("stdit")
    calls = {"spatial": 0, "temporal": 0, "cross": 0, "mlp": 0}

    def counting(kind):
        def hook(*_):
            calls[kind] += 1

        return hook

    for kind, layer in (
        ("spatial", model.spatial_blocks[0].attn.qkv),
        ("temporal", model.temporal_blocks[0].attn.qkv),
        ("cross", model.spatial_blocks[0].cross_attn.q_linear),
        ("mlp", model.spatial_blocks[2].mlp.fc1),
    ):
        layer.register_forward_hook(counting(kind))
    config = PyramidBroadcastConfig(
        spatial=BroadcastConfig(every=2, levels=ALL),
        temporal=BroadcastConfig(every=4, levels=ALL),
        cross=BroadcastConfig(every=6, levels=(0.0, 0.5)),
        mlp=BroadcastConfig(every=2, levels=ALL, blocks=3),
    )
    walk(model, config, noise(1), steps=12)
    # At level 1 all is computed, and kept from the next step on: 11 steps with something kept.
    assert calls["spatial"] == 1 + 6
    assert calls["temporal"] == 1 + 3
    assert calls["cross"] == 7 + 1  # levels 12/12 to 6/12, then the first of five
    assert calls["mlp"] == 12  # blocks 0, 1, 2 of six: spatial, temporal, spatial


def test_a_skipped_step_calls_no_block_and_the_first_pair_is_always_called():
    model, calls = model_of("stdit"), [0] * 6
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, n=number: calls.__setitem__(n, calls[n] + 1))
    _, tea = walk(model, TeaCacheConfig(threshold=1e9), noise(1))
    assert calls == [1] * 6  # level 1 is outside the levels, then nothing ever adds up
    assert tea is not None and (tea.computed, tea.reused) == (1, 7)
    calls[:] = [0] * 6
    walk(model, FirstBlockConfig(threshold=1e9), noise(1))
    assert calls == [8, 8, 1, 1, 1, 1]


def test_changes_add_up_until_the_threshold_and_are_rescaled():
    model, config = model_of("stdit"), TeaCacheConfig(threshold=0.2)
    _, once = walk(model, config, noise(1))
    twice = config.model_copy(update={"coefficients": (2.0, 0.0)})
    _, doubled = walk(model, twice, noise(1))
    _, halved = walk(model, config.model_copy(update={"threshold": 0.1}), noise(1))
    _, never = walk(model, config.model_copy(update={"coefficients": (0.0,)}), noise(1))
    assert once.computed < doubled.computed
    assert doubled.computed == halved.computed
    assert never.computed == 1


def test_training_and_gradients_are_refused():
    model = model_of("stdit").train()
    with pytest.raises(UsageError, match="eval mode"), applied(model, TeaCacheConfig()):
        pass
    model.eval()
    with applied(model, TeaCacheConfig()), pytest.raises(UsageError, match="no_grad"):
        model(noise(1), torch.ones(1), condition(1))
    with (
        applied(model, TeaCacheConfig()),
        pytest.raises(UsageError, match="one video at a time"),
        applied(model, TeaCacheConfig()),
    ):
        pass


def test_models_without_a_cache_and_too_shallow_ones_are_refused():
    with pytest.raises(UsageError, match="Linear has no step cache, only STDiT, MMDiT"):
        applied(nn.Linear(1, 1).eval(), TeaCacheConfig()).__enter__()
    shallow = STDiT(STDiTConfig(width=16, depth=1, num_heads=2, text_channels=8), in_channels=2)
    with pytest.raises(UsageError, match="no more: use teacache or pab"):
        applied(shallow.eval(), FirstBlockConfig()).__enter__()


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"kind": "teacash"}, "teacash"),
        ({"kind": "teacache", "thresholt": 1}, "threshold"),
        ({"kind": "teacache", "threshold": -1}, "threshold"),
        ({"kind": "teacache", "coefficients": []}, "coefficients"),
        ({"kind": "first_block", "levels": [0.7, 0.2]}, "low <= high"),
        ({"kind": "pab", "spatial": {"every": 0}}, "every"),
        ({"kind": "pab", "cross": {"levels": [0, 930]}}, "low <= high"),
    ],
)
def test_hostile_configs_are_refused_by_name(tree, told):
    with pytest.raises(UsageError, match=told):
        configs.validate(SamplingConfig, {"cache": tree}, where="sample")


def test_every_kind_is_in_the_table():
    from opensora.infer.caching.applied import CACHES

    schema = TypeAdapter(CacheConfig).json_schema()
    assert set(schema["discriminator"]["mapping"]) == set(CACHES)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_pipeline_draws_with_a_cache(sampler):
    pipeline = build_pipeline()
    tree = {"sampler": sampler, "schedule": {"num_steps": 6}}

    def drawn(cache):
        sampling = configs.validate(SamplingConfig, {**tree, "cache": cache}, where="sample")
        with FlopCounter() as counter:
            (sample,) = pipeline(["a red circle"], sampling=sampling)
        return sample.frames.astype(int), counter.total

    plain, whole = drawn(None)
    off, same = drawn({"kind": "teacache", "threshold": 0})
    found, less = drawn({"kind": "teacache", "threshold": 0.4})
    assert (off == plain).all() and same == whole
    assert less < 0.9 * whole
    assert 0 < abs(found - plain).mean() < 16
    assert "forward" not in vars(pipeline.model)
