"""Templates have the stated area, and each shape is explained best by its own."""

import numpy as np
import pytest

from opensora.arena.draw import coverage
from opensora.arena.grammar import SHAPES
from opensora.arena.silhouette import overlaps, template


@pytest.mark.parametrize("shape", SHAPES)
def test_a_template_has_its_area_and_centroid(shape):
    centre, area = np.array([[20.3, 22.6]]), np.array([310.0])
    covered = template(shape, (44, 42), centre, area)[0]
    y, x = np.mgrid[:44, :42] + 0.5
    assert covered.sum() == pytest.approx(310, rel=0.01)
    assert (covered * x).sum() / covered.sum() == pytest.approx(20.3, abs=0.02)
    assert (covered * y).sum() / covered.sum() == pytest.approx(22.6, abs=0.05)


@pytest.mark.parametrize("number", range(3))
def test_what_the_painter_draws_fits_its_own_template_far_better(number):
    chance = np.random.default_rng(number)
    centres = 20 + chance.random((40, 2))
    radii = 8 + 5 * chance.random(40)
    drawn = coverage(SHAPES[number], centres, radii, (40, 42, 42))
    found = overlaps(drawn, centres, np.pi * radii**2)
    others = np.delete(found, number, axis=1)
    assert found[:, number].min() > 0.97
    # A circle and a square of equal area share 83 % of their union.
    assert others.max() < 0.86


def test_a_diamond_is_none_of_the_shapes():
    y, x = np.mgrid[:40, :40] + 0.5 - 20.0
    diamond = (np.abs(x) + np.abs(y) <= 14).astype(float)[None]
    found = overlaps(diamond, np.array([[20.0, 20.0]]), diamond.sum((1, 2)))
    assert found.max() < 0.85
