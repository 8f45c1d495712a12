"""Averages of weights against closed forms."""

import pytest
import torch
from torch import nn

from opensora.engine.ema import EMA, FixedEMAConfig, PowerEMAConfig
from opensora.errors import CheckpointError


def along_a_line(config, steps: int) -> float:
    """The average after `steps` updates of a weight that is n after update n = 1, 2, ..."""
    module = nn.Linear(1, 1, bias=False)
    ema = EMA(module, config)
    for step in range(steps):
        nn.init.constant_(module.weight, step + 1)
        ema.update(step)
    return float(ema.averages["weight"])


@pytest.mark.parametrize("gamma", [6.94, 16.97])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_the_power_average_of_a_line_is_its_closed_form(gamma, steps):
    # The weight of update k in the average after n is (k/n)^(g+1) - ((k-1)/n)^(g+1), because the
    # decays multiply to (k/n)^(g+1); summing k times it by parts leaves n - sum_k<n (k/n)^(g+1).
    expected = steps - sum((k / steps) ** (gamma + 1) for k in range(1, steps))
    # Every update rounds a number up to `steps` once: 50 times 2^-24.
    assert along_a_line(PowerEMAConfig(gamma=gamma), steps) == pytest.approx(expected, rel=3e-6)


@pytest.mark.parametrize(("gamma", "width"), [(6.94, 0.10), (16.97, 0.05)])
def test_the_power_profile_has_the_width_of_the_paper(gamma, width):
    # Standard deviation of the density (g+1) t^g on [0, 1], Karras et al. 2024, equation 123.
    found = ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5
    assert found == pytest.approx(width, rel=1e-3)
    steps = 400
    decays = [PowerEMAConfig(gamma=gamma).decay_at(step) for step in range(steps)]
    weights = torch.tensor(decays, dtype=torch.float64).flip(0).cumprod(0).flip(0)
    share = torch.cat([weights[1:], weights.new_ones(1)]) - weights
    times = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    mean = (share * times).sum()
    spread = (share * (times - mean).square()).sum().sqrt()
    assert float(share.sum()) == pytest.approx(1.0)
    # The sum stands for an integral over cells of 1/400, whose own variance is 1/12 of a cell's.
    assert float(spread) == pytest.approx(width, rel=2e-3)


def test_the_fixed_average_of_a_line_lags_by_its_memory():
    decay, steps = 0.9, 400
    # Far from the start the average of n is n - decay / (1 - decay).
    found = along_a_line(FixedEMAConfig(decay=decay), steps)
    assert found == pytest.approx(steps - decay / (1 - decay), rel=1e-5)
    assert FixedEMAConfig(decay=decay).decay_at(0) == 0.1
    assert FixedEMAConfig(decay=decay).decay_at(10**6) == decay


def test_the_first_update_forgets_the_initial_weights():
    assert along_a_line(PowerEMAConfig(), 1) == 1


def test_swapping_is_undone_even_after_an_error():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    ema = EMA(module, PowerEMAConfig())
    assert list(ema.averages) == ["weight"]
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1)

    def fail():
        with ema.swapped():
            assert torch.equal(module.weight, before)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(module.weight, before + 1)
    assert module.weight.requires_grad


def test_averages_of_bfloat16_weights_are_kept_in_float32():
    module = nn.Linear(1, 1, bias=False).bfloat16()
    ema = EMA(module, FixedEMAConfig(decay=0.5))
    nn.init.constant_(module.weight, 1.0)
    start = float(ema.averages["weight"])
    ema.update(20)
    assert ema.averages["weight"].dtype == torch.float32
    assert float(ema.averages["weight"]) == pytest.approx((start + 1) / 2, abs=1e-7)
    with ema.swapped():
        assert module.weight.dtype == torch.bfloat16


def test_averages_of_another_model_are_refused():
    ema = EMA(nn.Linear(2, 3), PowerEMAConfig())
    state = EMA(nn.Linear(2, 3), PowerEMAConfig()).state_dict()
    ema.load_state_dict(state)
    assert torch.equal(ema.averages["weight"], state["weight"])
    with pytest.raises(CheckpointError, match="'bias'"):
        ema.load_state_dict({"weight": state["weight"]})
    # One row would be broadcast in silence.
    with pytest.raises(CheckpointError, match="'weight'"):
        ema.load_state_dict({**state, "weight": state["weight"][:1]})
