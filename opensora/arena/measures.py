"""What the words of size and speed mean in numbers: shared by the scenes and by their score.

Lengths are pixels of a 64 x 64 picture. A word takes the outer third of a range.
"""

from __future__ import annotations

Range = tuple[float, float]

RADIUS: Range = (9.0, 13.0)
"""Radius in px of the circle of equal area, of one object alone."""

SPEED: Range = (5.0, 14.0)
"""Speed of straight motion in px/s."""

SMALLEST_RADIUS = 8.0
"""Radius in px under which shapes stop being recognisable."""

_CROWDED = {1: 1.0, 2: 0.9, 3: 0.8}


def radius_range(radius: Range, count: int) -> Range:
    """The radii that `count` objects have when one alone has `radius`."""
    low, high = (max(SMALLEST_RADIUS, _CROWDED[count] * r) for r in radius)
    return low, high


def lower_third(values: Range) -> Range:
    """What 'slowly' and 'small' mean."""
    low, high = values
    return low, low + (high - low) / 3


def upper_third(values: Range) -> Range:
    """What 'quickly' and 'large' mean."""
    low, high = values
    return high - (high - low) / 3, high
