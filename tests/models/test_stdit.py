"""STDiT: a level for every frame, and a sample's result that depends on nothing but itself."""

import pydantic
import pytest
import torch
from torch.testing import assert_close

from opensora.models.stdit import STDiT, STDiTConfig
from opensora.types import Condition

TINY = {"width": 16, "depth": 2, "num_heads": 2, "text_channels": 6, "base_size": 4}

EXACT = {"rtol": 0.0, "atol": 1e-11}
"""float64 sums of at most 64 products in another order, through 4 blocks of 3 residual branches,
each of values up to some 100 with these weights: 64 * 12 * 100 * 2.2e-16 = 2e-11 at worst."""


def build(*, random: bool = True, **changes) -> STDiT:
    """A tiny model in float64; `random` gives every parameter a value, none of them zero."""
    torch.manual_seed(0)
    model = STDiT(STDiTConfig(**(TINY | changes)), in_channels=3).double()
    if random:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def draw(batch: int = 2, frames: int = 3, height: int = 4, width: int = 6, seed: int = 0):
    """(latents, levels, condition) of a batch whose rows all differ."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = torch.arange(5)[None] < torch.tensor([5, 2, 3, 1])[:batch, None]
    condition = Condition(
        tokens=normal(batch, 5, 6),
        mask=mask,
        pooled=normal(batch, 7),
        fps=torch.linspace(8, 24, batch),
        size=torch.linspace(64, 512, 2 * batch).view(batch, 2),
    )
    levels = torch.rand(batch, frames, generator=generator, dtype=torch.float64)
    return normal(batch, 3, frames, height, width), levels, condition


def test_a_fresh_model_predicts_zero():
    x, t, condition = draw()
    assert not build(random=False)(x, t, condition).any()


def test_a_level_a_clip_is_that_level_for_each_frame():
    model = build()
    x, t, condition = draw()
    with torch.no_grad():
        each = model(x, t[:, :1].expand(-1, 3), condition)
        assert torch.equal(model(x, t[:, 0], condition), each)
        assert not torch.allclose(model(x, t, condition), each)


def test_without_temporal_mixing_a_frame_feels_its_own_level_only():
    model = build()
    for block in model.temporal_blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    x, t, condition = draw()
    given = t.clone()
    given[:, 1] = 0
    with torch.no_grad():
        moved = (model(x, given, condition) - model(x, t, condition)).abs().amax(dim=(0, 1, 3, 4))
    assert moved[1] > 1e-3
    assert moved[[0, 2]].tolist() == [0, 0]


def test_frames_know_their_number_where_time_is_absolute():
    """Without temporal mixing, equal frames at equal levels are told apart by their number only."""
    x, t, condition = draw()
    x, t = x[:, :, :1].expand(-1, -1, 3, -1, -1), t[:, :1].expand(-1, 3)
    for absolute in (False, True):
        model = build(absolute_time=absolute)
        for block in model.temporal_blocks:
            torch.nn.init.zeros_(block.attn.proj.weight)
        with torch.no_grad():
            frames = model(x, t, condition).unbind(2)
            assert torch.allclose(frames[0], frames[2]) is not absolute
            longer = model(x.repeat(1, 1, 2, 1, 1), t.repeat(1, 2), condition)
        assert_close(longer[:, :, 2], frames[2], **EXACT)  # the code does not stretch


def test_through_temporal_attention_other_frames_feel_it_too():
    model = build()
    x, t, condition = draw()
    given = t.clone()
    given[:, 1] = 0
    with torch.no_grad():
        moved = (model(x, given, condition) - model(x, t, condition)).abs().amax(dim=(0, 1, 3, 4))
    assert (moved > 1e-6).all()


@pytest.mark.parametrize(
    ("window", "rows", "columns"),
    [(None, 2, 2), ((2, 2), 4, 4), ((1, 3), 2, 6), ((2, 4), 4, 6), ((9, 9), 8, 12)],
)
def test_temporal_blocks_see_all_frames_of_a_location_or_of_a_window(window, rows, columns):
    """`rows` x `columns` latent positions around the first; tokens are 2 x 2, the grid 4 x 6."""
    model = build(window=window, num_heads=2)
    for block in model.spatial_blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    x, t, condition = draw(batch=1, height=8, width=12)
    x.requires_grad_()
    model(x, t, condition)[0, :, 0, 0, 0].sum().backward()
    reached = x.grad[0].abs().sum(dim=0) > 1e-12
    expected = torch.zeros(3, 8, 12, dtype=torch.bool)
    expected[:, :rows, :columns] = True
    assert torch.equal(reached, expected)


@pytest.mark.parametrize("window", [None, (2, 3)])
def test_order_of_frames_and_places_in_the_picture_matter(window):
    model = build(window=window)
    x, t, condition = draw()
    t = t[:, :1].expand(-1, 3)
    with torch.no_grad():
        out = model(x, t, condition)
        for dim in (2, 3, 4):
            assert not torch.allclose(model(x.flip(dim), t, condition).flip(dim), out)


@pytest.mark.parametrize("window", [None, (2, 2)])
def test_a_sample_does_not_feel_its_batch(window):
    model = build(pooled_channels=7, condition_on_size=True, window=window)
    x, t, condition = draw(batch=4)
    with torch.no_grad():
        together = model(x, t, condition)
        order = [2, 0, 3, 1]
        assert_close(model(x[order], t[order], condition[order]), together[order], **EXACT)
        for row in range(4):
            alone = slice(row, row + 1)
            assert_close(model(x[alone], t[alone], condition[alone]), together[alone], **EXACT)


def test_padding_of_the_text_changes_nothing():
    model = build()
    x, t, condition = draw()
    tokens = torch.cat([condition.tokens, torch.full((2, 4, 6), 1e3)], dim=1).double()
    mask = torch.cat([condition.mask, torch.zeros(2, 4, dtype=torch.bool)], dim=1)
    hidden = tokens.masked_fill(~mask[..., None], -50.0)
    with torch.no_grad():
        out = model(x, t, condition)
        assert_close(model(x, t, Condition(hidden, mask)), model(x, t, Condition(tokens, mask)))
        longer = Condition(tokens, mask, fps=condition.fps)
        assert_close(model(x, t, longer), out, **EXACT)


@pytest.mark.parametrize("name", ["tokens", "pooled", "fps", "size"])
def test_every_condition_has_its_say(name):
    model = build(pooled_channels=7, condition_on_size=True)
    x, t, condition = draw()
    other = condition.map(lambda value: value)
    object.__setattr__(other, name, getattr(condition, name) * 1.5 + 1)
    with torch.no_grad():
        moved = model(x, t, other) - model(x, t, condition)
    assert (moved.abs().amax(dim=(1, 2, 3, 4)) > 1e-4).all()


def test_a_missing_condition_is_refused():
    x, t, condition = draw()
    bare = Condition(condition.tokens, condition.mask)
    with pytest.raises(ValueError, match=r"cond\.pooled is None"):
        build(pooled_channels=7)(x, t, bare)
    with pytest.raises(ValueError, match=r"cond\.size is None"):
        build(condition_on_size=True)(x, t, bare)
    assert build()(x, t, bare).isfinite().all()


@pytest.mark.parametrize("size", [(1, 2, 2), (5, 4, 6), (2, 8, 2)])
def test_one_model_takes_any_length_and_size(size):
    frames, height, width = size
    x, t, condition = draw(frames=frames, height=height, width=width)
    assert build()(x, t, condition).shape == x.shape


@pytest.mark.parametrize("window", [None, (2, 2)])
def test_gradients_reach_every_parameter(window):
    model = build(pooled_channels=7, condition_on_size=True, window=window)
    x, t, condition = draw()
    model(x, t, condition).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_a_fresh_model_comes_alive_within_three_steps():
    """Zero outputs and zero residual branches shield what lies behind them for a step each."""
    model = build(random=False)
    x, t, condition = draw()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    silent = []
    for _ in range(3):
        optimizer.zero_grad()
        (model(x, t, condition) - x).square().mean().backward()
        silent.append(sum(not p.grad.any() for p in model.parameters()))
        optimizer.step()
    assert silent[0] == len(list(model.parameters())) - 2
    assert silent[-1] == 0


def test_gradients_are_those_of_finite_differences():
    model = build(depth=1, width=8)
    x, t, condition = draw(batch=1, frames=2, height=2, width=2)
    tokens = condition.tokens.requires_grad_()

    def predict(x, tokens):
        return model(x, t, Condition(tokens, condition.mask))

    assert torch.autograd.gradcheck(predict, (x.requires_grad_(), tokens), atol=1e-6)


def test_training_fits_what_it_is_shown():
    torch.manual_seed(0)
    model = STDiT(STDiTConfig(**(TINY | {"depth": 1})), in_channels=3)
    x, t, condition = draw()
    x, t, condition = x.float(), t.float(), condition.to("cpu", torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = (model(x, t, condition) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_bfloat16_autocast_stays_near_float32():
    model = build(pooled_channels=7).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, condition = draw()
    x, t, condition = x.float(), t.float(), condition.to("cpu", torch.float32)
    with torch.no_grad():
        exact = model(x, t, condition)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(x, t, condition)
    # 8 bits of mantissa, through some dozen layers.
    assert (rounded - exact).norm() < 12 * 2**-8 * exact.norm()


def test_blocks_alternate_in_the_order_of_use():
    model = build(depth=3)
    assert [block.temporal for block in model.blocks] == [False, True] * 3
    assert len({id(block) for block in model.blocks}) == 6


def test_the_defaults_are_as_large_as_stdit3_xl():
    """1.21e9, counted from the published layout; less its variance channels and null text."""
    with torch.device("meta"):
        model = STDiT(STDiTConfig(), in_channels=4)
    # qkv 3, proj 1, q 1, kv 2, proj 1, MLP 8 matrices; their biases and six shifts and scales;
    # two norms of a head's 72 features.
    block = 16 * 1152**2 + (8 + 5 + 6) * 1152 + 2 * 72
    assert all(sum(p.numel() for p in b.parameters()) == block for b in model.blocks)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.21e9, rel=5e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, r"width 16 needs to be num_heads \(3\) times an even number"),
        ({"width": 18, "num_heads": 3}, "divisible by 4"),
        ({"num_heads": 4, "window": (2, 2)}, "6 features or more"),
        ({"patch": (2, 2, 2)}, "noise levels are per frame"),
        ({"depth": 0}, "greater than or equal to 1"),
        ({"heads": 2}, "Extra inputs"),
    ],
)
def test_models_that_cannot_be_built_are_refused(changes, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        STDiTConfig(**(TINY | changes))
