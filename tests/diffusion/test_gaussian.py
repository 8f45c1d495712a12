"""The circle: tables of betas, and EDM as one of its walks."""

import math

import pytest
import torch

from opensora.diffusion.gaussian import (
    CosineBetas,
    DDPMConfig,
    EDMConfig,
    Gaussian,
    LinearBetas,
    ScaledLinearBetas,
    betas,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


GRID = torch.arange(1, 1001, dtype=torch.float64) / 1000


@pytest.mark.parametrize("choice", [LinearBetas(), ScaledLinearBetas(), CosineBetas()])
def test_the_table_is_reproduced_at_its_own_steps(choice):
    config = DDPMConfig(betas=choice)
    at = Gaussian(config).curve(GRID)
    alpha_bar = (1 - betas(config)).cumprod(0)
    # 1000 factors, each rounded: 1000 * 2.2e-16 relative.
    torch.testing.assert_close(at.alpha**2, alpha_bar, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(at.sigma**2, 1 - alpha_bar, rtol=0, atol=3e-13)


def test_the_first_and_last_betas_are_those_asked_for():
    assert betas(DDPMConfig())[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    scaled = DDPMConfig(betas=ScaledLinearBetas())
    assert betas(scaled)[[0, -1]].tolist() == pytest.approx([0.00085, 0.012])
    assert betas(DDPMConfig(betas=CosineBetas())).max() == 0.999


def test_cosine_follows_its_closed_form():
    """Nichol and Dhariwal 2021, equation 17, wherever no beta was cut at 0.999."""
    config = DDPMConfig(betas=CosineBetas())
    angle = (GRID + 0.008) / 1.008 * math.pi / 2
    expected = angle.cos() / math.cos(0.008 / 1.008 * math.pi / 2)
    uncut = betas(config) < 0.999
    assert uncut.sum() > 990
    at = Gaussian(config).curve(GRID)
    torch.testing.assert_close(at.alpha[uncut], expected[uncut], rtol=1e-9, atol=0)


def test_zero_terminal_snr_keeps_the_first_step_and_ends_in_pure_noise():
    plain = Gaussian(DDPMConfig(prediction="velocity"))
    fixed = Gaussian(DDPMConfig(prediction="velocity", zero_terminal_snr=True))
    for dtype in (torch.float32, torch.float64):
        last = fixed.curve(torch.ones(1, dtype=dtype))
        assert last.alpha.abs() < 1e-16
        assert last.sigma == 1
    first = torch.tensor([1 / 1000], dtype=torch.float64)
    torch.testing.assert_close(fixed.curve(first).alpha, plain.curve(first).alpha)
    assert plain.curve(torch.ones(1)).alpha > 0.006


def test_zero_terminal_snr_refuses_to_predict_noise():
    with pytest.raises(ValueError, match="recovers no data"):
        DDPMConfig(zero_terminal_snr=True)


def test_noise_is_accurate_in_float32_down_to_the_smallest_level():
    """sqrt(1 - alpha^2) would lose three digits here; the angle loses none."""
    process = Gaussian(DDPMConfig())
    t = torch.tensor([1e-6, 1e-4, 1e-3, 0.5, 1.0])
    narrow, wide = process.curve(t), process.curve(t.double())
    torch.testing.assert_close(narrow.sigma.double(), wide.sigma, rtol=1e-6, atol=0)


def test_levels_between_steps_interpolate_the_angle():
    process = Gaussian(DDPMConfig())
    between = torch.tensor([0.5, 0.5005, 0.501], dtype=torch.float64)
    angle = process.angle(between)
    torch.testing.assert_close(angle[1], (angle[0] + angle[2]) / 2)
    assert angle[0] < angle[2]


def test_edm_is_the_network_preconditioning_of_karras():
    """Karras et al. 2022, table 1, with data of standard deviation 0.5."""
    sigma_data = 0.5
    data = sigma_data * torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, generator=seeded(1))
    noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, generator=seeded(2))
    s = torch.exp(-1.2 + 1.2 * torch.randn(2, 4, dtype=torch.float64, generator=seeded(3)))
    sigma = s[:, None, :, None, None]
    total = sigma**2 + sigma_data**2
    c_skip, c_out = sigma_data**2 / total, sigma * sigma_data / total.sqrt()
    noisy, network_input = data + sigma * noise, (data + sigma * noise) / total.sqrt()
    raw = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, generator=seeded(4))

    edm = Gaussian(EDMConfig())
    t = torch.atan(s / sigma_data) * 2 / math.pi
    x = edm.corrupt(data / sigma_data, noise, t)
    torch.testing.assert_close(x, network_input)
    denoised = c_skip * noisy + c_out * raw
    torch.testing.assert_close(sigma_data * edm.to_data(-raw, x, t), denoised)
    weighted = ((denoised - data) ** 2 / c_out**2).mean(dim=(1, 3, 4))
    torch.testing.assert_close(edm.loss_per_frame(-raw, data / sigma_data, noise, t), weighted)


def test_a_process_made_in_inference_mode_can_train():
    with torch.inference_mode():
        process = Gaussian(DDPMConfig())
        process.curve(torch.tensor([0.5]))
    prediction = torch.zeros(1, 1, 1, 1, 1, requires_grad=True)
    one = torch.ones(1, 1, 1, 1, 1)
    process.loss_per_frame(prediction, one, one, torch.tensor([0.5])).sum().backward()
    assert prediction.grad is not None
