"""Where things start: so that they stay in the picture and out of each other's way.

Tries addressed random starts a bounded number of times and reports when none fits; the caller then
falls back to lanes, which always fit. Gaps are judged by the boxes around the shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from opensora.arena.motion import Drive, trace, travel, wall_contacts

T = TypeVar("T")

MARGIN = 1.0
"""Pixels (at 64) that stay free between a shape and the edge of the picture."""

GAP = 2.0
"""Pixels (at 64) that stay free between the boxes around two shapes."""

TURN = 3.0
"""Pixels (at 64) that a bouncing object visibly goes towards and away from a wall."""

_CANDIDATES = 48
_ROUNDS = 6


class Dice:
    """Addressed chance. Uses uniform numbers only, whose stream numpy keeps between versions."""

    def __init__(self, address: int) -> None:
        self._generator = np.random.Generator(np.random.Philox(key=address))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self._generator.random())

    def points(self, low: np.ndarray, high: np.ndarray, count: int) -> np.ndarray:
        """(count, 2) uniform in the box."""
        return low + (high - low) * self._generator.random((count, 2))

    def chance(self, probability: float) -> bool:
        return float(self._generator.random()) < probability

    def choose(self, options: Sequence[T]) -> T:
        return options[int(float(self._generator.random()) * len(options))]

    def pick(self, weights: Mapping[T, float]) -> T:
        """One key, with probability proportional to its weight."""
        point = float(self._generator.random()) * sum(weights.values())
        for key, weight in weights.items():
            point -= weight
            if point < 0:
                return key
        return [key for key, weight in weights.items() if weight > 0][-1]


@dataclass(frozen=True)
class Body:
    """What has to be placed: how far it reaches from its centroid, and what drives it.

    Attributes:
        reach: (4,) px to the left, up, right, down.
    """

    reach: np.ndarray
    drive: Drive

    def room(self, size: tuple[int, int], margin: float) -> tuple[np.ndarray, np.ndarray]:
        """The box (low, high), each x, y, that the centroid must stay in."""
        height, width = size
        return self.reach[:2] + margin, np.array([width, height]) - self.reach[2:] - margin


def scatter(
    dice: Dice, bodies: Sequence[Body], times: np.ndarray, size: tuple[int, int], *, unit: float
) -> np.ndarray | None:
    """Starts (N, 2) whose paths stay inside the picture and apart, or None if none was found."""
    for _ in range(_ROUNDS):
        starts: list[np.ndarray] = []
        paths: list[np.ndarray] = []
        for body in bodies:
            low, high = body.room(size, MARGIN * unit)
            found = _start(dice, body, (low, high), times)
            tracks = trace(body.drive, found, times, low, high)  # (K, F, 2)
            fits = np.ones(len(found), bool)
            if body.drive.reflects:
                fits[:] = [_turns(body, s, times, low, high, TURN * unit) for s in found]
            for other, path in zip(bodies, paths, strict=False):
                fits &= _apart(tracks, body.reach, path, other.reach, GAP * unit)
            if not fits.any():
                break
            chosen = int(fits.argmax())
            starts.append(found[chosen])
            paths.append(tracks[chosen])
        if len(starts) == len(bodies):
            return np.stack(starts)
    return None


def _start(
    dice: Dice, body: Body, box: tuple[np.ndarray, np.ndarray], times: np.ndarray
) -> np.ndarray:
    """Candidate starts (K, 2) from which an unreflected path stays in the box."""
    low, high = box
    if not body.drive.reflects:
        moved = travel(body.drive, times)
        low, high = low - moved.min(0), high - moved.max(0)
    return dice.points(low, np.maximum(low, high), _CANDIDATES)


def _turns(
    body: Body,
    start: np.ndarray,
    times: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    turn: float,
) -> bool:
    """Whether a bouncing body comes to a wall and leaves it, by `turn` px each, in the clip."""
    duration = float(times[-1])
    speed = np.abs(body.drive.velocity)
    return duration == 0 or any(
        min(time, duration - time) * speed[0 if wall in ("left", "right") else 1] >= turn
        for time, wall in wall_contacts(body.drive, start, duration, low, high)
    )


def _apart(
    tracks: np.ndarray, reach: np.ndarray, path: np.ndarray, other: np.ndarray, gap: float
) -> np.ndarray:
    """Which tracks (K, F, 2) keep their box `gap` away from the box on `path` (F, 2): (K,)."""
    before = path - other[:2] - (tracks + reach[2:]) >= gap
    after = tracks - reach[:2] - (path + other[2:]) >= gap
    return np.all(np.any(before | after, axis=-1), axis=-1, keepdims=False)
