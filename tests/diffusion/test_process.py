"""Identities that hold for every process and prediction, in float64."""

import pytest
import torch

from opensora.diffusion.flow import Flow, FlowConfig
from opensora.diffusion.gaussian import DDPMConfig, Gaussian
from opensora.diffusion.process import Process, ProcessConfig, per_frame


def seeded(seed):
    return torch.Generator().manual_seed(seed)


SHAPE = (2, 3, 5, 4, 4)

# A handful of roundings of numbers up to 6, divided by an alpha or sigma of at least 0.01:
# 8 * 2.2e-16 * 6 / 0.01.
ROUND_TRIP = 1e-12


@pytest.fixture
def data():
    return torch.randn(SHAPE, dtype=torch.float64, generator=seeded(1))


@pytest.fixture
def noise():
    return torch.randn(SHAPE, dtype=torch.float64, generator=seeded(2))


@pytest.fixture
def t():
    """A level for each frame, away from the ends where conversions are clamped."""
    return 0.05 + 0.9 * torch.rand(2, 5, dtype=torch.float64, generator=seeded(3))


def assert_close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_point_and_tangent_span_a_unit_area(any_curve):
    at = any_curve.curve(torch.linspace(0, 1, 10001, dtype=torch.float64))
    area = at.alpha * at.sigma_rate - at.sigma * at.alpha_rate
    assert_close(area, torch.ones_like(area), atol=4 * 2.2e-16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_level_zero_is_exactly_the_data(any_curve, data, noise, dtype):
    t = torch.zeros(2, 5, dtype=dtype)
    at = any_curve.curve(t)
    assert (at.alpha == 1).all()
    assert (at.sigma == 0).all()
    assert torch.equal(any_curve.corrupt(data.to(dtype), noise.to(dtype), t), data.to(dtype))


def test_signal_falls_and_noise_rises_with_the_level(any_curve):
    for dtype in (torch.float32, torch.float64):
        at = any_curve.curve(torch.linspace(0, 1, 1001, dtype=dtype))
        assert (at.alpha.diff() <= 0).all()
        assert (at.sigma.diff() >= 0).all()
        assert (at.alpha >= 0).all()


def test_every_prediction_gives_back_data_noise_and_velocity(any_process, data, noise, t):
    x = any_process.corrupt(data, noise, t)
    prediction = any_process.target(data, noise, t)
    assert_close(any_process.to_data(prediction, x, t), data, ROUND_TRIP)
    assert_close(any_process.to_noise(prediction, x, t), noise, ROUND_TRIP)
    velocity = any_process.velocity(data, noise, t)
    # The velocity from data or noise divides once more by a number of at least 0.01.
    assert_close(any_process.to_velocity(prediction, x, t), velocity, ROUND_TRIP)


def test_velocity_is_the_derivative_of_the_corrupted_data(any_curve, data, noise, t):
    def pace(level):
        """d parameter / dt: the curve is walked at this multiple of its own parameter."""
        return any_curve.angle(level) if isinstance(any_curve, Gaussian) else level

    ones = torch.ones_like(t)
    _, dx_dt = torch.func.jvp(lambda level: any_curve.corrupt(data, noise, level), (t,), (ones,))
    _, speed = torch.func.jvp(pace, (t,), (ones,))
    assert_close(dx_dt, any_curve.velocity(data, noise, t) * per_frame(speed), ROUND_TRIP)


@pytest.mark.parametrize("loss_space", ["velocity", "data", "noise"])
def test_loss_is_the_squared_error_in_the_loss_space(any_process, data, noise, t, loss_space):
    config = any_process.config.model_copy(update={"loss_space": loss_space})
    process = type(any_process)(config)
    x = process.corrupt(data, noise, t)
    target = process.target(data, noise, t)
    prediction = target + 0.1 * torch.randn(SHAPE, dtype=torch.float64, generator=seeded(4))
    convert = getattr(process, f"to_{loss_space}")
    error = (convert(prediction, x, t) - convert(target, x, t)).square().mean(dim=(1, 3, 4))
    torch.testing.assert_close(
        process.loss_per_frame(prediction, data, noise, t), error, rtol=1e-9, atol=0
    )


def test_loss_of_the_target_is_zero(any_process, data, noise, t):
    target = any_process.target(data, noise, t)
    assert (any_process.loss_per_frame(target, data, noise, t) == 0).all()


def test_min_snr_weights_are_those_of_the_paper(t):
    gamma = 5.0
    for prediction, expected in {
        "noise": lambda snr: snr.clamp(max=gamma) / snr,
        "velocity": lambda snr: snr.clamp(max=gamma) / (snr + 1),
        "data": lambda snr: snr.clamp(max=gamma),
    }.items():
        options = {"prediction": prediction, "min_snr_gamma": gamma}
        process = Gaussian(DDPMConfig.model_validate(options))
        at = process.curve(t)
        snr = (at.alpha / at.sigma) ** 2
        assert (snr > gamma).any()
        assert (snr < gamma).any()
        torch.testing.assert_close(process.loss_weight(t), expected(snr), rtol=1e-12, atol=0)


def test_min_snr_is_refused_outside_the_noise_loss():
    with pytest.raises(ValueError, match="min_snr_gamma caps the noise loss"):
        FlowConfig(min_snr_gamma=5.0)


def test_one_level_a_sample_means_that_level_for_each_frame(any_process, data, noise):
    level = torch.tensor([0.3, 0.7], dtype=torch.float64)
    each = level[:, None].expand(2, 5)
    x = any_process.corrupt(data, noise, level)
    assert torch.equal(x, any_process.corrupt(data, noise, each))
    loss = any_process.loss_per_frame(x, data, noise, level)
    assert loss.shape == (2, 5)
    assert torch.equal(loss, any_process.loss_per_frame(x, data, noise, each))


def test_frames_do_not_see_the_levels_of_other_frames(any_process, data, noise, t):
    changed = t.clone()
    changed[:, 2] = 0.5
    others = [0, 1, 3, 4]
    x, y = any_process.corrupt(data, noise, t), any_process.corrupt(data, noise, changed)
    assert torch.equal(x[:, :, others], y[:, :, others])
    assert not torch.equal(x[:, :, 2], y[:, :, 2])


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_conversions_and_losses_are_finite_at_both_ends(any_process, data, noise, level):
    t = torch.full((2, 5), level)
    data, noise = data.float(), noise.float()
    x = any_process.corrupt(data, noise, t)
    for convert in (any_process.to_data, any_process.to_noise, any_process.to_velocity):
        assert convert(noise, x, t).isfinite().all()
    for loss_space in ("velocity", "data", "noise"):
        config = any_process.config.model_copy(update={"loss_space": loss_space})
        assert type(any_process)(config).loss_weight(t).isfinite().all()


def test_narrow_predictions_are_measured_in_float32(any_process, data, noise, t):
    narrow = noise.bfloat16()
    loss = any_process.loss_per_frame(narrow, data.float(), noise.float(), t.float())
    assert loss.dtype == torch.float32
    x = any_process.corrupt(data.bfloat16(), narrow, t.float())
    assert x.dtype == torch.float32
    for convert in (any_process.to_data, any_process.to_noise, any_process.to_velocity):
        assert convert(narrow, x, t.float()).dtype == torch.float32


def test_denoiser_turns_a_model_into_a_data_predictor(any_process, data, noise, t):
    x = any_process.corrupt(data, noise, t)

    def model(x, t, condition):
        assert condition == "a red ball"
        return any_process.target(data, noise, t)

    assert_close(any_process.denoiser(model)(x, t, "a red ball"), data, ROUND_TRIP)


def test_gradients_reach_the_prediction_only_through_its_own_frame(any_process, data, noise, t):
    prediction = torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True)
    any_process.loss_per_frame(prediction, data, noise, t)[:, 1].sum().backward()
    moved = prediction.grad.abs().amax(dim=(0, 1, 3, 4)) > 0
    assert moved.tolist() == [False, True, False, False, False]


def test_shapes_and_types_that_do_not_fit_are_refused(data, noise, t):
    flow = Flow()
    with pytest.raises(ValueError, match=r"need \(2,\) or \(2, 5\)"):
        flow.corrupt(data, noise, t[:, :4])
    with pytest.raises(ValueError, match="pass float32 or float64"):
        flow.corrupt(data, noise, t.bfloat16())
    with pytest.raises(ValueError, match=r"latents are \(B, C, T, H, W\)"):
        flow.corrupt(data[0], noise[0], t)
    with pytest.raises(ValueError, match="drop them first"):
        flow.to_data(torch.cat([noise, noise], dim=1), data, t)
    with pytest.raises(ValueError, match="drop them first"):
        flow.loss_per_frame(noise[:, :, :1], data, noise, t)


def test_a_process_without_a_curve_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        Process(ProcessConfig())  # pyright: ignore[reportAbstractUsage]
