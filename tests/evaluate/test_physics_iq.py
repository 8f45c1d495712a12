"""Physics-IQ's masks, measures and score against OpenCV's figures and cases one can work out."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from opensora.arena.draw import render
from opensora.arena.scenes import SceneConfig, sample
from opensora.errors import DataError
from opensora.evaluate.physics_iq import measure, motion_masks, score

BEST = {"spatial_iou": 0.8, "spatiotemporal_iou": 0.5, "weighted_spatial_iou": 0.6, "mse": 0.002}


def scene(index: int) -> np.ndarray:
    return render(sample(SceneConfig(), 0, index))


def test_masks_are_opencvs_bit_for_bit():
    """Figures of OpenCV 5.0 (cvtColor, GaussianBlur, accumulateWeighted, convertScaleAbs,
    absdiff, threshold, morphologyEx) on the same random walk of blocks."""
    walk = np.cumsum(np.random.default_rng(0).normal(0, 20, (9, 16, 12, 3)), 0)
    video = np.clip(128 + walk, 0, 255).repeat(5, 1).repeat(5, 2)[:, :78, :58].astype(np.uint8)
    masks = motion_masks(video)
    assert masks.sum((1, 2)).tolist() == [0, 316, 337, 396, 292, 478, 324, 343, 223]
    digest = hashlib.sha256(np.packbits(masks).tobytes()).hexdigest()
    assert digest.startswith("069f8f3823e73b63")


def test_what_moves_is_where_the_object_is_and_was():
    video = np.full((3, 40, 40, 3), 200, np.uint8)
    video[0, 10:20, 4:14] = 20
    video[1:, 10:20, 24:34] = 20
    masks = motion_masks(video)
    assert not masks[0].any()
    rows, columns = np.nonzero(masks[1])
    assert (rows.min() >= 8, rows.max() <= 21) == (True, True)
    assert (columns.min() <= 4, columns.max() >= 33) == (True, True)
    assert not masks[1][:, 18:20].any()  # between the two places nothing moves


def test_a_video_is_like_itself_and_a_still_has_no_motion_in_common_with_it():
    video = scene(3)
    same = measure(video, video)
    assert same == dict.fromkeys(BEST, 1.0) | {"mse": 0.0}
    still = measure(video, np.repeat(video[:1], len(video), axis=0))
    assert (still["spatial_iou"], still["weighted_spatial_iou"]) == (0, 0)
    assert still["spatiotemporal_iou"] < 0.2  # of the first frames, whose masks are empty
    assert still["mse"] > 0


def test_two_stills_agree_that_nothing_moves():
    still = np.repeat(scene(3)[:1], 4, axis=0)
    assert measure(still, still)["weighted_spatial_iou"] == 1.0


def test_measures_are_symmetric_and_the_mse_is_on_the_quarter_picture():
    first, second = scene(3), scene(4)
    assert measure(first, second) == pytest.approx(measure(second, first))
    black, white = (np.full((2, 8, 8, 3), value, np.uint8) for value in (0, 255))
    assert measure(black, white)["mse"] == 1.0


def test_motion_in_the_right_place_at_the_wrong_time_keeps_the_spatial_measures_only():
    video = scene(3)
    backwards = measure(video, video[::-1].copy())
    assert backwards["spatial_iou"] > 0.6
    assert backwards["spatiotemporal_iou"] < 0.5 * backwards["spatial_iou"]


def test_the_score_is_100_for_what_reality_reaches_and_is_clipped():
    assert score([BEST], [BEST]) == pytest.approx(100)
    assert score([{**BEST, "spatial_iou": 1.0}], [BEST]) == 100
    half = {**BEST, "spatial_iou": 0.4, "spatiotemporal_iou": 0.25, "weighted_spatial_iou": 0.3}
    assert score([half], [BEST]) == pytest.approx(50)
    assert score([{**half, "mse": 0.102}], [BEST]) == pytest.approx(40)
    assert score([{**half, "mse": 0.9}], [BEST]) == 0


def test_the_score_divides_means_and_is_no_mean_of_quotients():
    low, high = (dict.fromkeys(BEST, value) | {"mse": 0.0} for value in (0.2, 0.8))
    assert score([low, low], [low, high]) == pytest.approx(40)  # the quotients' mean is 62.5


def test_other_shapes_and_takes_without_motion_are_refused():
    with pytest.raises(DataError, match="17x64x64 and 16x64x64"):
        measure(scene(3), scene(3)[1:])
    with pytest.raises(DataError, match="too small"):
        measure(np.zeros((2, 3, 9, 3), np.uint8), np.zeros((2, 3, 9, 3), np.uint8))
    with pytest.raises(DataError, match="no motion in common"):
        score([BEST], [{**BEST, "spatial_iou": 0.0}])
