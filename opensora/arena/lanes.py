"""The layout that always fits: one lane an object, everything straight along the lanes.

What a scene falls back to when random places were tried in vain.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from opensora.arena.cast import Cast, Picture, drives, reach, shrunk
from opensora.arena.grammar import DIRECTIONS, Motion
from opensora.arena.motion import Drive, travel
from opensora.arena.place import GAP, MARGIN, Body, Dice


def lanes(dice: Dice, cast: Cast, picture: Picture) -> tuple[Cast, list[Body], np.ndarray]:
    """The layout that always fits: one lane an object, everything straight along the lanes.

    An object whose motion crosses the lanes takes the motion of the first that runs along them.
    """
    axis, leader = _lane_axis(cast)
    motions = [_along(clause.motion, axis, leader) for clause in cast.clauses]
    clauses = tuple(
        replace(c, motion=m, speed=c.speed if m in DIRECTIONS else "")
        for c, m in zip(cast.clauses, motions, strict=True)
    )
    lane = (picture.width, picture.height)[1 - axis] / len(clauses)
    unit_reach = [reach(clause, 1.0) for clause in clauses]
    thickness = np.array([arms[1 - axis] + arms[3 - axis] for arms in unit_reach])
    radii = np.minimum(cast.radii, (lane - GAP * picture.unit) / thickness)
    cast = shrunk(replace(cast, clauses=clauses), radii)
    bodies, starts = [], np.empty((len(clauses), 2))
    for number, drive in enumerate(drives(dice, cast, picture)):
        drive = replace(drive, velocity=_turned(drive, axis))
        body = Body(unit_reach[number] * radii[number], drive)
        low, high = body.room(picture.size, MARGIN * picture.unit)
        starts[number] = _lane_start(dice, drive, low, high, picture)
        centring = (body.reach[1 - axis] - body.reach[3 - axis]) / 2
        starts[number, 1 - axis] = (number + 0.5) * lane + centring
        bodies.append(body)
    return cast, bodies, starts


def _lane_axis(cast: Cast) -> tuple[int, Motion]:
    """Along which axis the lanes run (0 is x), and the motion that decided it."""
    for clause in cast.clauses:
        if clause.motion in ("left", "right"):
            return 0, clause.motion
        if clause.motion in ("up", "down", "fall"):
            return 1, clause.motion
    return int(cast.camera in ("pans up", "pans down")), cast.clauses[0].motion


def _along(motion: Motion, axis: int, leader: Motion) -> Motion:
    crossing = ("up", "down", "fall") if axis == 0 else ("left", "right")
    return leader if motion in crossing else motion


def _turned(drive: Drive, axis: int) -> np.ndarray:
    """The velocity along the lanes; what bounces keeps its speed, the rest loses its drift."""
    along = drive.velocity * np.eye(2)[axis]
    if not drive.reflects:
        return along
    return np.sign(along) * np.linalg.norm(drive.velocity)


def _lane_start(
    dice: Dice, drive: Drive, low: np.ndarray, high: np.ndarray, picture: Picture
) -> np.ndarray:
    """A start from which the path stays in the picture, and meets a wall if it is meant to."""
    moved = travel(drive, picture.times)
    if not drive.reflects:
        return dice.points(low - moved.min(0), high - moved.max(0), 1)[0]
    # The wall is met after a quarter to three quarters of the way.
    way = np.minimum(np.abs(moved[-1]) * dice.uniform(0.25, 0.75), high - low)
    return np.where(moved[-1] > 0, high - way, low + way)
