"""Who plays in a scene, and what moves each one, before anything has a place.

Lengths are picture pixels, y points down.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from opensora.arena.draw import EXTENTS
from opensora.arena.grammar import DIRECTIONS, Camera, Clause
from opensora.arena.motion import Drive
from opensora.arena.place import MARGIN, Dice

TOWARDS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

STILL = Drive(np.zeros(2), np.zeros(2))


@dataclass(frozen=True)
class Picture:
    """The frame that a layout fills: H, W in pixels and the time of each of F frames."""

    height: int
    width: int
    times: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def unit(self) -> float:
        return min(self.size) / 64

    @property
    def duration(self) -> float:
        return float(self.times[-1])


@dataclass(frozen=True)
class Cast:
    """What a scene shows before anything has a place.

    Attributes:
        clauses: one an object, count 1.
        radii: (N,) px.
        speeds: (N,) px/s.
    """

    clauses: tuple[Clause, ...]
    radii: np.ndarray
    speeds: np.ndarray
    camera: Camera = "fixed"


def reach(clause: Clause, radius: float) -> np.ndarray:
    """How far an object extends from its centroid: (4,) px to the left, up, right, down."""
    return np.array(EXTENTS[clause.shape]) * radius


def shrunk(cast: Cast, radii: np.ndarray) -> Cast:
    """The cast with radii (N,) that are no larger, without the word 'large' where they are less."""
    clauses = tuple(
        replace(clause, size="") if clause.size == "large" and new < old else clause
        for clause, new, old in zip(cast.clauses, radii, cast.radii, strict=True)
    )
    return replace(cast, clauses=clauses, radii=radii)


def drives(dice: Dice, cast: Cast, picture: Picture) -> list[Drive]:
    """What moves each object; a group of alike objects moves as one."""
    if len(set(cast.clauses)) == 1:
        return [_drive(dice, cast, 0, picture)] * len(cast.clauses)
    return [_drive(dice, cast, number, picture) for number in range(len(cast.clauses))]


def _drive(dice: Dice, cast: Cast, number: int, picture: Picture) -> Drive:
    clause, speed, nothing = cast.clauses[number], cast.speeds[number], np.zeros(2)
    if clause.motion in DIRECTIONS:
        return Drive(speed * np.array(TOWARDS[clause.motion], float), nothing)
    if clause.motion == "bounce":
        angle = np.deg2rad(dice.uniform(25, 65))
        signs = np.array([dice.choose((-1, 1)), dice.choose((-1, 1))])
        velocity = 2 * speed * signs * np.array([np.cos(angle), np.sin(angle)])
        return Drive(velocity, nothing, reflects=True)
    if clause.motion == "fall":
        arms, duration = reach(clause, cast.radii[number]), max(picture.duration, 1e-9)
        free = np.array([picture.width, picture.height]) - arms[:2] - arms[2:]
        free -= 2 * MARGIN * picture.unit
        drop = dice.uniform(0.6, 0.95) * free[1]
        drift = dice.uniform(-0.3, 0.3) * free[0] / duration
        return Drive(np.array([drift, 0.0]), np.array([0.0, 2 * drop / duration**2]))
    if cast.camera.startswith("pans"):
        return Drive(-speed * np.array(TOWARDS[cast.camera.split()[1]], float), nothing)
    return STILL
