"""From a cast (what there is and how it moves) to a layout (where everything is in every frame).

One function for each kind of scene; each one always succeeds, by falling back to a layout that is
known to fit. Lengths are picture pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from opensora.arena.cast import TOWARDS, Cast, Picture, drives, reach, shrunk
from opensora.arena.draw import visible_fraction
from opensora.arena.grammar import Clause, Relation
from opensora.arena.lanes import lanes
from opensora.arena.measures import SMALLEST_RADIUS
from opensora.arena.motion import Contact, Drive, collide, trace, velocities, wall_contacts
from opensora.arena.place import MARGIN, Body, Dice, scatter
from opensora.arena.truth import relation

_CLEAR = 5.0  # px (at 64) between the bar and the object at either end of its way
_ZOOM = (1.3, 1.45)
_TRIES = {"beside": 24, "colliding": 64}


@dataclass(frozen=True)
class Layout:
    """Where everything is: the arrays of `truth.Scene`, and the clauses that came true."""

    clauses: tuple[Clause, ...]
    positions: np.ndarray
    velocities: np.ndarray
    radii: np.ndarray
    visible: np.ndarray
    pan: np.ndarray
    zoom: np.ndarray
    contacts: tuple[Contact, ...] = ()
    relation: Relation = ""
    bar: tuple[float, float] | None = None


def freely(dice: Dice, cast: Cast, picture: Picture) -> Layout:
    """Objects that go their own ways and never come near each other."""
    moved_by = drives(dice, cast, picture)
    bodies = [
        Body(reach(c, r), d) for c, r, d in zip(cast.clauses, cast.radii, moved_by, strict=True)
    ]
    starts = scatter(dice, bodies, picture.times, picture.size, unit=picture.unit)
    if starts is None:
        cast, bodies, starts = lanes(dice, cast, picture)
    return _with_camera(dice, cast, _follow(cast, bodies, starts, picture), picture)


def beside(dice: Dice, cast: Cast, picture: Picture) -> Layout:
    """Two still objects, the first clearly on one side of the second."""
    for _ in range(_TRIES["beside"]):
        layout = freely(dice, cast, picture)
        apart = layout.positions[0, 0] - layout.positions[0, 1]
        across = np.sort(np.abs(apart))
        if across[1] > 2 * across[0]:
            break
    else:
        cast, bodies, starts = lanes(dice, cast, picture)
        layout = _with_camera(dice, cast, _follow(cast, bodies, starts, picture), picture)
    first, second = layout.positions[0]
    return replace(layout, relation=relation(first, second))


def behind(dice: Dice, cast: Cast, picture: Picture) -> Layout:
    """One object that crosses the picture behind a bar, seen whole before and after it."""
    (clause,), margin = cast.clauses, MARGIN * picture.unit
    # Object, bar and object again share the width, with room to see the object whole on each side.
    # A triangle is too wide to be hidden whole: its bar is narrower than the triangle.
    spare = picture.width - 2 * margin - 2 * _CLEAR * picture.unit
    roomy = (spare - 2 * margin) / 6 / float(reach(clause, 1.0)[0])
    radius = max(roomy, SMALLEST_RADIUS * picture.unit)
    cast = shrunk(cast, np.minimum(cast.radii, radius))
    (clause,) = cast.clauses
    arms = reach(clause, cast.radii[0])
    half = float(arms[0])
    bar_width = min(2 * half + 2 * margin, spare - 4 * half)
    slack = max(spare - 4 * half - bar_width, 0)
    first = margin + half + dice.uniform(0, slack / 2)
    far = picture.width - margin - half - dice.uniform(0, slack / 2)
    left = dice.uniform(0.4, 0.6) * (far - first - 2 * half - bar_width) + first + half
    speed = (far - first) / max(picture.duration, 1e-9)
    if clause.motion == "left":
        first, left = picture.width - first, picture.width - left - bar_width
    y = dice.uniform(arms[1] + margin, picture.height - arms[3] - margin)
    drive = Drive(speed * np.array(TOWARDS[clause.motion], float), np.zeros(2))
    cast = replace(cast, speeds=np.array([speed]))
    layout = _follow(cast, [Body(arms, drive)], np.array([[first, y]]), picture)
    bar = (left, left + bar_width)
    size = (len(picture.times), *picture.size)
    seen = visible_fraction(clause.shape, layout.positions[:, 0], layout.radii[:, 0], bar, size)
    return replace(layout, bar=bar, visible=seen[:, None])


def colliding(dice: Dice, cast: Cast, picture: Picture) -> Layout:
    """Two discs that meet head-on along one axis and part elastically, with mass radius squared."""
    axis = dice.choose((0, 1))
    length, breadth = (picture.width, picture.height) if axis == 0 else picture.size
    margin, duration = MARGIN * picture.unit, max(picture.duration, 1e-9)
    radii, speeds = cast.radii, cast.speeds
    for _ in range(_TRIES["colliding"]):
        speeds = np.array([dice.uniform(0.6, 1.4) * speed for speed in cast.speeds])
        moment = dice.uniform(0.35, 0.6) * duration
        meeting = dice.uniform(0.35, 0.65) * length
        track = _meet(radii, speeds, moment, meeting, picture.times)
        inside = (track[0] - radii >= margin) & (track[0] + radii <= length - margin)
        if inside.all():
            break
    else:
        cast = shrunk(cast, np.full(2, radii.min()))
        radii, moment = cast.radii, duration / 2
        fit = length / 2 - 2 * float(radii[0]) - margin
        speeds = np.full(2, min(float(cast.speeds.min()), max(fit, 0) / moment))
        track = _meet(radii, speeds, moment, length / 2, picture.times)
    across = dice.uniform(float(radii.max()) + margin, breadth - float(radii.max()) - margin)
    positions = np.full((len(picture.times), 2, 2), across)
    speed = np.zeros_like(positions)
    positions[..., axis], speed[..., axis] = track
    layout = _layout(cast.clauses, positions, speed, np.broadcast_to(radii, positions.shape[:2]))
    return replace(layout, contacts=(Contact(float(moment), 0, 1),))


def _meet(
    radii: np.ndarray, speeds: np.ndarray, moment: float, meeting: float, times: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Places and velocities (F, 2) along the line of two discs that touch at `moment`."""
    touching = np.array([meeting - radii[0], meeting + radii[1]])
    before = np.array([speeds[0], -speeds[1]])
    after = np.array(collide((radii[0] ** 2, radii[1] ** 2), (before[0], before[1])))
    since = (times - moment)[:, None]
    velocity = np.where(since < 0, before, after)
    return touching + velocity * since, velocity


def _follow(cast: Cast, bodies: Sequence[Body], starts: np.ndarray, picture: Picture) -> Layout:
    """The layout in which every body follows its drive from its start."""
    positions, speeds, contacts = [], [], []
    for number, (body, start) in enumerate(zip(bodies, starts, strict=True)):
        low, high = body.room(picture.size, MARGIN * picture.unit)
        positions.append(trace(body.drive, start[None], picture.times, low, high)[0])
        speeds.append(velocities(body.drive, start, picture.times, low, high))
        touched = wall_contacts(body.drive, start, picture.duration, low, high)
        contacts += [Contact(time, number, wall) for time, wall in touched]
    radii = np.broadcast_to(cast.radii, (len(picture.times), len(bodies)))
    layout = _layout(cast.clauses, np.stack(positions, 1), np.stack(speeds, 1), radii)
    return replace(layout, contacts=tuple(sorted(contacts, key=lambda contact: contact.time)))


def _layout(
    clauses: tuple[Clause, ...], positions: np.ndarray, velocity: np.ndarray, radii: np.ndarray
) -> Layout:
    """A layout under a camera that stands still, with nothing hidden."""
    num_frames = len(positions)
    return Layout(
        clauses=clauses,
        positions=positions,
        velocities=velocity,
        radii=np.array(radii),
        visible=np.ones(positions.shape[:2]),
        pan=np.zeros((num_frames, 2)),
        zoom=np.ones(num_frames),
    )


def _with_camera(dice: Dice, cast: Cast, layout: Layout, picture: Picture) -> Layout:
    """The layout of still objects as the moving camera sees it.

    A pan is already in the drives; a zoom scales a layout that was placed at its largest.
    """
    verb, _, way = cast.camera.partition(" ")
    if verb == "pans":
        step = cast.speeds[0] * np.array(TOWARDS[way], float)
        return replace(layout, pan=picture.times[:, None] * step)
    if verb != "zooms":
        return layout
    most, duration = dice.uniform(*_ZOOM), max(picture.duration, 1e-9)
    begin, end = (1.0, most) if way == "in" else (most, 1.0)
    zoom = begin + (end - begin) * picture.times / duration
    share = (zoom / most)[:, None, None]
    centre = np.array([picture.width, picture.height]) / 2
    arms = layout.positions - centre
    return replace(
        layout,
        positions=centre + arms * share,
        velocities=arms * (end - begin) / duration / most,
        radii=layout.radii * share[..., 0],
        zoom=zoom,
    )
