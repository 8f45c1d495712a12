"""Classifier-free guidance: identities, cost, intervals and contrast."""

import pydantic
import pytest
import torch

from opensora.diffusion.flow import Flow, FlowConfig
from opensora.diffusion.guidance import GuidanceConfig, classifier_free
from opensora.types import Condition

SHAPE = (2, 3, 4, 2, 2)


def condition(rows, tokens=3, value=1.0):
    return Condition(
        tokens=torch.full((rows, tokens, 5), value, dtype=torch.float64),
        mask=torch.ones(rows, tokens, dtype=torch.bool),
    )


COND, UNCOND = condition(2, tokens=3, value=2.0), condition(2, tokens=1, value=-1.0)


class Model:
    """Data that depends on x, t and the real tokens of the condition; counts its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, cond):
        assert len(cond) == len(x) == len(t)
        self.calls.append(len(x))
        told = (cond.tokens[..., 0] * cond.mask).sum(1) / cond.mask.sum(1)
        told = told[:, None, None, None, None]
        return torch.sin(x * told + t[:, None, :, None, None])


@pytest.fixture
def x(draw_normal):
    return draw_normal(0, *SHAPE)


@pytest.fixture
def t():
    return torch.tensor([[0.9, 0.5, 0.2, 0.0], [1.0, 0.6, 0.3, 0.1]], dtype=torch.float64)


def test_scale_one_is_the_conditional_model_at_the_cost_of_one_call(x, t):
    model = Model()
    denoise = classifier_free(model, COND, UNCOND, 1.0, rescale=0.7, interval=(0.2, 0.8))
    assert torch.equal(denoise(x, t), Model()(x, t, COND))
    assert model.calls == [2]


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_extrapolates_from_unconditional_through_conditional(x, t, batched):
    model = Model()
    guided = classifier_free(model, COND, UNCOND, 4.0, batched=batched)(x, t)
    told, untold = Model()(x, t, COND), Model()(x, t, UNCOND)
    expected = torch.where((t > 0)[:, None, :, None, None], untold + 4 * (told - untold), told)
    torch.testing.assert_close(guided, expected)
    assert model.calls == ([4] if batched else [2, 2])


def test_scale_zero_is_unconditional(x, t):
    guided = classifier_free(Model(), COND, UNCOND, 0.0)(x, t.clamp(min=0.1))
    torch.testing.assert_close(guided, Model()(x, t.clamp(min=0.1), UNCOND))


def test_one_unconditional_row_serves_all(x, t):
    one = classifier_free(Model(), COND, condition(1, tokens=1, value=-1.0), 3.0)(x, t)
    assert torch.equal(one, classifier_free(Model(), COND, UNCOND, 3.0)(x, t))
    with pytest.raises(ValueError, match="uncond has 3 rows"):
        classifier_free(Model(), COND, condition(3), 3.0)


@pytest.mark.parametrize("prediction", ["velocity", "data", "noise"])
def test_guiding_data_is_guiding_whatever_is_predicted(draw_normal, x, prediction):
    """x_t is shared and the conversion affine, so the combination commutes with it."""
    process = Flow(FlowConfig(prediction=prediction))
    t = torch.full((2, 4), 0.6, dtype=torch.float64)
    told, untold = draw_normal(1, *SHAPE), draw_normal(2, *SHAPE)

    def model(x, t, cond):
        return torch.where(cond.tokens[:, :1, :1, None, None] > 0, told, untold)

    predict = process.denoiser(model)
    guided = classifier_free(predict, COND, UNCOND, 5.0, batched=False)(x, t)
    expected = process.to_data(untold + 5 * (told - untold), x, t)
    torch.testing.assert_close(guided, expected)


def test_frames_outside_the_interval_follow_the_condition(x, t):
    guided = classifier_free(Model(), COND, UNCOND, 4.0, interval=(0.2, 0.9))(x, t)
    told, everywhere = Model()(x, t, COND), classifier_free(Model(), COND, UNCOND, 4.0)(x, t)
    inside = torch.tensor([[True, True, False, False], [False, True, True, False]])
    inside = inside[:, None, :, None, None]
    assert torch.equal(guided, torch.where(inside, everywhere, told))


def test_a_step_wholly_outside_the_interval_costs_one_call(x):
    model = Model()
    denoise = classifier_free(model, COND, UNCOND, 4.0, interval=(0.2, 0.8))
    high = torch.full((2, 4), 0.9, dtype=torch.float64)
    assert torch.equal(denoise(x, high), Model()(x, high, COND))
    assert model.calls == [2]


def test_full_rescale_restores_the_contrast_of_every_frame(x, t):
    t = t.clamp(min=0.1)
    told = Model()(x, t, COND)
    plain = classifier_free(Model(), COND, UNCOND, 6.0)(x, t)
    restored = classifier_free(Model(), COND, UNCOND, 6.0, rescale=1.0)(x, t)
    wanted = told.std(dim=(1, 3, 4))
    torch.testing.assert_close(restored.std(dim=(1, 3, 4)), wanted)
    assert (plain.std(dim=(1, 3, 4)) > 1.5 * wanted).all()


def test_partial_rescale_lies_between(x, t):
    """Lin et al. 2023, equation 16."""
    t = t.clamp(min=0.1)
    plain, half, full = (
        classifier_free(Model(), COND, UNCOND, 6.0, rescale=phi)(x, t) for phi in (0.0, 0.7, 1.0)
    )
    torch.testing.assert_close(half, 0.7 * full + 0.3 * plain)


def test_rescale_survives_a_constant_estimate(x, t):
    flat = classifier_free(lambda x, t, cond: 0 * x, COND, UNCOND, 3.0, rescale=0.7)(x, t)
    assert (flat == 0).all()


def test_config_holds_the_keyword_arguments(x, t):
    config = GuidanceConfig(scale=3.0, rescale=0.5, interval=(0.1, 0.9), batched=False)
    told = classifier_free(Model(), COND, UNCOND, **config.model_dump())(x, t)
    expected = classifier_free(
        Model(), COND, UNCOND, 3.0, rescale=0.5, interval=(0.1, 0.9), batched=False
    )(x, t)
    assert torch.equal(told, expected)


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.8, 0.2), (-0.1, 1.0), (0.0, 1.1)])
def test_intervals_that_are_empty_or_outside_are_refused(interval):
    with pytest.raises(pydantic.ValidationError, match="0 <= low < high <= 1"):
        GuidanceConfig(interval=interval)


GIVEN = torch.tensor([True, False, False, False])


def hide(x, t):
    return x.masked_fill(GIVEN[:, None, None], 7.0), t.masked_fill(GIVEN, 1.0)


class Sees(Model):
    """Data that depends on the first frame as well."""

    def __call__(self, x, t, cond):
        return super().__call__(x, t, cond) + x[:, :, :1] + t[:, None, :1, None, None]


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_by_given_frames_has_three_branches(x, t, batched):
    model = Sees()
    t = t.clamp(min=0.1).masked_fill(GIVEN, 0.0)
    options = {"frames_scale": 3.0, "batched": batched}
    guided = classifier_free(model, COND, UNCOND, 5.0, hide=hide, **options)(x, t)
    assert model.calls == ([6] if batched else [2, 2, 2])
    told, seen, blind = Sees()(x, t, COND), Sees()(x, t, UNCOND), Sees()(*hide(x, t), UNCOND)
    expected = blind + 3 * (seen - blind) + 5 * (told - seen)
    torch.testing.assert_close(guided[:, :, 1:], expected[:, :, 1:])
    torch.testing.assert_close(guided[:, :, :1], told[:, :, :1])


def test_every_branch_passes_a_condition_of_its_own_in_every_step(x, t):
    """Step caches tell branches by that object; a solver of two stages calls each of them twice."""
    seen: dict[int, set[bool]] = {}

    def predict(x, t, cond):
        seen.setdefault(id(cond), set()).add(bool((t == 1).any()))  # whether frames are hidden
        return x

    t = t.clamp(0.1, 0.9).masked_fill(GIVEN, 0.0)
    for scale, branches in ((5.0, 3), (1.0, 2)):
        seen.clear()
        options = {"frames_scale": 3.0, "oscillation": "frames", "batched": False}
        guide = classifier_free(predict, COND, UNCOND, scale, hide=hide, **options)
        for step in range(13):
            guide(x, t)
            guide(x, t)
            guide.after(step)
        assert sorted(map(sorted, seen.values())) == [[False]] * (branches - 1) + [[True]]


def test_frames_alone_can_guide_with_two_branches(x, t):
    model = Sees()
    t = t.clamp(min=0.1).masked_fill(GIVEN, 0.0)
    guided = classifier_free(model, COND, UNCOND, 1.0, hide=hide, frames_scale=3.0)(x, t)
    told, blind = Sees()(x, t, COND), Sees()(*hide(x, t), COND)
    torch.testing.assert_close(guided[:, :, 1:], (blind + 3 * (told - blind))[:, :, 1:])
    assert model.calls == [4]


def test_oscillating_guidance_rests_in_every_other_step_after_the_tenth(x, t):
    model = Model()
    guide = classifier_free(model, COND, UNCOND, 4.0, oscillation="text", num_steps=14)
    for step in range(14):
        guide(x, t)
        guide.after(step)
    assert model.calls == [4] * 11 + [2, 4, 2]


def test_a_ramp_guides_later_frames_more_and_later_steps_less(x, t):
    t = t.clamp(min=0.1)
    ramp = classifier_free(
        Sees(), COND, UNCOND, 1.0, hide=hide, frames_scale=3.0, frames_ramp=True, num_steps=4
    )
    told, blind = Sees()(x, t, COND), Sees()(*hide(x, t), COND)
    for step, last in enumerate([3.0, 2.5, 2.0, 1.5]):
        scale = torch.linspace(1, last, 4, dtype=x.dtype)[:, None, None]
        torch.testing.assert_close(ramp(x, t), blind + scale * (told - blind))
        ramp.after(step)


def test_a_weaker_model_takes_the_place_of_the_null_text(x, t):
    weak = lambda x, t, cond: 0.5 * Model()(x, t, cond)  # noqa: E731
    t = t.clamp(min=0.1)
    told = Model()(x, t, COND)
    guided = classifier_free(Model(), COND, UNCOND, 3.0, weaker=weak)(x, t)
    torch.testing.assert_close(guided, 2.0 * told)
    with pytest.raises(ValueError, match="needs hide= and no weaker model"):
        classifier_free(Model(), COND, UNCOND, 3.0, weaker=weak, hide=hide, frames_scale=2.0)
    with pytest.raises(ValueError, match="needs hide="):
        classifier_free(Model(), COND, UNCOND, 3.0, frames_scale=2.0)
