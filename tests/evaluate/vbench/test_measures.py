"""Each dimension's arithmetic on features, frames and flows whose scores are known by hand."""

import math

import numpy as np
import pytest
import torch

from opensora.errors import DataError
from opensora.evaluate.vbench import measures, proxies
from opensora.evaluate.vbench.measures import Measured

from .conftest import slide


def turning(*degrees: float) -> torch.Tensor:
    """Unit vectors of a plane at these angles, each of another length."""
    angles = torch.deg2rad(torch.tensor(degrees))
    lengths = torch.arange(1, len(degrees) + 1)[:, None]
    return torch.stack([angles.cos(), angles.sin()], -1) * lengths


def test_consistency_compares_with_the_frame_before_and_the_first():
    found = measures.consistency(turning(0, 60, 60))
    # frame 1: (cos 60 + cos 60) / 2; frame 2: (1 + cos 60) / 2
    assert found.value == pytest.approx((0.5 + 0.75) / 2)
    assert found.weight == 2


def test_negative_similarity_counts_as_none():
    assert measures.consistency(turning(0, 120)).value == 0
    assert measures.consistency(turning(0, 120, 120)).value == pytest.approx(0.25)


def test_a_still_picture_is_perfectly_consistent():
    assert measures.consistency(turning(30, 30, 30)).value == pytest.approx(1)


def test_videos_weigh_by_their_compared_frames():
    short, long = Measured(1.0, 1), Measured(0.0, 3)
    assert measures.mean([short, long]) == 0.25
    assert measures.mean([Measured(1.0), Measured(0.0)]) == 0.5


def test_likeness_weighs_the_nearest_frame_the_mean_step_and_the_largest_step():
    at = lambda degrees: math.cos(math.radians(degrees))  # noqa: E731
    found = measures.likeness(turning(80)[0], turning(0, 10, 30, 60))
    steps = [at(10), at(20), at(30)]
    assert found.value == pytest.approx(0.4 * at(20) + 0.3 * np.mean(steps) + 0.3 * at(30))
    assert found.weight == 1
    opposite = measures.likeness(turning(180)[0], turning(0, 0))
    assert opposite.value == pytest.approx(0.6), "a negative similarity counts as none"


def test_flickering_is_the_mean_difference_of_neighbours():
    frames = np.zeros((3, 4, 6, 3), np.uint8)
    frames[1] = 51  # differs from both neighbours by a fifth
    assert measures.flickering(frames).value == pytest.approx(0.8)
    frames[1] = 255
    assert measures.flickering(frames).value == 0
    assert measures.flickering(frames[[0, 0, 2]]).value == 1


@pytest.mark.parametrize(
    "measure",
    [lambda: measures.consistency(turning(0)), lambda: measures.flickering(slide(1, 8, 8, 0))],
)
def test_one_frame_is_refused(measure):
    with pytest.raises(DataError, match="one frame is no video"):
        measure()


def test_the_aesthetic_head_sees_unit_features_and_scores_tenths():
    features = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    weight, bias = torch.tensor([[5.0, 10.0]]), torch.tensor([1.0])
    # (5*.6 + 10*.8 + 1) / 10 and (10 + 1) / 10
    assert measures.aesthetic(features, weight, bias).value == pytest.approx((1.2 + 1.1) / 2)


def test_style_is_the_scaled_cosine_of_every_frame():
    found = measures.style(turning(0, 60), turning(60)[0], 100.0)
    assert found.value == pytest.approx((0.5 + 1.0) / 2)
    assert found.weight == 2
    assert measures.style(turning(0), turning(60)[0], 50.0).value == pytest.approx(0.25)


def test_the_fastest_five_percent_are_averaged():
    flow = torch.zeros(2, 10, 10)
    flow[0, 0, :5] = 3.0
    flow[1, 0, :5] = torch.tensor([4.0, 4.0, 4.0, 4.0, 0.0])
    assert measures.top_magnitude(flow, 0.05) == pytest.approx((4 * 5 + 3) / 5)
    assert measures.top_magnitude(flow, 0.02) == pytest.approx(5)
    assert measures.top_magnitude(flow, 0.001) == pytest.approx(5)


def test_dynamic_degree_looks_at_eight_frames_a_second():
    assert list(measures.kept_frames(7, 24)) == [0, 3, 6]
    assert list(measures.kept_frames(4, 8)) == [0, 1, 2, 3]
    assert list(measures.kept_frames(3, 2)) == [0, 1, 2]
    assert measures.kept_frames(100, 30).step == 4


def test_a_video_is_dynamic_when_a_quarter_of_its_pairs_move():
    size = (256, 400)  # the threshold is 6 pixels
    assert measures.is_dynamic([7] * 4 + [0] * 11, 16, size)
    assert not measures.is_dynamic([7] * 3 + [0] * 12, 16, size)
    assert not measures.is_dynamic([6.0] * 15, 16, size)
    assert measures.is_dynamic([3.1] * 15, 16, (500, 128))
    # round(4 * 10 / 16) is 2, to even
    assert measures.is_dynamic([7, 7], 10, size)
    assert not measures.is_dynamic([7, 0], 10, size)
    # of two frames no pair need move, but there must be one
    assert measures.is_dynamic([0.0], 2, size)
    assert not measures.is_dynamic([], 1, size)


def test_a_video_is_static_when_few_pairs_move_and_its_ends_are_near():
    size = (256, 256)  # the threshold is 3 pixels; of 16 frames 2 pairs may move
    still = [0.0, 0.0]
    assert measures.is_static([4, 4] + [0] * 13 + still, 16, size)
    assert not measures.is_static([4, 4, 4] + [0] * 12 + still, 16, size)
    assert measures.is_static([0] * 15 + [12.0, 12.0], 16, size)
    assert not measures.is_static([0] * 15 + [12.1, 0.0], 16, size)
    assert not measures.is_static([0] * 15 + [0.0, 12.1], 16, size)


@pytest.mark.parametrize("step", [1, 3, 6])
def test_block_matching_finds_how_far_a_picture_moves(step):
    # At 128 pixels nothing is resized, and a pixel is two of the 256 that figures are given in.
    # Blocks at the edge, whose content has left, match elsewhere: they are among the fastest.
    assert 2 * step <= proxies.motion(slide(4, 128, 128, step)) <= 2 * step * 1.3


def test_a_still_picture_and_its_noise_do_not_move():
    assert proxies.motion(slide(4, 64, 96, 0)) == 0
    noisy = slide(4, 128, 128, 0).astype(int)
    noisy += np.random.default_rng(0).integers(-2, 3, noisy.shape)
    assert proxies.motion(noisy.clip(0, 255).astype(np.uint8)) < 0.5
    assert proxies.motion(np.full((3, 20, 30, 3), 7, np.uint8)) == 0


def test_smoothness_is_the_residual_of_an_average():
    ramp = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.full((1, 4, 4, 3), 10, np.uint8)
    assert proxies.smoothness(ramp) == 1
    ramp[1] += 51
    assert proxies.smoothness(ramp) == pytest.approx(1 - 0.2 / 2)
    with pytest.raises(DataError, match="three frames"):
        proxies.smoothness(ramp[:2])
    with pytest.raises(DataError, match="one frame"):
        proxies.motion(ramp[:1])
