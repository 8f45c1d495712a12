"""Solvers against closed forms: exactness, order of convergence, and frames at their own levels."""

import itertools
import math
import re
import textwrap
from pathlib import Path

import pytest
import torch

from opensora.diffusion.flow import Flow
from opensora.diffusion.gaussian import DDPMConfig, EDMConfig, Gaussian
from opensora.diffusion.guidance import classifier_free
from opensora.diffusion.masks import ends
from opensora.diffusion.samplers import SAMPLERS, ddim, dpmpp_2m, euler, heun, renoise
from opensora.diffusion.schedule import autoregressive, full_sequence, pyramid
from opensora.types import Condition

SHAPE = (2, 3, 4, 2, 2)
DETERMINISTIC = ["euler", "heun", "dpmpp_2m", "ddim"]
SMOOTH = {"flow": Flow(), "edm": Gaussian(EDMConfig())}


@pytest.fixture
def noise(draw_normal):
    """step -> noise, the same whenever the step is asked for again."""
    return lambda step: draw_normal(1000 + step, *SHAPE)


@pytest.fixture
def start(draw_normal):
    return draw_normal(0, *SHAPE)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_a_single_clip_of_data_is_reached_exactly(
    any_curve, draw_normal, start, noise, name, num_steps
):
    data = draw_normal(1, *SHAPE)
    schedule = full_sequence(num_steps, 4)
    x = SAMPLERS[name](lambda x, t: data, start, schedule, process=any_curve, noise=noise)
    # Each step rounds a sum of numbers below 6; Heun also divides by a sigma of at least 0.1.
    torch.testing.assert_close(x, data, rtol=0, atol=num_steps * 1e-14)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_with_constant_estimates_every_step_lies_on_the_curve(any_curve, draw_normal, name):
    data, noise = draw_normal(1, *SHAPE), draw_normal(2, *SHAPE)
    schedule = full_sequence(5, 4, shift=3.0).double()
    seen = []
    SAMPLERS[name](
        lambda x, t: data,
        any_curve.corrupt(data, noise, schedule[0].expand(2, -1)),
        schedule,
        process=any_curve,
        callback=lambda step, x, estimate: seen.append(x),
    )
    for levels, x in zip(schedule[1:], seen, strict=True):
        expected = any_curve.corrupt(data, noise, levels.expand(2, -1))
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-13)


def error(name, data, start, schedule):
    x = SAMPLERS[name](data.denoise, start, schedule, process=data.process)
    return (x - data.solve(start, schedule[0, 0].item())).abs().max().item()


@pytest.mark.parametrize("curve", SMOOTH)
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_doubling_the_steps_divides_the_error_by_two_to_the_order(
    normal_data, start, curve, name, order
):
    data = normal_data(SMOOTH[curve], start)
    coarse, fine = (error(name, data, start, full_sequence(n, 4).double()) for n in (64, 128))
    # The next term of the error is one step (1/64) relative to the leading one, or a few of them.
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("curve", SMOOTH)
def test_dpmpp_2m_has_order_two_in_log_snr(normal_data, start, curve):
    """Its own setting: even steps of log(alpha / sigma), measured before the last step to 0."""
    process = SMOOTH[curve]
    data = normal_data(process, start)
    level = {"flow": lambda r: r / (1 + r), "edm": lambda r: r.atan() * 2 / math.pi}[curve]

    def error_before_zero(num_steps):
        log_ratio = torch.linspace(math.log(99), -math.log(99), num_steps + 1, dtype=torch.float64)
        levels = torch.cat([level(log_ratio.exp()), torch.zeros(1, dtype=torch.float64)])
        seen = []
        dpmpp_2m(
            data.denoise,
            start,
            levels[:, None].expand(-1, 4),
            process=process,
            callback=lambda step, x, estimate: seen.append(x),
        )
        # Both this x and the start lie on exact trajectories that end in the same data.
        ends = data.solve(start, levels[0].item()), data.solve(seen[-2], levels[-2].item())
        return (ends[0] - ends[1]).abs().max().item()

    coarse, fine = error_before_zero(64), error_before_zero(128)
    assert math.log2(coarse / fine) == pytest.approx(2, abs=0.1)


def test_dpmpp_2m_on_even_levels_loses_only_a_logarithm(normal_data, start):
    """Near both ends log-SNR steps stay of order one, which costs a factor log(num_steps)."""
    data = normal_data(Flow(), start)
    coarse, fine = (
        error("dpmpp_2m", data, start, full_sequence(n, 4).double()) for n in (256, 512)
    )
    expected = 2 - math.log2(math.log(512) / math.log(256))
    assert math.log2(coarse / fine) == pytest.approx(expected, abs=0.05)


def test_euler_depends_on_the_ratio_of_noise_to_data_only(normal_data, start):
    """The line and the circle are two scalings of one trajectory (DDIM's invariance)."""
    ratio = torch.linspace(3, -3, 9, dtype=torch.float64).exp()
    ends = []
    for process, levels in (
        (SMOOTH["flow"], ratio / (1 + ratio)),
        (SMOOTH["edm"], ratio.atan() * 2 / math.pi),
    ):
        schedule = torch.cat([levels.new_ones(1), levels, levels.new_zeros(1)])[:, None]
        denoise = normal_data(process, start).denoise
        ends.append(euler(denoise, start, schedule.expand(-1, 4), process=process))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-12)


def test_on_the_line_euler_and_heun_step_along_velocities(normal_data, start):
    data = normal_data(Flow(), start)
    schedule = full_sequence(4, 4, shift=2.0).double()

    def velocity(x, t):
        return (x - data.denoise(x, t.expand(2, 4))) / t[0]

    x_euler = x_heun = start
    for t, s in itertools.pairwise(schedule):
        x_euler = x_euler + (s - t)[0] * velocity(x_euler, t)
        first = velocity(x_heun, t)
        ahead = x_heun + (s - t)[0] * first
        x_heun = x_heun + (s - t)[0] * (first + velocity(ahead, s)) / 2 if s[0] > 0 else ahead
    flow = Flow()
    torch.testing.assert_close(euler(data.denoise, start, schedule, process=flow), x_euler)
    torch.testing.assert_close(heun(data.denoise, start, schedule, process=flow), x_heun)


def test_ddim_without_eta_is_euler(any_curve, normal_data, start):
    data = normal_data(any_curve, start)
    schedule = pyramid(6, 4, lag=2)
    assert torch.equal(
        ddim(data.denoise, start, schedule, process=any_curve),
        euler(data.denoise, start, schedule, process=any_curve),
    )


def test_ancestral_step_is_the_posterior_of_ddpm(draw_normal, start, noise):
    """Ho et al. 2020, equations 6 and 7, from step 500 to 499 of the linear table."""
    process, data = Gaussian(DDPMConfig()), draw_normal(1, *SHAPE)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = (1 - beta).cumprod(0)
    b, now, before = beta[499], alpha_bar[499], alpha_bar[498]
    mean = before.sqrt() * b / (1 - now) * data
    mean = mean + (1 - b).sqrt() * (1 - before) / (1 - now) * start
    std = ((1 - before) / (1 - now) * b).sqrt()
    seen = []
    SAMPLERS["ancestral"](
        lambda x, t: data,
        start,
        torch.tensor([0.5, 0.499, 0.0], dtype=torch.float64)[:, None].expand(-1, 4),
        process=process,
        noise=noise,
        callback=lambda step, x, estimate: seen.append(x),
    )
    torch.testing.assert_close(seen[0], mean + std * noise(0), rtol=0, atol=1e-11)


def test_renoise_puts_the_estimate_back_at_each_level_with_fresh_noise(
    any_curve, draw_normal, start, noise
):
    data = draw_normal(1, *SHAPE)
    schedule = full_sequence(3, 4)
    seen, drawn = [], []

    def remembered(step):
        drawn.append(step)
        return noise(step)

    renoise(
        lambda x, t: data,
        start,
        schedule,
        process=any_curve,
        noise=remembered,
        callback=lambda step, x, estimate: seen.append(x),
    )
    for step, x in enumerate(seen):
        levels = schedule[step + 1].double().expand(2, -1)
        expected = any_curve.corrupt(data, noise(step), levels)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-14)
    assert drawn == [0, 1]  # the last step ends in data, which needs no noise


@pytest.mark.parametrize("name", SAMPLERS)
def test_given_frames_stay_bit_for_bit(any_curve, normal_data, start, noise, name):
    given = torch.tensor([True, False, False, True])
    data = normal_data(any_curve, start)
    start[:, :, 0] = -0.0  # a sum with a zero would turn this into +0

    def denoise(x, t):
        assert (t[:, given] == 0).all()
        return torch.where(given[:, None, None], torch.nan, data.denoise(x, t))

    x = SAMPLERS[name](
        denoise, start, full_sequence(5, 4, given=given), process=any_curve, noise=noise
    )
    assert torch.equal(x[:, :, given].view(torch.int64), start[:, :, given].view(torch.int64))
    assert x.isfinite().all()
    assert not torch.equal(x[:, :, ~given], start[:, :, ~given])


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize(
    "staircase", [autoregressive(5, 4, chunk=2), pyramid(5, 4, lag=1), pyramid(5, 4, lag=3)]
)
def test_a_frame_in_a_staircase_takes_the_steps_it_would_take_alone(
    any_curve, normal_data, start, name, staircase
):
    """The perfect denoiser of independent frames ignores the others, and so must the solver."""
    data = normal_data(any_curve, start)
    together = SAMPLERS[name](data.denoise, start, full_sequence(5, 4), process=any_curve)
    in_turn = SAMPLERS[name](data.denoise, start, staircase, process=any_curve)
    assert torch.equal(in_turn, together)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_may_differ_in_their_given_frames(any_curve, normal_data, start, noise, name):
    given = torch.tensor([[True, False, False, False], [False, False, False, True]])
    data = normal_data(any_curve, start)
    both = SAMPLERS[name](
        data.denoise, start, full_sequence(4, 4, given=given), process=any_curve, noise=noise
    )
    for row in range(2):
        alone = SAMPLERS[name](
            data.denoise,
            start,
            full_sequence(4, 4, given=given[row]),
            process=any_curve,
            noise=noise,
        )
        assert torch.equal(both[row], alone[row])


@pytest.mark.parametrize(
    ("name", "calls"),
    [("euler", 6), ("ddim", 6), ("dpmpp_2m", 6), ("ancestral", 6), ("renoise", 6), ("heun", 11)],
)
def test_number_of_network_calls(start, noise, name, calls):
    seen = []

    def denoise(x, t):
        assert t.shape == (2, 4)
        assert t.dtype == x.dtype
        seen.append(t[0, 0].item())
        return x

    SAMPLERS[name](denoise, start, full_sequence(6, 4), process=Flow(), noise=noise)
    assert len(seen) == calls
    assert seen[0] == 1
    assert min(seen) > 0  # the network is never asked for what data it sees in data


@pytest.mark.parametrize("name", SAMPLERS)
def test_callback_sees_every_step_and_can_cancel(start, noise, name):
    steps = []

    def callback(step, x, data):
        assert x.shape == data.shape == start.shape
        steps.append(step)
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SAMPLERS[name](
            lambda x, t: x / 2,
            start,
            full_sequence(6, 4),
            process=Flow(),
            noise=noise,
            callback=callback,
        )
    assert steps == [0, 1, 2]


@pytest.mark.parametrize("name", SAMPLERS)
def test_latents_passed_in_are_not_written_to(start, noise, name):
    before = start.clone()
    SAMPLERS[name](lambda x, t: x / 2, start, full_sequence(3, 4), process=Flow(), noise=noise)
    assert torch.equal(start, before)


@pytest.mark.parametrize("name", SAMPLERS)
def test_float32_agrees_with_float64(any_curve, normal_data, start, noise, name):
    data = normal_data(any_curve, start)
    schedule = full_sequence(20, 4, shift=3.0)
    wide = SAMPLERS[name](data.denoise, start, schedule, process=any_curve, noise=noise)

    def narrow_denoise(x, t):
        return data.denoise(x.double(), t.double()).bfloat16()  # 8 bits: 2^-9 relative

    narrow = SAMPLERS[name](narrow_denoise, start.float(), schedule, process=any_curve, noise=noise)
    assert narrow.dtype == torch.float32
    # A rounding of an estimate up to 4 is 2^-7; the trajectory adds at most a few of them.
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=4 * 2**-7)


def test_what_does_not_fit_is_refused(start, noise):
    schedule = full_sequence(3, 4)
    with pytest.raises(ValueError, match="only the network may run narrower"):
        euler(lambda x, t: x, start.bfloat16(), schedule, process=Flow())
    with pytest.raises(ValueError, match="schedule has shape"):
        euler(lambda x, t: x, start, full_sequence(3, 5), process=Flow())
    with pytest.raises(ValueError, match="denoise gave"):
        euler(lambda x, t: x[:1], start, schedule, process=Flow())
    with pytest.raises(ValueError, match="pass noise="):
        renoise(lambda x, t: x, start, schedule, process=Flow())
    with pytest.raises(ValueError, match="above 0 it needs noise="):
        ddim(lambda x, t: x, start, schedule, process=Flow(), eta=0.5)
    with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
        ddim(lambda x, t: x, start, schedule, process=Flow(), noise=noise, eta=1.5)
    with pytest.raises(ValueError, match="noise gave"):
        renoise(lambda x, t: x, start, schedule, process=Flow(), noise=lambda step: start[:1])


def test_the_recipe_of_the_docs_samples_and_keeps_the_given_frame(draw_normal, normal_data):
    """The lines under "Sampling" in docs/diffusion.md, as they stand there."""
    text = (Path(__file__).parents[2] / "docs" / "diffusion.md").read_text(encoding="utf-8")
    recipe = re.search(r"## Sampling\n\n((?: {4}.*\n)+)", text)
    assert recipe is not None
    process, noise = Flow(), draw_normal(1, *SHAPE)
    data = normal_data(process, noise)
    given_latents = data.solve(draw_normal(2, *SHAPE), 1.0)
    cond = Condition(torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.bool))

    def model(x, t, condition):
        frame = t[:, None, :, None, None]
        rows = data.denoise(x[:2], t[:2]).repeat(len(x) // 2, 1, 1, 1, 1)
        return (x - rows) / frame.clamp(min=1e-3)  # the velocity that leads to this data

    names = {
        "full_sequence": full_sequence, "classifier_free": classifier_free, "SAMPLERS": SAMPLERS,
        "process": process, "noise": noise, "given_latents": given_latents, "model": model,
        "cond": cond, "uncond": cond[:1], "mask": ends(4, head=1), "B": 2, "T": 4, "s": 3.0,
    }  # fmt: skip
    exec(textwrap.dedent(recipe.group(1)), names)
    assert torch.equal(names["x"][:, :, 0], given_latents[:, :, 0])
    # Both conditions say the same, so guidance changes nothing but the last digits.
    start = Flow().corrupt(given_latents, noise, names["schedule"][0].expand(2, -1))
    alone = dpmpp_2m(data.denoise, start, names["schedule"], process=process)
    torch.testing.assert_close(names["x"], alone, rtol=0, atol=1e-12)
