"""How things move in the arena: closed-form paths, so that the truth is exact at any frame rate.

Straight and still, reflected at the walls, falling, and two discs in an elastic collision.
Positions are x, y in pixels with y pointing down, velocities pixels a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Contact:
    """One touch: `thing` meets `other` (the index of an object, or the name of a wall)."""

    time: float
    thing: int
    other: int | str


@dataclass(frozen=True)
class Drive:
    """What moves an object: a start velocity, a constant acceleration, or walls that reflect it.

    Attributes:
        velocity, acceleration: (2,) px/s and px/s^2.
        reflects: turned back at the walls (then without acceleration).
    """

    velocity: np.ndarray
    acceleration: np.ndarray
    reflects: bool = False


def travel(drive: Drive, times: np.ndarray) -> np.ndarray:
    """Displacement from the start if no wall is met: (F, 2)."""
    t = times[:, None]
    return drive.velocity * t + 0.5 * drive.acceleration * t * t


def trace(
    drive: Drive, starts: np.ndarray, times: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Positions (K, F, 2) from each of the K starts (K, 2), reflected inside [low, high]."""
    free = starts[:, None, :] + travel(drive, times)
    return _fold(free, low, high)[0] if drive.reflects else free


def velocities(
    drive: Drive, start: np.ndarray, times: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Velocity at each time: (F, 2)."""
    if not drive.reflects:
        return drive.velocity + drive.acceleration * times[:, None]
    return drive.velocity * _fold(start + travel(drive, times), low, high)[1]


def wall_contacts(
    drive: Drive, start: np.ndarray, duration: float, low: np.ndarray, high: np.ndarray
) -> list[tuple[float, str]]:
    """When and which walls a reflected object touches, in order of time."""
    touches = []
    for axis, (near, far) in enumerate((("left", "right"), ("top", "bottom"))):
        speed, span = drive.velocity[axis], high[axis] - low[axis]
        if not drive.reflects or speed == 0 or span <= 0:
            continue
        begin = (start[axis] - low[axis]) / span
        end = begin + speed * duration / span
        first, last = sorted((begin, end))
        for crossing in range(int(np.floor(first)) + 1, int(np.floor(last)) + 1):
            time = (crossing - begin) * span / speed
            touches.append((float(time), far if crossing % 2 else near))
    return sorted(touches)


def collide(masses: tuple[float, float], speeds: tuple[float, float]) -> tuple[float, float]:
    """Speeds along one line after an elastic collision: momentum and energy are kept."""
    (m, n), (u, v) = masses, speeds
    total = m + n
    return ((m - n) * u + 2 * n * v) / total, ((n - m) * v + 2 * m * u) / total


def _fold(free: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A free path folded back between the walls, and the sign that the velocity has there."""
    span = np.maximum(high - low, 1e-9)
    phase = (free - low) % (2 * span)
    forward = phase <= span
    return low + np.where(forward, phase, 2 * span - phase), np.where(forward, 1.0, -1.0)
