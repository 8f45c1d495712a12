"""Pixels and patches agree with slow, obvious code."""

import numpy as np
import pytest

from opensora.arena.palette import COLOURS, GROUND
from opensora.arena.segment import NAMES, NOTHING, grown, opened, patches, share, unmix


def flood(labels, min_area):
    """Patches of one frame by flood fill: a set of (label, frozenset of pixels)."""
    left = {(y, x) for y, x in zip(*np.nonzero(labels != NOTHING), strict=True)}
    found = set()
    while left:
        todo = [left.pop()]
        patch = set(todo)
        while todo:
            y, x = todo.pop()
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left and labels[near] == labels[y, x]:
                    left.remove(near)
                    patch.add(near)
                    todo.append(near)
        if len(patch) >= min_area:
            found.add((int(labels[min(patch)]), frozenset(patch)))
    return found


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8, 1.0])
def test_patches_are_the_flood_filled_ones(density):
    chance = np.random.default_rng(int(density * 10))
    labels = chance.integers(0, 3, (4, 20, 23)).astype(np.int8)
    labels[chance.random(labels.shape) > density] = NOTHING
    found = patches(labels, min_area=3)
    for frame in range(4):
        mine = {
            (
                int(found.colour[number]),
                frozenset(zip(*np.nonzero(found.labels[frame] == number), strict=True)),
            )
            for number in np.flatnonzero(found.frame == frame)
        }
        assert mine == flood(labels[frame], 3)
    for number, (top, left, bottom, right) in enumerate(found.box):
        _, y, x = np.nonzero(found.labels == number)
        assert (top, left, bottom, right) == (y.min(), x.min(), y.max() + 1, x.max() + 1)
        assert found.area[number] == len(y)


def test_no_pixels_make_no_patches():
    found = patches(np.full((2, 8, 8), NOTHING, np.int8), min_area=1)
    assert len(found.frame) == len(found.area) == len(found.box) == 0
    assert (found.labels == NOTHING).all()


def test_opening_keeps_what_a_square_of_nine_covers():
    chance = np.random.default_rng(0)
    labels = np.where(chance.random((2, 16, 18)) < 0.85, 0, NOTHING)
    labels[:, :, 9:] += labels[:, :, 9:] == 0
    kept = np.full_like(labels, NOTHING)
    for frame in range(2):
        for y in range(14):
            for x in range(16):
                window = labels[frame, y : y + 3, x : x + 3]
                if (window == window[0, 0]).all() and window[0, 0] != NOTHING:
                    kept[frame, y : y + 3, x : x + 3] = window[0, 0]
    np.testing.assert_array_equal(opened(labels), kept)
    assert (kept != NOTHING).any()
    assert (kept != labels).any()


def test_growing_is_by_whole_squares():
    mask = np.zeros((1, 9, 9), bool)
    mask[0, 4, 4] = True
    wide = grown(mask, 2)
    assert wide.sum() == 25
    assert wide[0, 2:7, 2:7].all()


@pytest.mark.parametrize("name", COLOURS)
def test_half_and_more_of_a_colour_counts_as_the_colour(name):
    ground, colour = np.array(GROUND, float), np.array(COLOURS[name], float)
    shares = np.linspace(0, 1, 21)
    line = np.rint(ground + shares[:, None] * (colour - ground)).astype(np.uint8)
    found = unmix(line[None, None]).colour[0, 0]
    number = NAMES.index(name)
    # Rounding to bytes moves a share by less than 0.005.
    assert (found[shares > 0.505] == number).all()
    assert (found[shares < 0.495] == NOTHING).all()
    np.testing.assert_allclose(share(line[None], np.array([number]))[0], shares, atol=0.005)


def test_colours_off_the_palette_are_nothing_but_stand_out():
    brown_black_white = np.array([[[[90, 60, 30], [0, 0, 0], [255, 255, 255]]]], np.uint8)
    found = unmix(brown_black_white)
    assert (found.colour == NOTHING).all()
    assert (found.contrast[0, 0] > 50).tolist() == [True, True, False]


def test_a_long_video_is_read_like_a_short_one(monkeypatch):
    chance = np.random.default_rng(0)
    video = chance.integers(0, 256, (5, 16, 16, 3), np.uint8)
    whole = unmix(video)
    monkeypatch.setattr("opensora.arena.segment._PIXELS_AT_ONCE", 2 * 256)
    parts = unmix(video)
    np.testing.assert_array_equal(whole.colour, parts.colour)
    np.testing.assert_array_equal(whole.contrast, parts.contrast)
