"""Recomputing, tiling and offloading change what is kept and never what is computed."""

import itertools

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from opensora.engine import recompute
from opensora.engine.recompute import ATTENTION, RecomputeConfig
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.types import Condition

POLICIES = ["none", "block", "pair", "selective"]


def build(window=(2, 2)) -> STDiT:
    torch.manual_seed(0)
    config = STDiTConfig(width=24, depth=2, num_heads=2, text_channels=6, window=window)
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


@pytest.mark.parametrize("window", [None, (2, 2)], ids=str)
@pytest.mark.parametrize(
    ("policy", "tiles", "offload"), [*itertools.product(POLICIES, [1, 3], [False, True])]
)
def test_no_policy_changes_a_value(policy, tiles, offload, window):
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


def test_names_of_parameters_stay():
    model = build()
    recompute.apply(model, RecomputeConfig(policy="pair", tiles=2))
    assert model.state_dict().keys() == build().state_dict().keys()
