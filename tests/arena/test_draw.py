"""Shapes cover what geometry says, to a small part of a pixel."""

import numpy as np
import pytest

from opensora.arena.draw import EXTENTS, coverage, render, visible_fraction
from opensora.arena.grammar import SHAPES
from opensora.arena.palette import BAR, COLOURS, DOTS, GROUND
from opensora.arena.scenes import SceneConfig, sample, varied

SIZE = (1, 48, 56)


def drawn(shape, x, y, radius):
    return coverage(shape, np.array([[x, y]]), np.array([radius]), SIZE)[0].astype(np.float64)


def supersampled(shape, x, y, radius, steps=16):
    """Coverage by point tests on a fine grid: slow, and independent of the distance formulas."""
    _, height, width = SIZE
    py, px = (np.mgrid[: height * steps, : width * steps] + 0.5) / steps
    px, py = (px - x) / radius, (py - y) / radius
    left, up, right, down = EXTENTS[shape]
    if shape == "circle":
        inside = px**2 + py**2 <= 1
    elif shape == "square":
        inside = (np.abs(px) <= right) & (np.abs(py) <= down)
    else:
        inside = (py <= down) & (py >= -up) & (np.abs(px) <= (py + up) * right / (up + down))
    assert left == right
    return inside.reshape(height, steps, width, steps).mean((1, 3))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [8.0, 11.37])
def test_coverage_matches_point_tests(shape, radius):
    exact = supersampled(shape, 27.31, 24.77, radius)
    found = drawn(shape, 27.31, 24.77, radius)
    # The worst pixel is the sharp corner of a triangle, which two edges cross.
    assert np.abs(found - exact).max() < 0.2
    assert np.abs(found - exact).mean() < 0.001


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_radius_means_equal_area_and_the_centre_is_the_centroid(shape):
    covered = drawn(shape, 27.31, 24.77, 9.5)
    y, x = np.mgrid[: SIZE[1], : SIZE[2]] + 0.5
    assert covered.sum() == pytest.approx(np.pi * 9.5**2, rel=0.003)
    assert (covered * x).sum() / covered.sum() == pytest.approx(27.31, abs=0.03)
    assert (covered * y).sum() / covered.sum() == pytest.approx(24.77, abs=0.03)


def test_a_scene_shows_its_colours_on_the_ground():
    scene = sample(SceneConfig(num_objects={2: 1}), 3, 0)
    video = render(scene)
    assert video.shape == (17, 64, 64, 3)
    assert video.dtype == np.uint8
    for frame in (0, 8, 16):
        for number, thing in enumerate(scene.objects):
            x, y = scene.positions[frame, number].astype(int)
            assert tuple(video[frame, y, x]) == COLOURS[thing.colour]
    corner = [tuple(video[0, y, x]) for y in (0, 63) for x in (0, 63)]
    assert corner == [GROUND] * 4


def test_the_bar_lies_over_the_object_and_hides_what_the_truth_says():
    config = varied(motions={"behind": 1}, num_objects={1: 1}, cameras={"fixed": 1})
    scene = next(
        s for s in (sample(config, 0, i) for i in range(40)) if s.objects[0].shape == "circle"
    )
    video = render(scene)
    hidden = int(scene.visible[:, 0].argmin())
    x, y = scene.positions[hidden, 0].astype(int)
    assert tuple(video[hidden, y, x]) == BAR
    assert scene.visible[:, 0].min() < 0.01
    assert scene.visible[0, 0] == scene.visible[-1, 0] == 1
    colour = np.array(COLOURS[scene.objects[0].colour])
    close = np.abs(video.astype(int) - colour).max(-1) < 40
    area = np.pi * scene.radii[:, 0] ** 2
    # Edge pixels are mixtures: the count of clear pixels is short by at most the outline.
    assert np.abs(close.sum((1, 2)) / area - scene.visible[:, 0]).max() < 0.2


def test_visible_fraction_of_a_half_covered_square_is_half():
    centres, radii = np.array([[20.0, 24.0]]), np.array([10.0])
    seen = visible_fraction("square", centres, radii, (20.0, 56.0), SIZE)
    assert seen == pytest.approx([0.5], abs=1e-6)


def test_the_lattice_of_dots_moves_against_a_panning_camera():
    config = varied(
        num_objects={1: 1}, motions={"still": 1}, cameras={"pans right": 1}, ground="dots"
    )
    scene = sample(config, 0, 0)
    faint = np.abs(render(scene).astype(int) - GROUND).sum(-1)
    dots = (faint > 8) & (faint < np.abs(np.subtract(DOTS, GROUND)).sum() + 3)
    moved = scene.pan[:, 0]
    # The camera moves right, so the world moves left by the same amount.
    frame = int(np.abs(moved - 4).argmin())  # half the spacing: unmoved dots would not overlap
    shift = round(moved[frame])
    assert abs(moved[frame] - shift) < 0.5
    first, later = dots[0][:, shift:], dots[frame][:, : 64 - shift]
    assert first.sum() > 50
    assert (first & later).sum() > 0.6 * first.sum()
    np.testing.assert_allclose(
        scene.positions[:, 0, 0] - scene.positions[0, 0, 0], -moved, atol=1e-9
    )
