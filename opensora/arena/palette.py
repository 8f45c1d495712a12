"""The colours of the arena: the only thing that the painter and the judge share.

Chosen so that any two colours are at least 90 apart in RGB (0..255, Euclidean), also from the
ground and the bar, and so that no colour, faded towards the ground, turns into another one.
"""

from __future__ import annotations

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (206, 36, 56),
    "orange": (252, 130, 6),
    "yellow": (236, 230, 18),
    "green": (36, 163, 56),
    "cyan": (6, 190, 212),
    "blue": (24, 76, 238),
    "purple": (102, 22, 174),
    "pink": (252, 74, 208),
}

GROUND: tuple[int, int, int] = (250, 247, 240)
"""The background, a warm off-white."""

DOTS: tuple[int, int, int] = (234, 230, 221)
"""The optional lattice of dots on the ground, which makes camera motion visible."""

BAR: tuple[int, int, int] = (120, 118, 122)
"""The bar that objects pass behind."""
