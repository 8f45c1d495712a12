"""Training levels: distributions, shifts, and independence of the batch."""

import math

import pydantic
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.diffusion.timesteps import (
    ConstantShiftConfig,
    LinearShiftConfig,
    LogitNormalConfig,
    LogNormalConfig,
    SquareRootShiftConfig,
    TimestepConfig,
    UniformConfig,
    draw,
    num_uniforms,
    shift_for,
    shift_levels,
)

CONFIGS = [UniformConfig(), LogitNormalConfig(mean=0.3, std=0.8), LogNormalConfig()]


def grid(count):
    """Evenly spaced uniform numbers: the quantiles of whatever they are turned into."""
    return (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count


def levels(u, config, num_frames=1, tokens_per_frame=256):
    return draw(u, config, num_frames=num_frames, tokens_per_frame=tokens_per_frame)


def test_uniform_levels_are_the_uniform_numbers():
    torch.testing.assert_close(levels(grid(1000), UniformConfig()), grid(1000).float())


def test_logit_normal_levels_have_a_normal_logit():
    t = levels(grid(100_000), LogitNormalConfig(mean=0.3, std=0.8)).double()
    logit = torch.logit(t)
    # Even quantiles leave out tails beyond 4.4 sigma: the standard deviation is short by < 1e-4.
    assert logit.mean().item() == pytest.approx(0.3, abs=1e-4)
    assert logit.std().item() == pytest.approx(0.8, abs=2e-4)
    skewness = ((logit - logit.mean()) / logit.std()).pow(3).mean().item()
    assert skewness == pytest.approx(0, abs=1e-3)


def test_log_normal_levels_are_edms():
    config = LogNormalConfig(mean=-1.2 - math.log(0.5), std=1.2)
    t = levels(grid(100_000), config).double()
    log_sigma = torch.log(0.5 * torch.tan(t * math.pi / 2))
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=1e-4)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=3e-4)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_extreme_uniform_numbers_give_levels_above_zero(config):
    u = torch.tensor([[0.0], [2.0**-24], [1 - 2.0**-24]])
    t = levels(u, config)
    assert ((t > 0) & (t <= 1)).all()
    assert t[0] < t[1] < t[2]
    assert t.isfinite().all()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_a_level_depends_on_its_own_sample_only(config):
    u = torch.rand(8, 1, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([levels(row[None], config, num_frames=3) for row in u])
    assert torch.equal(levels(u, config, num_frames=3), alone)


def test_shared_levels_are_one_a_sample_and_independent_ones_one_a_frame():
    shared = UniformConfig()
    t = levels(torch.tensor([[0.2], [0.7]]), shared, num_frames=4)
    assert num_uniforms(shared, 4) == 1
    assert t.shape == (2, 4)
    assert (t == t[:, :1]).all()
    t[0, 0] = 0.0  # frames own their memory
    assert t[0, 1] != 0
    independent = UniformConfig(levels="independent")
    u = torch.rand(2, num_uniforms(independent, 4), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(levels(u, independent, num_frames=4), u)


def test_uniform_numbers_of_the_wrong_count_are_refused():
    with pytest.raises(ValueError, match=r"need uniforms of shape \(B, 4\)"):
        levels(torch.rand(2, 1), UniformConfig(levels="independent"), num_frames=4)


@settings(deadline=None)
@given(st.floats(0.05, 20), st.floats(0, 1))
def test_shift_multiplies_the_ratio_of_noise_to_data(shift, level):
    t = torch.tensor(level, dtype=torch.float64)
    shifted = shift_levels(t, shift)
    # t' (1 - t) = s t (1 - t'), without dividing by 1 - t at the end.
    assert (shifted * (1 - t)).item() == pytest.approx(
        (shift * t * (1 - shifted)).item(), rel=1e-9, abs=1e-12
    )


def test_shift_keeps_both_ends_and_shifts_compose():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_levels(t, 3.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    torch.testing.assert_close(shift_levels(shifted, 1 / 3), t)
    torch.testing.assert_close(shift_levels(shifted, 2.0), shift_levels(t, 6.0))
    assert torch.equal(shift_levels(t, 1.0), t)


def test_open_sora_1_rule():
    """sqrt(HW / 512^2) sqrt(T): 720x1280 pixels, 30 latent frames, 8x VAE and 2x2 patches."""
    tokens = (720 // 16) * (1280 // 16)
    shift = shift_for(SquareRootShiftConfig(), num_frames=30, tokens_per_frame=tokens)
    assert shift == pytest.approx(math.sqrt(720 * 1280 / 512**2) * math.sqrt(30))


def test_open_sora_2_rule():
    """1 at 256 tokens and 3 at 4096, times sqrt(T): 768x768 pixels and 33 latent frames."""
    rule = LinearShiftConfig()
    assert shift_for(rule, num_frames=1, tokens_per_frame=256) == 1
    assert shift_for(rule, num_frames=1, tokens_per_frame=4096) == 3
    expected = (1 + 2 * (2304 - 256) / (4096 - 256)) * math.sqrt(33)
    assert shift_for(rule, num_frames=33, tokens_per_frame=2304) == pytest.approx(expected)


def test_draws_are_shifted_for_their_shape():
    config = LogitNormalConfig(shift=LinearShiftConfig())
    t = levels(grid(9), config, num_frames=4, tokens_per_frame=4096)[:, 0]
    plain = levels(grid(9), LogitNormalConfig())[:, 0]
    torch.testing.assert_close(t, shift_levels(plain, 6.0))


def test_kind_chooses_distribution_and_shift():
    union = pydantic.TypeAdapter(TimestepConfig)
    tree = {"kind": "uniform", "shift": {"kind": "constant", "value": 3.0}, "levels": "shared"}
    assert union.validate_python(tree) == UniformConfig(shift=ConstantShiftConfig(value=3.0))


@pytest.mark.parametrize(
    "options", [{"high_tokens": 256}, {"high": 0.5}, {"low": 0.05}, {"low": 0.0}]
)
def test_lines_that_fall_or_reach_zero_are_refused(options):
    with pytest.raises(pydantic.ValidationError):
        LinearShiftConfig(**options)
