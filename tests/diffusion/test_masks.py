"""Masks: each task's frames, the ratios of training, and independence of the batch."""

import math

import pydantic
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.diffusion.masks import MASK_NAMES, MaskConfig, draw, ends, every_other, num_uniforms
from opensora.errors import UsageError

# Open-Sora 1.2, stage 3, with the spelling of its config.
OPEN_SORA = {
    "random": 0.01,
    "intepolate": 0.002,
    "quarter_random": 0.002,
    "quarter_head": 0.002,
    "quarter_tail": 0.002,
    "quarter_head_tail": 0.002,
    "image_random": 0.0,
    "image_head": 0.22,
    "image_tail": 0.005,
    "image_head_tail": 0.005,
}


def uniforms(count, num_frames, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, num_uniforms(num_frames), generator=generator)


def only(name, num_frames=12, count=2000):
    return draw(uniforms(count, num_frames), num_frames, MaskConfig(ratios={name: 1.0}))


def lengths_of_runs(given):
    """How many frames are given, where they are one run; fails where they are not."""
    edges = given.int().diff(dim=1, prepend=torch.zeros(len(given), 1, dtype=torch.int)) == 1
    assert (edges.sum(dim=1) == 1).all()
    return given.sum(dim=1)


def test_ends_are_the_tasks_of_the_docs():
    assert ends(4).tolist() == [False] * 4
    assert ends(4, head=1).tolist() == [True, False, False, False]
    assert ends(4, tail=2).tolist() == [False, False, True, True]
    assert ends(4, head=1, tail=1).tolist() == [True, False, False, True]


def test_every_other_frame_is_given_to_interpolate():
    assert every_other(5).tolist() == [True, False, True, False, True]
    assert every_other(5, start=1).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("counts", [(4, 0), (2, 2), (-1, 0), (0, -1)])
def test_ends_leave_a_frame_to_make(counts):
    with pytest.raises(UsageError, match="leave at least one frame"):
        ends(4, head=counts[0], tail=counts[1])


@pytest.mark.parametrize(("num_frames", "start"), [(1, 0), (5, 2)])
def test_interpolation_needs_two_frames(num_frames, start):
    with pytest.raises(UsageError, match="interpolation starts"):
        every_other(num_frames, start=start)


def test_identity_gives_nothing_and_is_what_ratios_leave():
    assert not only("identity").any()
    assert not draw(uniforms(500, 8), 8, MaskConfig()).any()


def test_image_masks_give_one_frame():
    assert only("image_head").equal(ends(12, head=1).expand(2000, -1))
    assert only("image_tail").equal(ends(12, tail=1).expand(2000, -1))
    assert only("image_head_tail").equal(ends(12, head=1, tail=1).expand(2000, -1))
    anywhere = only("image_random")
    assert (anywhere.sum(dim=1) == 1).all()
    assert anywhere.any(dim=0).all()


def test_quarter_masks_give_runs_of_up_to_a_quarter():
    for name in ("quarter_random", "quarter_head", "quarter_tail"):
        given = only(name)
        assert lengths_of_runs(given).unique().tolist() == [1, 2, 3]
    assert only("quarter_head")[:, 0].all()
    assert only("quarter_tail")[:, -1].all()
    assert only("quarter_random").any(dim=0).all()
    both = only("quarter_head_tail")
    assert both.sum(dim=1).unique().tolist() == [2, 4, 6]
    assert both.equal(both.flip(1))


def test_interpolate_gives_even_or_odd_frames():
    given = only("interpolate")
    rows = given.unique(dim=0)
    assert rows.tolist() == [every_other(12, start=1).tolist(), every_other(12).tolist()]


def test_random_gives_a_tenth_to_nine_tenths_of_the_frames():
    given = only("random", num_frames=200, count=3000)
    share = given.double().mean(dim=1)
    # Uniform in [0.1, 0.9]: mean 0.5, standard deviation 0.8 / sqrt(12), within five errors.
    assert share.mean().item() == pytest.approx(0.5, abs=5 * 0.231 / math.sqrt(3000))
    # Binomial noise around the extremes is sqrt(0.09 / 200) = 0.021; five of them.
    assert share.min() > 0.1 - 0.11
    assert share.max() < 0.9 + 0.11
    assert share.min() < 0.2
    assert share.max() > 0.8


def test_kinds_come_in_the_ratios_of_the_config():
    """Five standard deviations of a binomial: fails once in 1.7 million for each kind."""
    count, num_frames = 20_000, 12
    config = MaskConfig(ratios=OPEN_SORA)
    given = draw(uniforms(count, num_frames), num_frames, config)
    head_only = (given == ends(num_frames, head=1)).all(dim=1).double().mean().item()
    # quarter_head and quarter_random add their runs of one frame that starts at frame 0.
    expected = 0.22 + 0.002 / 3 + 0.002 / 3 / 12
    assert head_only == pytest.approx(expected, abs=5 * math.sqrt(0.22 * 0.78 / count))
    nothing = (~given).all(dim=1).double().mean().item()
    assert nothing == pytest.approx(0.75, abs=5 * math.sqrt(0.75 * 0.25 / count))


def test_boundaries_of_the_ratios_are_exact():
    config = MaskConfig(ratios={"image_head": 0.25, "image_tail": 0.25})
    u = torch.zeros(5, num_uniforms(4), dtype=torch.float64)
    u[:, 0] = torch.tensor([0.0, 0.2499, 0.25, 0.4999, 0.5], dtype=torch.float64)
    head, tail, none = ends(4, head=1), ends(4, tail=1), ends(4)
    assert draw(u, 4, config).equal(torch.stack([head, head, tail, tail, none]))


def test_order_of_names_in_the_config_does_not_matter():
    u = uniforms(500, 9)
    forward = MaskConfig(ratios=OPEN_SORA)
    backward = MaskConfig(ratios=dict(reversed(OPEN_SORA.items())))
    assert draw(u, 9, forward).equal(draw(u, 9, backward))


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(MASK_NAMES), st.integers(1, 20), st.integers(0, 1000))
def test_a_frame_is_always_left_to_make(name, num_frames, seed):
    given_frames = draw(uniforms(64, num_frames, seed), num_frames, MaskConfig(ratios={name: 1.0}))
    assert given_frames.shape == (64, num_frames)
    assert not given_frames.all(dim=1).any()


@pytest.mark.parametrize("extreme", [0.0, 1 - 2.0**-24])
def test_extreme_uniform_numbers_stay_inside_the_clip(extreme):
    for name in MASK_NAMES[1:]:
        for num_frames in (2, 3, 12, 13):
            u = torch.full((1, num_uniforms(num_frames)), extreme)
            given_frames = draw(u, num_frames, MaskConfig(ratios={name: 1.0}))
            if name != "random":
                assert given_frames.any(), (name, num_frames)
            assert not given_frames.all()


def test_short_clips_are_masked_too():
    """Open-Sora masks nothing below 8 latent frames; 17 pixel frames are only 5."""
    assert only("image_head", num_frames=5).equal(ends(5, head=1).expand(2000, -1))
    assert only("quarter_head", num_frames=5).equal(ends(5, head=1).expand(2000, -1))


def test_a_mask_depends_on_its_own_sample_only():
    u, config = uniforms(50, 7), MaskConfig(ratios=dict.fromkeys(MASK_NAMES[1:], 0.1))
    alone = torch.cat([draw(row[None], 7, config) for row in u])
    assert draw(u, 7, config).equal(alone)


def test_names_are_checked_and_known_misspellings_understood():
    assert MaskConfig(ratios={"intepolate": 0.1, "none": 0.9}).ratios == {
        "interpolate": 0.1,
        "identity": 0.9,
    }
    with pytest.raises(pydantic.ValidationError, match="Did you mean 'image_head'"):
        MaskConfig(ratios={"image_heads": 0.1})
    with pytest.raises(pydantic.ValidationError, match="both given"):
        MaskConfig(ratios={"intepolate": 0.1, "interpolate": 0.1})


@pytest.mark.parametrize("ratios", [{"image_head": 1.2}, {"image_head": -0.1}])
def test_ratios_are_probabilities(ratios):
    with pytest.raises(pydantic.ValidationError, match="lies in"):
        MaskConfig(ratios=ratios)


def test_ratios_sum_to_at_most_one():
    with pytest.raises(pydantic.ValidationError, match=r"sum to 1\.1"):
        MaskConfig(ratios={"image_head": 0.6, "image_tail": 0.5})


def test_uniform_numbers_of_the_wrong_count_are_refused():
    with pytest.raises(ValueError, match=r"need uniforms of shape \(B, 7\)"):
        draw(torch.rand(2, 5), 4, MaskConfig())
