"""Solvers that walk a schedule from noise to data. One signature, one table.

    sampler(denoise, x, schedule, *, process, callback=None, noise=None) -> x

`denoise(x, t)` gives the data estimate D. Data is what every process, prediction and guidance
agree on: it is finite at every level, and with N = (x - alpha D) / sigma the probability-flow ODE
is dx = D dalpha + N dsigma whatever the curve and its pace. Levels are per frame; a frame whose
level stays in a step is kept bit for bit.

Arguments of every sampler:
    denoise: (x, t) -> data estimate, with t (B, T) in the dtype of x.
    x: float32 or float64 (B, C, T, H, W) at the levels of `schedule[0]`; start from
        `process.corrupt(data, noise, schedule[0])`, where only given frames need data.
    schedule: (steps + 1, T) or (steps + 1, B, T) levels, see `schedule`.
    process: gives alpha and sigma.
    callback: called after each step with its number from 0, x and the data estimate; latents that
        it returns go on in the place of x, and whatever it raises ends the sampling.
    noise: step -> standard normal latents, (B, C, T, H, W). Only solvers that renew noise call it.
Each returns latents at the levels of the last row, like x, and raises ValueError for latents or
schedules that do not fit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora.diffusion import schedule as schedules
from opensora.diffusion.process import Process

Denoise = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, Tensor, Tensor], Tensor | None]
Noise = Callable[[int], Tensor]


def euler(
    denoise: Denoise,
    x: Tensor,
    schedule: Tensor,
    *,
    process: Process,
    callback: Callback | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """First order: D and N are held for a step.

    On the straight line this is x + (s - t) velocity. On any process it is DDIM with eta 0, and
    Euler's method in EDM's coordinates, x / alpha against sigma / alpha.
    """
    walk = _plan(x, schedule, process)
    keep, gain = walk.transport()
    for step in range(walk.num_steps):
        data = _estimate(denoise, x, walk.levels[step])
        x = walk.move(step, x, torch.addcmul(x * keep[step], data, gain[step]))
        x = _tell(callback, step, x, data)
    return x


def heun(
    denoise: Denoise,
    x: Tensor,
    schedule: Tensor,
    *,
    process: Process,
    callback: Callback | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Second order, two calls a step: the trapezoid rule on dx = D dalpha + N dsigma.

    On the straight line this averages the velocities of both ends. Frames that reach level 0 take
    Euler's step, as in Karras et al. 2022, algorithm 1.
    """
    walk = _plan(x, schedule, process)
    keep, gain = walk.transport()
    corrected = walk.moving & (walk.levels_after > 0)
    # The step that starts in (alpha_t, sigma_t) with D and N taken at its end.
    d_alpha, d_sigma = walk.alpha_s - walk.alpha_t, walk.sigma_s - walk.sigma_t
    slope = d_sigma / torch.where(corrected, walk.sigma_s, 1.0)
    end_x, end_data = walk.cast(slope), walk.cast(d_alpha - walk.alpha_s * slope)
    correct = walk.cast(corrected)
    for step in range(walk.num_steps):
        data = _estimate(denoise, x, walk.levels[step])
        ahead = walk.move(step, x, torch.addcmul(x * keep[step], data, gain[step]))
        if corrected[step].any():
            after = _estimate(denoise, ahead, walk.levels[step + 1])
            implicit = torch.addcmul(torch.addcmul(x, ahead, end_x[step]), after, end_data[step])
            ahead = torch.where(correct[step], (ahead + implicit) / 2, ahead)
        x = ahead
        x = _tell(callback, step, x, data)
    return x


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    schedule: Tensor,
    *,
    process: Process,
    callback: Callback | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """DPM-Solver++(2M): second order with one call a step, from the last two data estimates.

    Lu et al. 2022, "DPM-Solver++", algorithm 2. A frame's first step, the one after pure noise
    and the last are first order, because the log signal-to-noise ratio is infinite at both ends.
    """
    walk = _plan(x, schedule, process)
    keep, gain = walk.transport()
    width = (walk.alpha_s.log() - walk.sigma_s.log()) - (walk.alpha_t.log() - walk.sigma_t.log())
    ratio = torch.zeros_like(width)
    ratio[1:] = width[1:] / (2 * width[:-1])
    known = torch.zeros_like(walk.moving)
    known[1:] = walk.moving[1:] & walk.moving[:-1] & (walk.levels_after[1:] > 0)
    extrapolate = walk.cast(torch.where(known, ratio, 0.0))
    before = None
    for step in range(walk.num_steps):
        data = _estimate(denoise, x, walk.levels[step])
        ahead = data
        if before is not None and known[step].any():
            ahead = torch.addcmul(data, data - before, extrapolate[step])
        x = walk.move(step, x, torch.addcmul(x * keep[step], ahead, gain[step]))
        before = data
        x = _tell(callback, step, x, data)
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    schedule: Tensor,
    *,
    process: Process,
    callback: Callback | None = None,
    noise: Noise | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021, equations 12 and 16): `euler`, with part of the noise renewed.

    Args:
        eta: in [0, 1], times the standard deviation of the Markov chain's posterior; 0 is
            deterministic, 1 is ancestral sampling (DDPM).
    """
    if eta == 0:
        return euler(denoise, x, schedule, process=process, callback=callback)
    if not 0 <= eta <= 1 or noise is None:
        raise ValueError(f"eta is {eta}: it lies in [0, 1], and above 0 it needs noise=")
    walk = _plan(x, schedule, process)
    chain = walk.sigma_t**2 - (walk.alpha_t / walk.alpha_s * walk.sigma_s) ** 2
    fresh = eta * walk.sigma_s / walk.sigma_t * chain.clamp(min=0.0).sqrt()
    return _renewing(denoise, x, walk, fresh, callback, noise)


def renoise(
    denoise: Denoise,
    x: Tensor,
    schedule: Tensor,
    *,
    process: Process,
    callback: Callback | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Few-step sampling of consistency and DMD students: all of the noise is renewed.

    Each step moves the data estimate back to the next level with fresh noise (Song et al. 2023,
    "Consistency Models", algorithm 1).
    """
    if noise is None:
        raise ValueError("renoise draws fresh noise at every step; pass noise=")
    walk = _plan(x, schedule, process)
    return _renewing(denoise, x, walk, walk.sigma_s, callback, noise)


SAMPLERS = {
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "ddim": ddim,
    "ancestral": functools.partial(ddim, eta=1.0),
    "renoise": renoise,
}


@dataclass(frozen=True)
class _Walk:
    """A checked schedule and its curve: R rows, so R - 1 steps from t to s.

    Levels are (R, B, T) like the latents. What belongs to steps is (R - 1, 1 or B, T) on the CPU,
    in float64 where it is a number: coefficients are computed there and cast once. For frames
    that do not move the numbers are 1 and unused.
    """

    levels: Tensor
    levels_after: Tensor
    moving: Tensor
    alpha_t: Tensor
    alpha_s: Tensor
    sigma_t: Tensor
    sigma_s: Tensor
    moves: Tensor

    @property
    def num_steps(self) -> int:
        return self.levels.shape[0] - 1

    def cast(self, values: Tensor) -> Tensor:
        """Numbers of steps as (R - 1, 1 or B, 1, T, 1, 1) that multiply the latents."""
        if values.is_floating_point():
            values = values.to(self.levels.dtype)
        return values[:, :, None, :, None, None].to(self.levels.device)

    def transport(self) -> tuple[Tensor, Tensor]:
        """The factors of x and D in alpha_s D + sigma_s N."""
        keep = self.sigma_s / self.sigma_t
        return self.cast(keep), self.cast(self.alpha_s - self.alpha_t * keep)

    def move(self, step: int, x: Tensor, moved: Tensor) -> Tensor:
        """`moved` in the frames whose level changes in this step, `x` in the others."""
        return torch.where(self.moves[step], moved, x)


def _plan(x: Tensor, schedule: Tensor, process: Process) -> _Walk:
    if x.ndim != 5 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"sampling needs latents (B, C, T, H, W) in float32 or float64, found "
            f"{tuple(x.shape)} in {x.dtype}; only the network may run narrower"
        )
    batch, num_frames = x.shape[0], x.shape[2]
    table = schedule.detach().to("cpu").double()
    schedules.check(table, batch=batch, num_frames=num_frames)
    table = table if table.ndim == 3 else table[:, None]  # (R, 1 or B, T)
    moving = table[1:] < table[:-1]
    at = process.curve(table)
    steps = (at.alpha[:-1], at.alpha[1:], at.sigma[:-1], at.sigma[1:])
    return _Walk(
        table.to(x.dtype).to(x.device).expand(-1, batch, -1),
        table[1:],
        moving,
        *(torch.where(moving, value, 1.0) for value in steps),
        moves=moving[:, :, None, :, None, None].to(x.device),
    )


def _renewing(
    denoise: Denoise,
    x: Tensor,
    walk: _Walk,
    fresh: Tensor,
    callback: Callback | None,
    noise: Noise,
) -> Tensor:
    """First-order steps in which noise of standard deviation `fresh` takes the place of as much."""
    kept = (walk.sigma_s**2 - fresh**2).clamp(min=0.0).sqrt() / walk.sigma_t
    keep, gain = walk.cast(kept), walk.cast(walk.alpha_s - walk.alpha_t * kept)
    renew, renews = walk.cast(fresh), (walk.moving & (fresh > 0)).flatten(1).any(1).tolist()
    for step in range(walk.num_steps):
        data = _estimate(denoise, x, walk.levels[step])
        moved = torch.addcmul(x * keep[step], data, gain[step])
        if renews[step]:
            moved = torch.addcmul(moved, _like(noise(step), x, "noise"), renew[step])
        x = walk.move(step, x, moved)
        x = _tell(callback, step, x, data)
    return x


def _estimate(denoise: Denoise, x: Tensor, levels: Tensor) -> Tensor:
    return _like(denoise(x, levels), x, "denoise")


def _like(value: Tensor, x: Tensor, name: str) -> Tensor:
    if value.shape != x.shape:
        raise ValueError(f"{name} gave {tuple(value.shape)} for latents {tuple(x.shape)}")
    return value.to(x)


def _tell(callback: Callback | None, step: int, x: Tensor, data: Tensor) -> Tensor:
    changed = None if callback is None else callback(step, x, data)
    return x if changed is None else _like(changed, x, "callback")
