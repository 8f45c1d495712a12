"""MMDiT: a level for every frame, exact masks of text, and FLUX where there is one level."""

import pydantic
import pytest
import torch
from torch.testing import assert_close

from opensora.models.mmdit import MMDiT, MMDiTConfig, level_of_text
from opensora.ops.positions import rotary_phases, rotate
from opensora.types import Condition

TINY = {
    "width": 16,
    "depth": 1,
    "single_depth": 2,
    "num_heads": 2,
    "rope": (4, 2, 2),
    "text_channels": 6,
    "pooled_channels": 0,
}

EXACT = {"rtol": 0.0, "atol": 1e-11}
"""float64 sums of at most 64 products in another order, through 3 blocks of 2 residual branches,
each of values up to some 100 with these weights: 64 * 6 * 100 * 2.2e-16 = 1e-11 at worst."""


def build(*, random: bool = True, **changes) -> MMDiT:
    """A tiny model in float64; `random` gives every parameter a value, none of them zero."""
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig(**(TINY | changes)), in_channels=3).double()
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
    )
    levels = torch.rand(batch, frames, generator=generator, dtype=torch.float64)
    return normal(batch, 3, frames, height, width), levels, condition


def without_attention(model: MMDiT) -> MMDiT:
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    return model


def moved_frames(model: MMDiT, t, other) -> torch.Tensor:
    """How far each frame moves between two tables of levels."""
    x, _, condition = draw()
    with torch.no_grad():
        moved = model(x, other, condition) - model(x, t, condition)
    return moved.abs().amax(dim=(0, 1, 3, 4))


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


def test_without_attention_a_frame_feels_its_own_level_only():
    _, t, _ = draw()
    given = t.clone()
    given[:, 1] = 0
    moved = moved_frames(without_attention(build()), t, given)
    assert moved[1] > 1e-3
    assert moved[[0, 2]].tolist() == [0, 0]


def test_through_attention_all_frames_feel_it():
    _, t, _ = draw()
    given = t.clone()
    given[:, 1] = 0
    assert (moved_frames(build(), t, given) > 1e-6).all()


def test_text_has_the_mean_level_of_the_frames_in_the_making():
    t = torch.tensor([[0.0, 0.4, 0.8], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]])
    assert_close(level_of_text(t), torch.tensor([[0.6], [0.5], [0.0]]))


def test_every_token_sees_every_other():
    model = build()
    x, t, condition = draw(batch=1)
    x.requires_grad_()
    model(x, t, condition)[0, :, 0, 0, 0].sum().backward()
    assert (x.grad[0].abs().sum(dim=0) > 1e-12).all()


def test_order_of_frames_and_places_in_the_picture_matter():
    model = build()
    x, t, condition = draw()
    t = t[:, :1].expand(-1, 3)
    with torch.no_grad():
        out = model(x, t, condition)
        for dim in (2, 3, 4):
            assert not torch.allclose(model(x.flip(dim), t, condition).flip(dim), out)


def test_places_count_by_their_distance():
    phases = rotary_phases(torch.tensor([[0.0, 0, 0], [1, 2, 3], [5, 1, 0], [6, 3, 3]]), (4, 2, 2))
    q = torch.randn(1, 1, 1, 8).expand(1, 4, 1, 8)
    turned = rotate(q, phases)[0, :, 0]
    assert_close(turned[0] @ turned[1], turned[2] @ turned[3])
    assert not torch.allclose(turned[0] @ turned[2], turned[2] @ turned[3])


def test_a_sample_does_not_feel_its_batch():
    model = build(pooled_channels=7)
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
        for text in (tokens, hidden):
            longer = Condition(text, mask, fps=condition.fps)
            assert_close(model(x, t, longer), out, **EXACT)


@pytest.mark.parametrize("name", ["tokens", "pooled", "fps"])
def test_every_condition_has_its_say(name):
    model = build(pooled_channels=7)
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
    assert build()(x, t, bare).isfinite().all()
    with pytest.raises(ValueError, match="5x6 do not divide into patches of 2x2"):
        build()(torch.zeros(2, 3, 1, 5, 6), t, bare)


@pytest.mark.parametrize("size", [(1, 2, 2), (5, 4, 6), (2, 8, 2)])
def test_one_model_takes_any_length_and_size(size):
    frames, height, width = size
    x, t, condition = draw(frames=frames, height=height, width=width)
    assert build()(x, t, condition).shape == x.shape


@pytest.mark.parametrize("depth", [0, 1])
def test_gradients_reach_every_parameter(depth):
    model = build(pooled_channels=7, depth=depth, single_depth=1)
    x, t, condition = draw()
    model(x, t, condition).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_a_fresh_model_comes_alive_within_four_steps():
    """The output, then the modulation before it, then gates: zeros shield what lies behind them for
    a step each."""
    model = build(random=False)
    x, t, condition = draw()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    silent = []
    for _ in range(4):
        optimizer.zero_grad()
        (model(x, t, condition) - x).square().mean().backward()
        silent.append(sum(not p.grad.any() for p in model.parameters()))
        optimizer.step()
    assert silent[0] == len(list(model.parameters())) - 2
    assert silent[-1] == 0


def test_gradients_are_those_of_finite_differences():
    model = build(width=8, rope=(0, 2, 2))
    x, t, condition = draw(batch=1, frames=2, height=2, width=2)
    tokens = condition.tokens.requires_grad_()

    def predict(x, tokens):
        return model(x, t, Condition(tokens, condition.mask))

    assert torch.autograd.gradcheck(predict, (x.requires_grad_(), tokens), atol=1e-6)


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


def test_pairs_are_neighbours_of_a_kind_and_all_blocks_in_order():
    model = build(depth=3, single_depth=4)
    assert [len(pair) for pair in model.pairs] == [2, 1, 2, 2]
    assert [block for pair in model.pairs for block in pair] == model.blocks


def test_the_defaults_are_as_large_as_open_sora_2():
    """11.89e9, counted from the published layout; blocks of 339.8e6 and 141.6e6."""
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig(), in_channels=16)
    counts = {type(b).__name__: sum(p.numel() for p in b.parameters()) for b in model.blocks}
    width, head = 3072, 128
    # A stream: q, k, v, proj, six modulations and an MLP of 8 matrices; the single one has three.
    assert counts["DoubleBlock"] == 2 * (18 * width**2 + (4 + 6 + 5) * width + 2 * head)
    assert counts["SingleBlock"] == 15 * width**2 + (4 + 3 + 5) * width + 2 * head
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(11.89e9, rel=2e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "width 16 needs to be a multiple of num_heads"),
        ({"rope": (4, 4, 4)}, r"rope \[4, 4, 4\] needs even numbers whose sum .* 16 / 2 = 8"),
        ({"rope": (3, 3, 2)}, "needs even numbers"),
        ({"patch": (2, 2, 2)}, "noise levels are per frame"),
        ({"single_depth": 0}, "greater than or equal to 1"),
        ({"heads": 2}, "Extra inputs"),
    ],
)
def test_models_that_cannot_be_built_are_refused(changes, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        MMDiTConfig(**(TINY | changes))


def flux_weights(ours: MMDiT) -> tuple[dict, dict]:
    """Weights of the first double and single block under the names of diffusers' FLUX."""
    double, single = {}, {}
    attention = {"q": "to_q", "k": "to_k", "v": "to_v", "q_norm": "norm_q", "k_norm": "norm_k"}
    added = {"q": "add_q_proj", "k": "add_k_proj", "v": "add_v_proj"}
    added |= {"q_norm": "norm_added_q", "k_norm": "norm_added_k", "proj": "to_add_out"}
    names = {f"attn.{k}": f"attn.{v}" for k, v in (attention | {"proj": "to_out.0"}).items()}
    names |= {f"text_attn.{k}": f"attn.{v}" for k, v in added.items()}
    names |= {"mod": "norm1.linear", "text_mod": "norm1_context.linear"}
    names |= {"mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
    names |= {"text_mlp.fc1": "ff_context.net.0.proj", "text_mlp.fc2": "ff_context.net.2"}
    for name, value in ours.double_blocks[0].state_dict().items():
        module, _, kind = name.rpartition(".")
        double[f"{names[module]}.{kind}"] = value
    names = {f"attn.{k}": f"attn.{v}" for k, v in attention.items()}
    names |= {"mod": "norm.linear", "mlp.fc1": "proj_mlp"}
    weights = ours.single_blocks[0].state_dict()
    ends = ("attn.proj", "mlp.fc2")
    attended, worked = ([weights.pop(f"{n}.{k}") for k in ("weight", "bias")] for n in ends)
    single["proj_out.weight"] = torch.cat([attended[0], worked[0]], dim=1)
    single["proj_out.bias"] = attended[1] + worked[1]
    for name, value in weights.items():
        module, _, kind = name.rpartition(".")
        single[f"{names[module]}.{kind}"] = value
    return double, single


def test_a_double_and_a_single_block_are_those_of_flux():
    """diffusers' FLUX on the same random weights, at one level for all frames; float64."""
    flux = pytest.importorskip("diffusers.models.transformers.transformer_flux")
    model = build(depth=1, single_depth=1, width=48, rope=(8, 8, 8))
    x, _, condition = draw()
    condition.mask[:] = True  # FLUX has no mask
    stream = model.enter(x, torch.tensor([0.3, 0.8]).double(), condition)
    ids = torch.cat([torch.zeros(5, 3), torch.cartesian_prod(*map(torch.arange, (3, 2, 3)))])
    rotary = flux.FluxPosEmbed(10_000, (8, 8, 8))(ids)
    theirs = flux.FluxTransformerBlock(48, 2, 24), flux.FluxSingleTransformerBlock(48, 2, 24)
    # Their blocks apply the activation, ours get it applied.
    level = stream.level[:, 0]
    double, single = flux_weights(model)
    for block, weights in zip(theirs, (double, single), strict=True):
        block.double().load_state_dict(weights)
        for module in block.modules():
            if isinstance(module, torch.nn.SiLU):
                module.forward = lambda x: x
    text, video = stream.text, stream.tokens.flatten(1, 2)
    rest = (stream.mask, stream.level, stream.places)
    with torch.no_grad():
        for block, ours in zip(theirs, model.blocks, strict=True):
            words, seen = block(video, text, level, image_rotary_emb=rotary)
            tokens, mine = ours(video.view(2, 3, 6, 48), text, *rest)
            # Phases of ours are float32: 6e-8 of angles of up to 3, through sums of 48 products.
            assert_close(tokens.flatten(1, 2), seen, rtol=1e-5, atol=1e-5)
            assert_close(mine, words, rtol=1e-5, atol=1e-5)
            video, text = seen, words
