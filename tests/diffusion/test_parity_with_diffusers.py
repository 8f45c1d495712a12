"""The same numbers from another implementation: diffusers' schedulers as judges.

Their index n is our level (n + 1) / 1000, and "trailing" spacing is our even levels.
"""

import functools
import math

import numpy as np
import pytest
import torch

from opensora.diffusion.flow import Flow, FlowConfig
from opensora.diffusion.gaussian import (
    CosineBetas,
    DDPMConfig,
    EDMConfig,
    Gaussian,
    LinearBetas,
    ScaledLinearBetas,
)
from opensora.diffusion.samplers import SAMPLERS, dpmpp_2m, euler, heun, renoise
from opensora.diffusion.schedule import full_sequence, karras

diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers")

# Inside diffusers, with the newest numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (1, 3, 2, 4, 4)
NUM_STEPS = 10
PREDICTIONS = {"noise": "epsilon", "velocity": "v_prediction", "data": "sample"}
BETAS = {
    "linear": (LinearBetas(), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (
        ScaledLinearBetas(),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (CosineBetas(), {"beta_schedule": "squaredcos_cap_v2"}),
}

# Their alpha-bar is a product of up to a thousand float32 numbers: 1000 * 2^-24, of the largest.
TOLERANCE = 6e-5


def network(x, t):
    """Any smooth function of x and the level serves as a network."""
    return torch.sin(2 * x) + t.reshape(-1, 1, 1, 1, 1)


def ours(sampler, process, x, levels):
    def denoise(x, t):
        return process.to_data(network(x, t[:, :1]), x, t)

    schedule = torch.as_tensor(np.asarray(levels), dtype=torch.float64)[:, None].expand(-1, 2)
    return sampler(denoise, x, schedule, process=process)


def theirs(scheduler, x, level_of):
    for timestep in scheduler.timesteps:
        t = torch.as_tensor(level_of(timestep), dtype=torch.float64).reshape(1)
        x = scheduler.step(network(x, t), timestep, x).prev_sample
    return x


def assert_same(actual, expected):
    largest = expected.abs().max().item()
    torch.testing.assert_close(actual, expected.double(), rtol=0, atol=TOLERANCE * largest)


@pytest.fixture
def x(draw_normal):
    return draw_normal(0, *SHAPE)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler(x, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / NUM_STEPS, NUM_STEPS))
    levels = full_sequence(NUM_STEPS, 1, shift=shift)[:, 0]
    torch.testing.assert_close(scheduler.sigmas, levels, rtol=0, atol=1e-6)
    assert_same(ours(euler, Flow(), x, levels), theirs(scheduler, x, lambda n: n / 1000))


def test_flow_heun(x):
    """Two calls a step in theirs; levels from theirs, which start below 1."""
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(NUM_STEPS)
    levels = [*scheduler.sigmas[:-1:2].tolist(), 0.0]
    assert_same(ours(heun, Flow(), x, levels), theirs(scheduler, x, lambda n: n / 1000))


# Not noise with cosine: alpha at its last step is 5e-5, where our min_divisor acts.
@pytest.mark.parametrize(
    ("betas", "prediction"),
    [(b, p) for b in BETAS for p in PREDICTIONS if (b, p) != ("cosine", "noise")],
)
def test_ddim(x, betas, prediction):
    choice, options = BETAS[betas]
    scheduler = diffusers.DDIMScheduler(
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing="trailing",
        clip_sample=False,
        **options,
    )
    scheduler.set_timesteps(NUM_STEPS)
    process = Gaussian(DDPMConfig(betas=choice, prediction=prediction))
    levels = full_sequence(NUM_STEPS, 1)[:, 0]
    expected = theirs(scheduler, x, lambda n: (n + 1) / 1000)
    assert_same(ours(euler, process, x, levels), expected)


def test_ddim_with_zero_terminal_snr(x):
    scheduler = diffusers.DDIMScheduler(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
    )
    scheduler.set_timesteps(NUM_STEPS)
    process = Gaussian(DDPMConfig(prediction="velocity", zero_terminal_snr=True))
    levels = full_sequence(NUM_STEPS, 1)[:, 0]
    assert_same(ours(euler, process, x, levels), theirs(scheduler, x, lambda n: (n + 1) / 1000))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_with_renewed_noise(x, draw_normal, prediction):
    scheduler = diffusers.DDIMScheduler(
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
    )
    scheduler.set_timesteps(NUM_STEPS)
    process = Gaussian(DDPMConfig(prediction=prediction))
    noise = lambda step: draw_normal(2 + step, *SHAPE)  # noqa: E731
    expected = x
    for step, n in enumerate(scheduler.timesteps):
        t = (n[None].double() + 1) / 1000
        options = {"eta": 1.0, "variance_noise": noise(step)}
        expected = scheduler.step(network(expected, t), n, expected, **options).prev_sample
    sampler = functools.partial(SAMPLERS["ancestral"], noise=noise)
    assert_same(ours(sampler, process, x, full_sequence(NUM_STEPS, 1)[:, 0]), expected)


def test_renewing_all_noise_on_the_line(x):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / NUM_STEPS, NUM_STEPS))
    torch.manual_seed(0)
    drawn = [torch.randn(SHAPE) for _ in range(NUM_STEPS)]
    torch.manual_seed(0)
    expected = theirs(scheduler, x, lambda n: n / 1000)
    sampler = functools.partial(renoise, noise=lambda step: drawn[step])
    levels = full_sequence(NUM_STEPS, 1, shift=3.0)[:, 0]
    assert_same(ours(sampler, Flow(), x, levels), expected)


@pytest.mark.parametrize(
    ("sampler", "name"),
    [(euler, "EDMEulerScheduler"), (dpmpp_2m, "EDMDPMSolverMultistepScheduler")],
)
def test_edm_on_karras_levels(x, sampler, name):
    """Theirs has data of standard deviation 0.5, noise added to it unscaled, and minus our v."""
    scheduler, levels = getattr(diffusers, name)(sigma_data=0.5), karras(NUM_STEPS)
    scheduler.set_timesteps(NUM_STEPS)
    sigmas = scheduler.sigmas.double()
    torch.testing.assert_close(torch.atan(sigmas / 0.5) * 2 / math.pi, levels, rtol=0, atol=1e-6)
    expected = x * (sigmas[0] ** 2 + 0.25).sqrt()
    for n, level in zip(scheduler.timesteps, levels[:-1], strict=True):
        shown = scheduler.scale_model_input(expected, n)
        expected = scheduler.step(-network(shown, level[None]), n, expected).prev_sample
    assert_same(ours(sampler, Gaussian(EDMConfig()), x, levels), expected / 0.5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpmpp_2m_on_the_circle(x, prediction):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
    )
    scheduler.set_timesteps(NUM_STEPS)
    process = Gaussian(DDPMConfig(prediction=prediction))
    levels = full_sequence(NUM_STEPS, 1)[:, 0]
    expected = theirs(scheduler, x, lambda n: (n + 1) / 1000)
    assert_same(ours(dpmpp_2m, process, x, levels), expected)


def test_dpmpp_2m_on_the_line(x):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(NUM_STEPS)
    process = Flow(FlowConfig(prediction="velocity"))
    expected = theirs(scheduler, x, lambda n: scheduler.sigmas[scheduler.step_index or 0])
    assert_same(ours(dpmpp_2m, process, x, scheduler.sigmas), expected)


@pytest.mark.parametrize("betas", BETAS)
def test_noise_is_added_and_v_defined_alike(x, draw_normal, betas):
    choice, options = BETAS[betas]
    scheduler = diffusers.DDPMScheduler(**options)
    process, noise = Gaussian(DDPMConfig(betas=choice)), draw_normal(1, *SHAPE)
    for index in (0, 499, 999):
        n, t = torch.tensor([index]), torch.tensor([(index + 1) / 1000], dtype=torch.float64)
        assert_same(process.corrupt(x, noise, t), scheduler.add_noise(x, noise, n))
        assert_same(process.velocity(x, noise, t), scheduler.get_velocity(x, noise, n))


def test_flow_noise_is_added_alike(x, draw_normal):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    noise = draw_normal(1, *SHAPE)
    expected = scheduler.scale_noise(x, scheduler.timesteps[[300]], noise)
    t = scheduler.timesteps[[300]].double() / 1000
    assert_same(Flow().corrupt(x, noise, t), expected)
