"""The reference engine on one rank: gradients scaled, clipped, refused; state that goes round."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from opensora.engine.interface import load_weights
from opensora.engine.local import LocalEngine
from opensora.errors import CheckpointError
from opensora.runtime import Runtime

ALONE = Runtime(0, 1, 0, torch.device("cpu"))


@dataclass
class Output:
    total: torch.Tensor


class Sum(nn.Module):
    """total = sum of w x, so the gradient of w is the sum of x."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return Output((self.w * x).sum())


def engine_of(module, lr=1.0, **options) -> LocalEngine:
    engine = LocalEngine(ALONE, **options)
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    optimizer.param_groups[0]["initial_lr"] = lr
    engine.wrap(module, lambda _: [optimizer])
    return engine


def always(norm: float) -> bool:
    return True


def test_gradients_of_micro_batches_add_and_are_scaled_once():
    module = Sum()
    engine = engine_of(module)
    engine.backward(torch.tensor([[1.0, 0, 0], [0, 2, 0]]), last=False)
    engine.backward(torch.tensor([[0.0, 0, 2]]))
    update = engine.step(scale=0.5, max_norm=10.0, factor=1.0, accept=always)
    assert update.accepted
    assert update.gradient_norm == pytest.approx(1.5)
    assert_close(module.w.detach(), torch.tensor([-0.5, -1.0, -1.0]))
    assert module.w.grad is None


def test_gradients_are_clipped_to_the_norm():
    module = Sum()
    engine = engine_of(module, lr=2.0)
    engine.backward(torch.tensor([3.0, 0.0, 4.0]))
    update = engine.step(scale=2.0, max_norm=1.0, factor=0.5, accept=always)
    assert update.gradient_norm == pytest.approx(10.0)
    assert_close(module.w.detach(), -torch.tensor([0.6, 0.0, 0.8]), rtol=1e-6, atol=0)


def test_a_refused_step_leaves_no_trace():
    module = Sum()
    engine = engine_of(module)
    seen = []
    engine.backward(torch.full((3,), float("nan")))
    update = engine.step(
        scale=1.0, max_norm=1.0, factor=1.0, accept=lambda norm: bool(seen.append(norm))
    )
    assert not update.accepted
    assert seen[0] != seen[0]
    assert torch.equal(module.w, torch.zeros(3))
    assert module.w.grad is None


def test_bfloat16_is_autocast_and_weights_stay_float32():
    module = nn.Linear(4, 4)
    engine = engine_of(module, precision=torch.bfloat16)
    with engine.autocast():
        assert module(torch.ones(1, 4)).dtype == torch.bfloat16
    with engine_of(module).autocast():
        assert module(torch.ones(1, 4)).dtype == torch.float32
    assert module.weight.dtype == torch.float32


def adam_engine(seed: int) -> LocalEngine:
    torch.manual_seed(seed)
    module = Sum()
    nn.init.normal_(module.w)
    engine = LocalEngine(ALONE)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    optimizer.param_groups[0]["initial_lr"] = 0.1
    engine.wrap(module, lambda _: [optimizer])
    return engine


def step(engine: LocalEngine, x: float) -> None:
    engine.backward(torch.tensor([x, 1.0, 2.0]))
    engine.step(scale=1.0, max_norm=1.0, factor=1.0, accept=always)


def test_state_goes_round_and_training_goes_on_bit_for_bit():
    first, second = adam_engine(0), adam_engine(1)
    step(first, 3.0)
    state = first.state_dict()
    assert set(state["optimizer"]) == {"w/step", "w/exp_avg", "w/exp_avg_sq"}
    second.load_state_dict({k: {n: t.clone() for n, t in v.items()} for k, v in state.items()})
    for engine in (first, second):
        step(engine, -1.0)
    for part in ("weights", "optimizer"):
        mine, theirs = first.state_dict()[part], second.state_dict()[part]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_optimizer_state_of_a_stranger_is_refused():
    engine = adam_engine(0)
    state = {"weights": engine.state_dict()["weights"], "optimizer": {"x/step": torch.ones(())}}
    with pytest.raises(CheckpointError, match="optimizer state for 'x'"):
        engine.load_state_dict(state)


def test_weights_that_do_not_fit_are_listed():
    module = nn.Linear(2, 3)
    with pytest.raises(CheckpointError, match=r"missing bias; unknown other; weight is \(3, 1\)"):
        load_weights(module, {"weight": torch.zeros(3, 1), "other": torch.zeros(1)})
    many = {f"w{k}": torch.zeros(1) for k in range(9)}
    with pytest.raises(CheckpointError, match="and 6 more"):
        load_weights(module, many)
