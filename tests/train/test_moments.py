"""Optimizer state on the host changes nothing; in bfloat16 it keeps its mean."""

import pytest
import torch
from test_optim import descend, parameters
from torch.testing import assert_close
from train_support import digests, losses, make_trainer, tiny

from opensora.train import optim
from opensora.train.moments import AT_A_TIME, StateConfig, Stored, rounded
from opensora.train.optim import AdamWConfig, Muon, MuonConfig

SHAPES = ((6, 4), (4, 6), (6, 4), (6, 4), (5,))


def adamw(params, **options):
    return torch.optim.AdamW(params, lr=0.01, betas=(0.9, 0.99), fused=True, **options)


def muon(params):
    return Muon(params, lr=0.05, momentum=0.9, steps=5, decay=0.1)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("at_a_time", [None, 1, 50, AT_A_TIME])
@pytest.mark.parametrize("make", [adamw, muon])
def test_offloaded_state_makes_the_same_steps_bit_for_bit(make, at_a_time):
    shapes = SHAPES if make is adamw else SHAPES[:4]
    plain, kept = parameters(0, *shapes), parameters(0, *shapes)
    optimizer = Stored(make(kept), StateConfig(offload=True), at_a_time if make is adamw else None)
    reference = make(plain)
    descend(reference, plain)
    descend(optimizer, kept)
    for a, b in zip(plain, kept, strict=True):
        assert torch.equal(a, b)
        assert all(torch.equal(v, optimizer.state[b][k]) for k, v in reference.state[a].items())


def test_rates_and_decay_are_those_of_the_groups_at_the_step():
    plain, kept = parameters(0, *SHAPES), parameters(0, *SHAPES)
    reference, optimizer = adamw(plain), Stored(adamw(kept), StateConfig(offload=True), 1)
    for group in (*reference.param_groups, *optimizer.param_groups):
        group["lr"], group["weight_decay"] = 0.3, 0.2
    descend(reference, plain)
    descend(optimizer, kept)
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


def test_rounding_takes_a_neighbour_with_the_probability_of_its_nearness():
    value = torch.linspace(1.0, 1.0 + 2**-7, 33)[1:-1].repeat(20_000, 1)
    value = torch.cat([value, -value])
    found = rounded(value, noise(*value.shape)).float()
    assert set(found.abs().unique().tolist()) == {1.0, 1.0 + 2**-7}
    up = (found.abs() > 1).float().mean(0)
    # Standard deviation of a share of 40,000: at most 0.0025; 62 of them within four.
    assert_close(up, torch.arange(1, 32) / 32, rtol=0, atol=0.011)
    exact = noise(1000).bfloat16().float()
    assert torch.equal(rounded(exact, noise(1000, seed=1)).float(), exact)


@pytest.mark.parametrize("gradient", [0.0, 1e-3])
def test_a_second_moment_forgets_though_a_step_is_below_the_spacing(gradient):
    value = noise(4096).square()
    stuck, start, gradients = value.bfloat16(), value.mean(), torch.full((4096,), gradient)
    kept = value.bfloat16()
    for step in range(500):
        decay = lambda v: v.float() * 0.999 + 0.001 * gradient**2  # noqa: E731
        stuck = decay(stuck).bfloat16()
        kept = rounded(decay(kept), gradients, torch.tensor(float(step)))
    assert stuck.float().mean() > 0.99 * start
    # 500 roundings of a part in 256 each, at random: 9 % of an element, a hundredth of the mean.
    assert_close(kept.float().mean(), 0.999**500 * start, rtol=0.01, atol=0)


@pytest.mark.parametrize("make", [adamw, muon])
def test_state_in_bfloat16_makes_nearly_the_same_steps(make):
    shapes = [(64, 32)] * 2
    plain, kept = parameters(0, *shapes), parameters(0, *shapes)
    optimizer = Stored(make(kept), StateConfig(state_dtype="bf16"), None)
    descend(make(plain), plain, steps=8)
    descend(optimizer, kept, steps=8)
    for a, b, start in zip(plain, kept, parameters(0, *shapes), strict=True):
        # A rounding errs by 2^-8 of a moment at most, by half of that on average, and up to ten
        # of them last (beta 0.9); the iteration of Muon enlarges small singular values by 3.4.
        assert 0 < (a - b).norm() < 10**0.5 * 2**-8 * 3.4 * (a - start).norm()
        assert all(v.dtype == torch.bfloat16 for k, v in optimizer.state[b].items() if k != "step")


CHOICES = {
    "adamw": "optim={kind: adamw, lr: 0.002, state_dtype: bf16, offload: true}",
    "muon": "optim={kind: muon, lr: 0.02, state_dtype: bf16, adamw: {lr: 0.002, offload: true}}",
}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(choice, tmp_path):
    quiet = (CHOICES[choice], "optim.schedule.decay=constant", "checkpoint.every=3")
    whole = make_trainer(tiny("stdit", tmp_path / "whole", "steps=5", *quiet))
    whole.run()
    first = make_trainer(tiny("stdit", tmp_path / "parts", "steps=3", *quiet))
    first.run()
    despite = "resume_despite=[steps]"
    second = make_trainer(tiny("stdit", tmp_path / "parts", "steps=5", *quiet, despite))
    assert second.state.resume()
    second.run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    expected = digests(tmp_path / "whole")
    assert digests(tmp_path / "parts") == expected
    assert any("momentum" in name or "exp_avg" in name for name in expected)


def test_where_state_is_kept_may_change_and_how_it_is_rounded_may_not(tmp_path):
    base = tiny("stdit", tmp_path, "optim={kind: adamw}")
    tiny("stdit", tmp_path, "optim={kind: adamw, offload: true}").check_resumable(
        base.json_text(), "x"
    )
    with pytest.raises(Exception, match=r"optim\.state_dtype is 'bf16', was 'fp32'"):
        tiny("stdit", tmp_path, "optim={kind: adamw, state_dtype: bf16}").check_resumable(
            base.json_text(), "x"
        )


def test_plain_optimizers_stay_what_they_are():
    module = torch.nn.Linear(3, 4)
    assert not any(isinstance(o, Stored) for o in optim.build(MuonConfig(), module))
    choice = MuonConfig(state_dtype="bf16", adamw=AdamWConfig(offload=True))
    assert all(isinstance(o, Stored) for o in optim.build(choice, module))
    groups = [group for o in optim.build(choice, module) for group in o.param_groups]
    assert all(group["initial_lr"] == group["lr"] for group in groups)
