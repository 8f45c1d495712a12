"""Recomputing, tiling and offloading change what is kept and never what is computed."""

import functools
import itertools

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from opensora.engine import recompute
from opensora.engine.flops import FlopCounter, rehearsal
from opensora.engine.footprint import LiveMemory
from opensora.engine.recompute import ATTENTION, RecomputeConfig
from opensora.errors import UsageError
from opensora.models.mmdit import MMDiT, MMDiTConfig
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.types import Condition

POLICIES = ["none", "block", "pair", "selective"]


def build(window=(2, 2)) -> STDiT | MMDiT:
    torch.manual_seed(0)
    sizes = {"width": 24, "num_heads": 2, "text_channels": 6}
    if window == "mmdit":
        config = MMDiTConfig(**sizes, depth=2, single_depth=3, rope=(4, 4, 4), pooled_channels=0)
        model = MMDiT(config, in_channels=3).double()
    else:
        config = STDiTConfig(**sizes, depth=2, window=window)
        model = STDiT(config, in_channels=3).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs():
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    fps = torch.ones(2, dtype=torch.float64)
    return draw(2, 3, 3, 8, 6), torch.rand(2, 3).double(), Condition(draw(2, 4, 6), mask, fps=fps)


class Watching(TorchDispatchMode):
    """Counts calls of attention."""

    def __init__(self):
        super().__init__()
        self.attended = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.attended += str(function.overloadpacket) in ATTENTION
        return function(*args, **(kwargs or {}))


def step(model, given):
    """Output, gradients, bytes kept for the backward pass, calls of attention."""
    kept: dict[int, int] = {}

    def pack(value):
        kept[value.data_ptr()] = value.nbytes
        return value

    with Watching() as watching:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            out = model(*given)
        out.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return out.detach(), gradients, sum(kept.values()), watching.attended


@pytest.mark.parametrize("window", [None, (2, 2), "mmdit"], ids=str)
@pytest.mark.parametrize(
    ("policy", "tiles", "offload"),
    [way for way in itertools.product(POLICIES, [1, 3], [False, True]) if way[:2] != ("none", 3)],
)
def test_no_policy_changes_a_value(policy, tiles, offload, window):
    if (policy, tiles, window) == ("selective", 3, "mmdit"):
        with pytest.raises(UsageError, match=r"sees everything at once.*recompute\.policy=block"):
            recompute.apply(build(window), RecomputeConfig(policy=policy, tiles=tiles))
        return
    given = inputs()
    out, gradients, _, _ = step(build(window), given)
    model = build(window)
    recompute.apply(model, RecomputeConfig(policy=policy, tiles=tiles, offload=offload))
    found, found_gradients, _, _ = step(model, given)
    assert_close(found, out, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients.items():
        assert_close(found_gradients[name], gradient, rtol=1e-10, atol=1e-10, msg=name)
    with torch.no_grad():
        assert_close(model(*given), out, rtol=1e-12, atol=1e-12)


def test_each_policy_keeps_less_than_the_one_before():
    kept, attended = {}, {}
    for policy in POLICIES:
        model = build()
        recompute.apply(model, RecomputeConfig(policy=policy))
        _, _, kept[policy], attended[policy] = step(model, inputs())
    assert kept["pair"] < kept["block"] < kept["none"] / 3
    # Two pairs of blocks attend to themselves and to the text: eight calls, and again.
    assert attended["none"] == attended["selective"] == 8
    assert attended["block"] == attended["pair"] == 16


@functools.cache
def flops(saving: RecomputeConfig, depth: int = 2) -> tuple[int, int]:
    """Of a forward pass and of a training step, with a single word of text."""
    config = STDiTConfig(width=24, depth=depth, num_heads=2, text_channels=6)
    model = STDiT(config, in_channels=3)
    recompute.apply(model, saving)
    cond = Condition(torch.zeros(1, 1, 6), torch.ones(1, 1, dtype=torch.bool))
    given = torch.zeros(1, 3, 6, 16, 16), torch.zeros(1, 6), cond
    with FlopCounter() as counter:
        with torch.no_grad():
            model(*given)
        forward = counter.total
        model(*given).sum().backward()
    return forward, counter.total - forward


@pytest.mark.parametrize(
    ("policy", "tiles", "times"),
    [("block", 1, 1), ("block", 3, 1), ("pair", 1, 1), ("pair", 3, 1.58)],
)
def test_what_is_computed_again_is_what_the_policy_says(policy, tiles, times):
    """A tile is computed once more, and the first block of a pair (more than half of it, since a
    frame has more tokens than there are frames) once more than that."""
    plain = RecomputeConfig()
    _, step = flops(RecomputeConfig(policy=policy, tiles=tiles))
    pair_of_blocks = flops(plain)[0] - flops(plain, depth=1)[0]
    again = (step - flops(plain)[1]) / (2 * pair_of_blocks)
    # Keys of the text are made for every tile, and the final layer is computed again in tiles.
    assert again == pytest.approx(times, abs=0.03)


@pytest.mark.parametrize("window", [None, (2, 2)], ids=str)
@pytest.mark.parametrize("policy", ["block", "pair"])
def test_under_autocast_tiles_round_as_the_whole_does(policy, window):
    def gradients(saving):
        model = build(window).float()
        recompute.apply(model, saving)
        x, t, cond = inputs()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x.float(), t.float(), cond.to("cpu", torch.float32))
            assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        return out.detach(), {name: p.grad for name, p in model.named_parameters()}

    out, expected = gradients(RecomputeConfig())
    tiled, found = gradients(RecomputeConfig(policy=policy, tiles=3))
    assert torch.equal(tiled, out)
    for name, gradient in expected.items():
        # Gradients of the whole are rounded to 8 bits, those of tiles before they are added up.
        assert (found[name] - gradient).norm() < 2**-7 * gradient.norm(), name


def test_the_stream_is_as_narrow_as_the_products():
    model, seen = build().float(), set()
    for block in model.blocks:
        block.register_forward_hook(lambda block, given, out: seen.add((given[0].dtype, out.dtype)))
    x, t, cond = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        model(x.float(), t.float(), cond.to("cpu", torch.float32))
    assert seen == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize(("window", "frames"), [(None, 16), ((2, 2), 16), (None, 2)], ids=str)
def test_within_a_block_in_tiles_few_things_are_as_large_as_its_tokens(window, frames):
    """Input and output forward; with their gradients, and a tile's inside, backward."""
    config = STDiTConfig(width=96, depth=1, num_heads=2, text_channels=6, window=window)
    with rehearsal(torch.device("cpu")), LiveMemory() as memory:
        model = STDiT(config, in_channels=3)
        recompute.apply(model, RecomputeConfig(policy="block", tiles=16))
        cond = Condition(torch.empty(1, 4, 6), torch.ones(1, 4, dtype=torch.bool))
        stream = model.enter(torch.empty(1, 3, frames, 256, 256), torch.rand(1, frames), cond)
        tokens = stream.tokens.detach().requires_grad_()
        block, size = model.temporal_blocks[0], stream.tokens.nbytes
        rest = (stream.text.detach(), stream.mask, stream.modulation.detach(), stream.places)
        before, _ = memory.live, memory.reset()
        out = block(tokens, *rest)
        forward = (memory.peak - before) / size
        gradient = torch.empty_like(out)
        memory.reset()
        out.backward(gradient)
        backward = (memory.peak - before) / size
    # Some 30 tensors of a tile, each a 16th: the output, then its gradient and the input's.
    assert 1 < forward < 1 + 30 / 16
    assert 3 < backward < 3 + 60 / 16


def test_tiles_without_a_policy_are_refused():
    with pytest.raises(ValueError, match=r"tiles=4 needs a policy.*recompute\.policy=block"):
        RecomputeConfig(tiles=4)


def test_so_it_does_in_a_model_of_full_attention():
    kept, attended = {}, {}
    for policy in POLICIES:
        model = build("mmdit")
        recompute.apply(model, RecomputeConfig(policy=policy))
        _, _, kept[policy], attended[policy] = step(model, inputs())
    assert kept["pair"] < kept["block"] < kept["none"] / 2
    assert attended == {"none": 5, "selective": 5, "block": 10, "pair": 10}


def test_names_of_parameters_stay():
    model = build()
    recompute.apply(model, RecomputeConfig(policy="pair", tiles=2))
    assert model.state_dict().keys() == build().state_dict().keys()
