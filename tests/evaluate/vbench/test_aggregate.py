"""Totals: published dimensions give published totals, and nothing is printed that is not there."""

import numpy as np
import pytest

from opensora.evaluate.vbench.aggregate import (
    I2V,
    I2V_QUALITY,
    PARTS,
    QUALITY,
    SEMANTIC,
    missing,
    normalised,
    totals,
    upstream_totals,
)
from opensora.evaluate.vbench.published import DIMENSIONS, PUBLISHED, raw_of

COGVIDEOX_5B = (0.8275600058307723, 0.770373943288396, 0.8161227933222971)
ONLY_SUBJECT = -0.4420117053053073
PERFECT = dict.fromkeys(DIMENSIONS, 1.0)


def rounding(scales) -> float:
    """By how many percent a part may be off when its inputs are rounded to 0.01 percent."""
    bound = sum(0.005 * s.weight / (s.high - s.low) for s in scales.values())
    return bound / sum(s.weight for s in scales.values()) + 0.005


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_dimensions_give_the_published_totals(model):
    total, quality, semantic = PUBLISHED[model][0]
    found = totals(raw_of(model))
    # The worst case of all roundings is 0.013 to 0.02; a wrong constant moves totals by far more.
    assert 100 * found["quality"] == pytest.approx(quality, abs=rounding(QUALITY))
    assert 100 * found["semantic"] == pytest.approx(semantic, abs=rounding(SEMANTIC))
    whole = (4 * rounding(QUALITY) + rounding(SEMANTIC)) / 5
    assert 100 * found["total"] == pytest.approx(total, abs=whole)
    assert whole < 0.02


def test_digits_are_those_of_the_script():
    # Computed once with scripts/cal_final_score.py of Vchitect/VBench, printed in full.
    assert totals(raw_of("CogVideoX-5B")) == {
        "quality": COGVIDEOX_5B[0],
        "semantic": COGVIDEOX_5B[1],
        "total": COGVIDEOX_5B[2],
    }
    assert upstream_totals({"subject_consistency": 0.9})["total"] == ONLY_SUBJECT


def test_nothing_is_clipped():
    assert normalised(1.0, QUALITY["motion_smoothness"]) == pytest.approx(1.00857632933105)
    assert normalised(0.0, QUALITY["subject_consistency"]) == pytest.approx(-0.17123448)


def test_a_still_picture_has_a_high_quality():
    still = {**PERFECT, "dynamic_degree": 0.0, "aesthetic_quality": 0.5, "imaging_quality": 0.6}
    assert totals(still)["quality"] == pytest.approx(0.78594, abs=5e-5)


@pytest.mark.parametrize("name", DIMENSIONS)
def test_a_missing_dimension_takes_its_totals_away(name):
    rest = {key: value for key, value in PERFECT.items() if key != name}
    assert missing(rest) == [name]
    kept = "semantic" if name in QUALITY else "quality"
    assert set(totals(rest)) == {kept}


def test_quality_alone_is_given_when_its_seven_are_there():
    assert set(totals(dict.fromkeys(QUALITY, 1.0))) == {"quality"}
    assert totals({}) == {}


def test_upstream_counts_what_is_missing_as_raw_zero():
    some = {"aesthetic_quality": 0.5}
    filled = {**dict.fromkeys(DIMENSIONS, 0.0), **some}
    assert upstream_totals(some) == totals(filled)
    assert upstream_totals(some)["quality"] < 0


def test_i2v_weighs_both_halves_alike_and_has_no_flickering():
    raw = {name: scale.high for name, scale in (I2V | I2V_QUALITY).items()}
    assert totals(raw, "i2v") == {"quality": 1.0, "i2v": 1.0, "total": 1.0}
    lower = {**raw, "camera_motion": 0.0}
    assert totals(lower, "i2v")["i2v"] == pytest.approx(2 / 2.1)
    assert totals(lower, "i2v")["total"] == pytest.approx((1 + 2 / 2.1) / 2)
    assert "temporal_flickering" not in I2V_QUALITY
    assert "total" not in totals(dict.fromkeys(I2V_QUALITY, 1.0), "i2v")


def test_arrays_are_taken_as_many_scores():
    raw = {name: np.array([0.5, 1.0]) for name in DIMENSIONS}
    found = totals(raw)["total"]
    assert found[1] == totals(PERFECT)["total"]
    assert found.shape == (2,)


def test_there_are_seven_and_nine():
    assert (len(QUALITY), len(SEMANTIC), len(DIMENSIONS)) == (7, 9, 16)
    assert {n for scales, _ in PARTS["v1"].values() for n in scales} == set(DIMENSIONS)
