"""Paints a scene: anti-aliased shapes by pixel coverage on a light ground.

Reads the positions that a scene already holds; knows nothing of motion, chance or captions. The
three shapes have equal area at equal radius. Pixel (0, 0) covers x, y in [0, 1].
"""

from __future__ import annotations

import numpy as np

from opensora.arena.palette import BAR, COLOURS, DOTS, GROUND
from opensora.arena.truth import Scene

SQUARE_HALF_SIDE = float(np.sqrt(np.pi) / 2)
"""Half the side of a square with the area of a unit circle."""

TRIANGLE_INRADIUS = float(np.sqrt(np.pi / (3 * np.sqrt(3))))
"""Inscribed radius of an equilateral triangle with the area of a unit circle."""

_HALF_BASE = float(np.sqrt(3)) * TRIANGLE_INRADIUS

EXTENTS: dict[str, tuple[float, float, float, float]] = {
    "circle": (1.0, 1.0, 1.0, 1.0),
    "square": (SQUARE_HALF_SIDE, SQUARE_HALF_SIDE, SQUARE_HALF_SIDE, SQUARE_HALF_SIDE),
    "triangle": (
        _HALF_BASE,
        2 * TRIANGLE_INRADIUS,
        _HALF_BASE,
        TRIANGLE_INRADIUS,
    ),
}
"""How far a shape of radius 1 reaches from its centroid: left, up, right, down."""

_DOT_SPACING = 8.0
_DOT_RADIUS = 0.9


def render(scene: Scene) -> np.ndarray:
    """The scene's frames: uint8 (F, H, W, 3)."""
    shape = (scene.frames, scene.height, scene.width)
    image = np.empty((*shape, 3), np.float32)
    image[:] = GROUND
    if scene.ground == "dots":
        _blend(image, _dots(scene), DOTS)
    for number, thing in enumerate(scene.objects):
        covered = coverage(thing.shape, scene.positions[:, number], scene.radii[:, number], shape)
        _blend(image, covered, COLOURS[thing.colour])
    if scene.bar is not None:
        columns = _columns(scene.bar, scene.width)
        _blend(image, np.broadcast_to(columns, shape), BAR)
    return (image + 0.5).astype(np.uint8)


def coverage(
    shape: str, centres: np.ndarray, radii: np.ndarray, size: tuple[int, int, int]
) -> np.ndarray:
    """How much of each pixel a shape covers: float32 (F, H, W) in [0, 1].

    Exact for the square, and within a few percent of a pixel on curved or slanted edges, where an
    edge is taken as straight across the one pixel that it crosses.

    Args:
        centres: (F, 2) centroid x, y in pixels.
        radii: (F,) radius of the circle of equal area, in pixels.
        size: F, H, W.
    """
    _, height, width = size
    x = (np.arange(width, dtype=np.float32) + 0.5) - centres[:, 0, None].astype(np.float32)
    y = (np.arange(height, dtype=np.float32) + 0.5) - centres[:, 1, None].astype(np.float32)
    x, y = x[:, None, :], y[:, :, None]  # (F, 1, W), (F, H, 1)
    r = radii[:, None, None].astype(np.float32)
    if shape == "circle":
        return _inside(np.sqrt(x * x + y * y) - r)
    if shape == "square":
        half = r * SQUARE_HALF_SIDE
        return _inside(np.abs(x) - half) * _inside(np.abs(y) - half)
    inner = r * TRIANGLE_INRADIUS
    slanted = np.abs(x) * np.float32(np.sqrt(3) / 2) - y * np.float32(0.5)
    return _inside(slanted - inner) * _inside(y - inner)


def visible_fraction(
    shape: str,
    centres: np.ndarray,
    radii: np.ndarray,
    bar: tuple[float, float],
    size: tuple[int, int, int],
) -> np.ndarray:
    """Which part of a shape's area the bar leaves in sight: float64 (F,) in [0, 1]."""
    covered = coverage(shape, centres, radii, size)
    hidden = covered * _columns(bar, size[2])
    return 1 - hidden.sum((1, 2), np.float64) / covered.sum((1, 2), np.float64)


def _inside(distance: np.ndarray) -> np.ndarray:
    """Coverage of a pixel whose centre lies `distance` outside an edge."""
    return np.clip(0.5 - distance, 0, 1)


def _columns(bar: tuple[float, float], width: int) -> np.ndarray:
    """How much of each pixel column the bar covers: (W,)."""
    left = np.arange(width)
    return np.clip(np.minimum(left + 1, bar[1]) - np.maximum(left, bar[0]), 0, 1)


def _dots(scene: Scene) -> np.ndarray:
    """Coverage of the lattice of dots, which is fixed in the world: (F, H, W)."""
    unit = scene.scale
    spacing = _DOT_SPACING * unit

    def nearest(length: int, axis: int) -> np.ndarray:
        centre = length / 2
        pixel = np.arange(length) + 0.5 - centre
        world = pixel / scene.zoom[:, None] + centre + scene.pan[:, axis, None]
        return (np.abs((world % spacing) - spacing / 2) * scene.zoom[:, None]).astype(np.float32)

    x, y = nearest(scene.width, 0)[:, None, :], nearest(scene.height, 1)[:, :, None]
    return _inside(np.sqrt(x * x + y * y) - _DOT_RADIUS * unit * scene.zoom[:, None, None])


def _blend(image: np.ndarray, covered: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Lay `colour` over `image` (F, H, W, 3) in place, by coverage (F, H, W)."""
    for channel, value in enumerate(colour):
        plane = image[..., channel]
        plane += covered * (value - plane)
