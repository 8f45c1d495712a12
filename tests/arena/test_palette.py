"""The colours can be told apart, also when they fade towards the ground."""

import itertools

import numpy as np
import pytest

from opensora.arena.palette import BAR, COLOURS, DOTS, GROUND

RGB = {name: np.array(rgb, float) for name, rgb in {**COLOURS, "bar": BAR}.items()}


def test_any_two_colours_are_at_least_90_apart():
    for first, second in itertools.combinations(RGB, 2):
        assert np.linalg.norm(RGB[first] - RGB[second]) >= 90, (first, second)


@pytest.mark.parametrize("name", RGB)
def test_every_colour_is_far_from_the_ground(name):
    assert np.linalg.norm(RGB[name] - GROUND) >= 150


@pytest.mark.parametrize("name", COLOURS)
def test_a_faded_colour_stays_nearest_to_its_own_way_from_the_ground(name):
    for share in (0.5, 0.75, 1.0):
        faded = GROUND + share * (RGB[name] - GROUND)
        distances = {}
        for other, rgb in RGB.items():
            way = rgb - GROUND
            foot = np.clip((faded - GROUND) @ way / (way @ way), 0, 1)
            distances[other] = np.linalg.norm(GROUND + foot * way - faded)
        assert distances[name] < 1e-9
        # Fading shrinks all distances alike; half of this is the noise that changes the nearest.
        assert sorted(distances.values())[1] >= 80 * share


def test_the_dots_are_too_faint_to_be_things():
    assert np.linalg.norm(np.subtract(DOTS, GROUND)) < 50
