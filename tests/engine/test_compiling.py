"""Compiled blocks compute what the blocks compute, whatever came before."""

import itertools
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from opensora.engine import compiling, recompute
from opensora.engine.recompute import RecomputeConfig
from opensora.errors import UsageError
from opensora.models.mmdit import MMDiT, MMDiTConfig
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.types import Condition

# The compiler hides warnings of its own making, which it cannot where they are errors.
pytestmark = pytest.mark.filterwarnings("default")
CPU = torch.device("cpu")
SIZES = {"width": 24, "depth": 2, "num_heads": 2, "text_channels": 6}
CONFIG = STDiTConfig(**SIZES, window=(2, 2))
FULL = MMDiTConfig(**SIZES, single_depth=2, rope=(4, 4, 4), pooled_channels=0)


def model(config=CONFIG) -> STDiT | MMDiT:
    torch.manual_seed(0)
    made = (MMDiT if config is FULL else STDiT)(config, in_channels=3)
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def inputs(batch: int, words: int):
    generator = torch.Generator().manual_seed(batch * 100 + words)
    mask = torch.ones(batch, words, dtype=torch.bool)
    mask[0, words // 2 + 1 :] = False
    return (
        torch.randn(batch, 3, 2, 8, 8, generator=generator),
        torch.rand(batch, 2, generator=generator),
        Condition(torch.randn(batch, words, 6, generator=generator), mask, fps=torch.ones(batch)),
    )


def gradients(of: STDiT | MMDiT, batch: int, words: int) -> dict[str, torch.Tensor]:
    of.zero_grad()
    output = of(*inputs(batch, words))
    output.square().sum().backward()
    found = {n: p.grad for n, p in of.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **found}


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("config", [CONFIG, FULL], ids=lambda config: config.kind)
def test_blocks_of_a_kind_share_a_graph_that_serves_every_length_of_text(config):
    plain, compiled, backend = model(config), model(config), Counting()
    compiling.apply(compiled.blocks, backend=backend)
    for words in (5, 9, 3):
        theirs, mine = gradients(plain, 2, words), gradients(compiled, 2, words)
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert_close(mine[name], value, rtol=1e-4, atol=1e-5)
    assert backend.graphs == 2  # the spatial and the temporal kind, or double and single ones


@pytest.mark.parametrize("policy", ["block", "pair", "selective"])
def test_tiles_of_compiled_blocks_are_compiled_and_the_same(policy):
    plain, compiled, backend = model(), model(), Counting()
    saving = RecomputeConfig(policy=policy, tiles=2)
    recompute.apply(
        compiled, saving, compile_blocks=lambda blocks: compiling.apply(blocks, backend=backend)
    )
    theirs, mine = gradients(plain, 2, 5), gradients(compiled, 2, 5)
    for name, value in theirs.items():
        assert_close(mine[name], value, rtol=1e-4, atol=1e-5)
    assert backend.graphs >= 2
    with torch.no_grad():
        assert_close(compiled(*inputs(2, 5)), theirs["output"], rtol=1e-4, atol=1e-5)


def test_without_gradients_nothing_is_compiled_and_names_stay():
    plain, compiled, backend = model(), model(), Counting()
    compiling.apply(compiled.blocks, backend=backend)
    with torch.no_grad():
        assert torch.equal(plain(*inputs(2, 5)), compiled(*inputs(2, 5)))
    assert backend.graphs == 0
    assert compiled.state_dict().keys() == plain.state_dict().keys()


class Block(nn.Module):
    """As little as has both kinds of shapes in it."""

    varying_dims: ClassVar = {"text": 1}

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, text):
        return x + functional.gelu(self.layer(x)) * text.softmax(1).mean(1, keepdim=True)


@pytest.mark.skipif(compiling.missing(CPU) is not None, reason="no C++ compiler")
def test_what_is_computed_does_not_depend_on_which_shapes_came_first():
    shapes = [(2, 5), (3, 4), (2, 1)]
    torch.manual_seed(0)
    x, text, block = torch.randn(3, 4, 8), torch.randn(3, 5, 8), Block()
    weight = block.layer.weight

    def results(batch, words):
        output = block(x[:batch], text[:batch, :words])
        return output, torch.autograd.grad(output.square().sum(), weight)[0]

    plain = {shape: results(*shape) for shape in shapes}
    found: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    forward = block.forward
    for order in (shapes, shapes[::-1]):
        torch._dynamo.reset()
        block.forward = forward
        compiling.apply([block])
        for shape, _ in itertools.product(order, range(2)):
            mine = results(*shape)
            for value, expected in zip(mine, plain[shape], strict=True):
                assert_close(value, expected, rtol=1e-5, atol=1e-6)
            for value, before in zip(mine, found.setdefault(shape, mine), strict=True):
                assert torch.equal(value, before)


def test_auto_leaves_the_cpu_alone_and_always_needs_a_compiler(monkeypatch):
    assert not compiling.choose("auto", CPU)
    assert not compiling.choose("never", CPU)
    monkeypatch.setattr(compiling, "missing", lambda device: "a C++ compiler")
    with pytest.raises(UsageError, match=r"compile=always needs a C\+\+ compiler"):
        compiling.choose("always", CPU)
    assert not compiling.choose("auto", torch.device("cuda"))
    monkeypatch.setattr(compiling, "missing", lambda device: None)
    assert compiling.choose("always", CPU)
    assert compiling.choose("auto", torch.device("cuda"))


def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    from torch._inductor.exc import InvalidCxxCompiler

    def fail():
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", fail)
    assert "C++ compiler" in (compiling.missing(CPU) or "")
