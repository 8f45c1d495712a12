"""Which of the three shapes a patch is, by overlap with templates of the same place and area.

The templates are drawn here, row by row from the width of the shape at each height, and share
nothing with the painter's distance formulas.
"""

from __future__ import annotations

import numpy as np

from opensora.arena.grammar import SHAPES

_ROWS = 4  # rows of sample lines in each row of pixels
_STEEPNESS = 2.5


def overlaps(amount: np.ndarray, centre: np.ndarray, area: np.ndarray) -> np.ndarray:
    """How well each shape explains each patch: (P, 3) intersection over union, as in `SHAPES`.

    Args:
        amount: float (P, h, w) in [0, 1], how much of the patch's colour each pixel holds.
        centre: (P, 2) x, y of the centroid in pixels of `amount`, pixel 0 covering [0, 1].
        area: (P,) of the template, px.
    """
    found = crisp(amount)
    scores = []
    for shape in SHAPES:
        expected = crisp(template(shape, (amount.shape[1], amount.shape[2]), centre, area))
        shared = np.minimum(found, expected).sum((1, 2))
        union = np.maximum(found, expected).sum((1, 2))
        scores.append(shared / np.maximum(union, 1e-9))
    return np.stack(scores, 1)


def crisp(amount: np.ndarray) -> np.ndarray:
    """Coverage with steeper edges: blur spreads an edge but leaves its half-way line in place."""
    return np.clip((amount - 0.5) * _STEEPNESS + 0.5, 0, 1)


def template(shape: str, size: tuple[int, int], centre: np.ndarray, area: np.ndarray) -> np.ndarray:
    """Coverage (P, h, w) of upright shapes at `centre` (P, 2) with `area` (P,)."""
    height, width = size
    lines = (np.arange(height * _ROWS, dtype=np.float32) + 0.5) / _ROWS
    y = lines - centre[:, 1, None].astype(np.float32)  # (P, h * rows)
    half = _half_width(shape, y, np.sqrt(area)[:, None].astype(np.float32))[:, :, None]
    x = np.arange(width, dtype=np.float32) - centre[:, 0, None, None].astype(np.float32)
    covered = np.clip(np.minimum(x + 1, half) - np.maximum(x, -half), 0, 1)
    return covered.reshape(len(centre), height, _ROWS, width).mean(2)


def _half_width(shape: str, y: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Half the width of a shape of area root^2 at `y` below its centroid; negative outside."""
    if shape == "circle":
        return np.sqrt(np.maximum(root * root / np.float32(np.pi) - y * y, 0))
    if shape == "square":
        return np.where(np.abs(y) <= root / 2, root / 2, -1)
    tall = root * np.float32(3**0.25)  # an equilateral triangle of side s has area s^2 sqrt(3) / 4
    below_top = y + tall * np.float32(2 / 3)
    inside = (below_top >= 0) & (below_top <= tall)
    return np.where(inside, below_top / np.float32(np.sqrt(3)), -1)
