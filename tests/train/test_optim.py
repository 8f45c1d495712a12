"""Optimizers: Muon's iteration as a polynomial, Muon as torch's, schedules and groups."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from opensora.train import optim
from opensora.train.optim import (
    AdamWConfig,
    Muon,
    MuonConfig,
    ScheduleConfig,
    orthogonalise,
    split_parameters,
)


def polynomial(x: torch.Tensor, steps: int) -> torch.Tensor:
    """What the iteration does to one singular value."""
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (8, 2), (1, 4)])
def test_orthogonalising_applies_a_polynomial_to_the_singular_values(shape):
    torch.manual_seed(0)
    matrices = torch.randn(2, *shape, dtype=torch.float64)
    for steps in (1, 5):
        found = orthogonalise(matrices, steps)
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        relative = s / (matrices.square().sum((1, 2)).sqrt()[:, None] + 1e-7)
        expected = u @ torch.diag_embed(polynomial(relative, steps)) @ vh
        assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_five_steps_bring_singular_values_near_one():
    relative = torch.logspace(-2, 0, 20_000, dtype=torch.float64)
    found = polynomial(relative, 5)
    assert float(found.min()) > 0.68
    assert float(found.max()) < 1.21


def parameters(seed: int, *shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def descend(optimizer, params, steps: int = 4) -> None:
    """Steps on gradients that are fixed by their number."""
    for step in range(steps):
        for number, p in enumerate(params):
            generator = torch.Generator().manual_seed(100 * step + number)
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


SHAPES = ((6, 4), (4, 6), (5, 5), (6, 4))


def test_muon_is_torchs_muon_where_their_iterations_agree(monkeypatch):
    """Momentum, Nesterov, rate by shape and decoupled decay; torch iterates in bfloat16."""
    from torch.optim import _muon

    def iterate(grad, coefficients, steps, eps):
        assert coefficients == (3.4445, -4.7750, 2.0315)
        return orthogonalise(grad[None], steps)[0]

    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", iterate)
    mine, theirs = parameters(0, *SHAPES), parameters(0, *SHAPES)
    descend(Muon(mine, lr=0.05, momentum=0.9, steps=5, decay=0.1), mine)
    reference = torch.optim.Muon(theirs, lr=0.05, momentum=0.9, ns_steps=5, weight_decay=0.1)
    descend(reference, theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_muon_follows_torchs_muon_up_to_bfloat16():
    mine, theirs = parameters(0, *SHAPES), parameters(0, *SHAPES)
    descend(Muon(mine, lr=0.05, momentum=0.9, steps=5, decay=0.0), mine)
    reference = torch.optim.Muon(theirs, lr=0.05, momentum=0.9, ns_steps=5, weight_decay=0.0)
    descend(reference, theirs)
    for a, b, start in zip(mine, theirs, parameters(0, *SHAPES), strict=True):
        moved = (b - start).norm()
        # 15 products in bfloat16 round by 2^-9 each, and the iteration multiplies what it finds at
        # small singular values by up to 3.4 a step: a few percent of the way.
        assert (a - b).norm() < 0.05 * moved


def test_convolutions_are_matrices_of_output_channels():
    (kernel,) = parameters(1, (4, 3, 2, 1, 1))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    descend(Muon([kernel], lr=0.1, momentum=0.9, steps=5, decay=0.1), [kernel])
    optimizer = Muon([matrix], lr=0.1, momentum=0.9, steps=5, decay=0.1)
    for step in range(4):
        generator = torch.Generator().manual_seed(100 * step)
        matrix.grad = torch.randn(4, 3, 2, 1, 1, generator=generator).flatten(1)
        optimizer.step()
    assert_close(kernel.flatten(1), matrix, rtol=1e-6, atol=1e-6)


def test_a_batch_of_equal_shapes_is_each_alone():
    together, alone = parameters(2, (3, 4), (3, 4), (3, 4)), parameters(2, (3, 4), (3, 4), (3, 4))
    descend(Muon(together, lr=0.1, momentum=0.9, steps=5, decay=0.0), together)
    for number, p in enumerate(alone):
        optimizer = Muon([p], lr=0.1, momentum=0.9, steps=5, decay=0.0)
        for step in range(4):
            p.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(100 * step + number))
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_muon_leaves_parameters_without_gradient():
    first, second = parameters(0, (3, 3), (3, 3))
    before = second.detach().clone()
    optimizer = Muon([first, second], lr=0.1, momentum=0.9, steps=5, decay=0.1)
    first.grad = torch.ones(3, 3)
    optimizer.step()
    assert torch.equal(second, before)
    assert second not in optimizer.state


def test_muons_state_dict_goes_round():
    (whole,), (parts,) = parameters(3, (3, 5)), parameters(3, (3, 5))
    descend(Muon([whole], lr=0.1, momentum=0.9, steps=5, decay=0.0), [whole], steps=4)
    first = Muon([parts], lr=0.1, momentum=0.9, steps=5, decay=0.0)
    descend(first, [parts], steps=2)
    second = Muon([parts], lr=0.3, momentum=0.5, steps=1, decay=0.9)
    second.load_state_dict(first.state_dict())
    for step in (2, 3):
        parts.grad = torch.randn(3, 5, generator=torch.Generator().manual_seed(100 * step))
        second.step()
    assert torch.equal(whole, parts)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.conv = nn.Conv3d(2, 3, 1)
        self.norm = nn.LayerNorm(3)
        self.embedding = nn.Embedding(5, 3)
        self.table = nn.Parameter(torch.zeros(6, 3))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_matrices_are_the_weights_of_linear_and_convolution_layers():
    module = Mixed()
    matrices, rest = split_parameters(module)
    assert {id(p) for p in matrices} == {id(module.linear.weight), id(module.conv.weight)}
    names = {n for n, p in module.named_parameters() if any(p is r for r in rest)}
    assert names == {
        "linear.bias",
        "conv.bias",
        "norm.weight",
        "norm.bias",
        "embedding.weight",
        "table",
    }


def test_weight_decay_touches_matrices_only():
    for config in (
        AdamWConfig(lr=0.1, weight_decay=0.5),
        MuonConfig(lr=0.1, weight_decay=0.5, adamw=AdamWConfig(lr=0.2)),
    ):
        module = Mixed()
        matrices, rest = split_parameters(module)
        optimizers = optim.build(config, module)
        decay = {
            id(p): group["weight_decay"]
            for optimizer in optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        assert {decay[id(p)] for p in matrices} == {0.5}
        assert {decay[id(p)] for p in rest} == {0.0}
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        assert all(group["initial_lr"] == group["lr"] for group in groups)
    assert {type(o).__name__: o.param_groups[0]["lr"] for o in optimizers} == {
        "Muon": 0.1,
        "AdamW": 0.2,
    }


def test_the_rate_rises_linearly_and_falls_as_asked():
    cosine = ScheduleConfig(warmup_steps=4, decay="cosine", final_factor=0.1)
    assert [cosine.factor(step, 24) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert cosine.factor(4, 24) == 1.0
    assert cosine.factor(14, 24) == pytest.approx(0.55)
    assert cosine.factor(24, 24) == pytest.approx(0.1)
    assert cosine.factor(10, 24) == pytest.approx(0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * 0.3)))
    linear = ScheduleConfig(decay="linear")
    assert [linear.factor(step, 4) for step in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    constant = ScheduleConfig(warmup_steps=1, decay="constant")
    assert [constant.factor(step, 3) for step in range(4)] == [0.5, 1, 1, 1]
    # A warm-up that is longer than the run is cut by the run's end.
    assert ScheduleConfig(warmup_steps=10).factor(2, 3) == pytest.approx(3 / 11)
