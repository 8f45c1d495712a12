"""Processes to hold every identity against, and data whose perfect denoiser is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from opensora.diffusion.flow import Flow, FlowConfig
from opensora.diffusion.gaussian import CosineBetas, DDPMConfig, EDMConfig, Gaussian
from opensora.diffusion.process import Process, per_frame

PROCESSES = {
    "flow": lambda prediction: Flow(FlowConfig(prediction=prediction)),
    "linear": lambda prediction: Gaussian(DDPMConfig(prediction=prediction)),
    "cosine": lambda prediction: Gaussian(
        DDPMConfig(prediction=prediction, betas=CosineBetas(), loss_space="velocity")
    ),
    "zero_snr": lambda prediction: Gaussian(
        DDPMConfig(prediction=prediction, zero_terminal_snr=True)
    ),
    "edm": lambda prediction: Gaussian(EDMConfig(prediction=prediction)),
}

# A noise prediction recovers no data from pure noise, and EDM defines its own prediction.
PAIRS = [
    (name, prediction)
    for name in PROCESSES
    for prediction in ("velocity", "data", "noise")
    if not (name == "zero_snr" and prediction == "noise")
    and not (name == "edm" and prediction != "velocity")
]


@pytest.fixture(params=PAIRS, ids=lambda pair: "-".join(pair))
def any_process(request) -> Process:
    name, prediction = request.param
    return PROCESSES[name](prediction)


@pytest.fixture(params=list(PROCESSES))
def any_curve(request) -> Process:
    return PROCESSES[request.param]("velocity")


@dataclass(frozen=True)
class NormalData:
    """Independent normal elements: the perfect denoiser and the exact flow in closed form."""

    mean: Tensor
    std: Tensor
    process: Process

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """E[data | x_t = x], by Bayes' rule for two normals."""
        at = self.process.curve(t)
        alpha, sigma = per_frame(at.alpha), per_frame(at.sigma)
        variance = alpha**2 * self.std**2 + sigma**2
        return self.mean + alpha * self.std**2 / variance * (x - alpha * self.mean)

    def solve(self, x: Tensor, t: float) -> Tensor:
        """Where the probability flow takes x from level t to the data: quantiles are kept."""
        at = self.process.curve(torch.tensor(t, dtype=x.dtype))
        spread = (at.alpha**2 * self.std**2 + at.sigma**2).sqrt()
        return self.mean + self.std * (x - at.alpha * self.mean) / spread


@pytest.fixture
def draw_normal() -> Callable[..., Tensor]:
    """(seed, *shape) -> standard normal numbers in float64."""

    def draw(seed: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    return draw


@pytest.fixture
def normal_data() -> Callable[[Process, Tensor], NormalData]:
    """Data with means in [-1, 1] and standard deviations in [0.5, 1.5], all different."""

    def make(process: Process, like: Tensor) -> NormalData:
        generator = torch.Generator().manual_seed(7)
        mean, std = torch.rand(2, *like.shape, dtype=like.dtype, generator=generator)
        return NormalData(2 * mean - 1, 0.5 + std, process)

    return make
