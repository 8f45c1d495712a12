"""What a followed object does: its heading, its fall, its bounces, and how it meets another.

Least-squares fits to the places that the judge read. Lengths are in pixels of a 64 x 64 picture
(so they mean the same at every size), times in seconds, y points down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from opensora.arena.reading import Reading, Track

STILL = 4.0
"""Pixels over the clip: less is no motion. The least that a prompt promises by default is 10."""

STRAIGHT = 1.5
"""Pixels (root mean square) that a straight path may stray from its line, or a tenth of its length
if that is more. Shuffled frames stray by 29 % of the length."""

MIN_PRESENCE = 0.75
"""Share of frames in which an object must be placed before its motion is judged."""

_DIAGONAL = 0.5  # the lesser component of a heading, as a share of the greater
_WALL = 4.0  # px between an object's edge and the wall that still count as touching
_TURN = 2.0  # px by which a turning point has to stand out
_MOST_TURNS = 3  # of a path between two walls in one clip; shuffled frames turn ten times
_TOUCH = 3.0  # px between two discs that still count as touching
_DROP = 6.0  # px that a falling object has to fall


@dataclass(frozen=True)
class Fit:
    """A polynomial in time through an object's places.

    Attributes:
        coefficients: (degree + 1, 2), constant term first, px / s^k.
        residual: root mean square distance from the fit, px.
        duration: of the clip, s.
    """

    coefficients: np.ndarray
    residual: float
    duration: float

    @property
    def velocity(self) -> np.ndarray:
        """(2,) px/s at the start."""
        return self.coefficients[1]

    @property
    def displacement(self) -> np.ndarray:
        """(2,) px that the linear term covers in the clip."""
        return self.coefficients[1] * self.duration


def places(track: Track, reading: Reading) -> tuple[np.ndarray, np.ndarray]:
    """Frame numbers and places (n, 2) in px at 64 of the frames in which the object is seen."""
    frames = np.flatnonzero(track.seen)
    return frames, track.positions[frames] / reading.unit


def fit(frames: np.ndarray, at: np.ndarray, *, degree: int, fps: float, num_frames: int) -> Fit:
    """The least-squares polynomial through places `at` (n, 2) of some frames of a clip."""
    powers = (frames / fps)[:, None] ** np.arange(degree + 1)
    coefficients = np.linalg.lstsq(powers, at, rcond=None)[0]
    residual = float(np.sqrt(((powers @ coefficients - at) ** 2).sum(1).mean()))
    return Fit(coefficients, residual, (num_frames - 1) / fps)


def line(track: Track, reading: Reading, fps: float) -> Fit | None:
    """The straight line through all places, or None when the object is placed too rarely."""
    return _whole_fit(track, reading, fps, degree=1)


def parabola(track: Track, reading: Reading, fps: float) -> Fit | None:
    """The parabola through all places, or None when the object is placed too rarely."""
    return _whole_fit(track, reading, fps, degree=2)


def _whole_fit(track: Track, reading: Reading, fps: float, *, degree: int) -> Fit | None:
    frames, at = places(track, reading)
    if len(frames) < degree + 2 or len(frames) + track.hidden < MIN_PRESENCE * reading.num_frames:
        return None
    return fit(frames, at, degree=degree, fps=fps, num_frames=reading.num_frames)


def heading(track: Track, reading: Reading, fps: float) -> str:
    """'left', 'right', 'up', 'down', 'still', or 'unclear' when it is none of them."""
    path = line(track, reading, fps)
    if path is None:
        return "unclear"
    _, at = places(track, reading)
    x, y = path.displacement
    length = float(np.hypot(x, y))
    if length < STILL:
        wander = np.linalg.norm(at - at.mean(0), axis=1).max()
        return "still" if wander < STILL else "unclear"
    lesser, greater = sorted((abs(x), abs(y)))
    if path.residual > max(STRAIGHT, 0.1 * length) or lesser > _DIAGONAL * greater:
        return "unclear"
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return "up" if y < 0 else "down"


def falls(track: Track, reading: Reading, fps: float) -> bool:
    """Whether the object drops with growing speed, on a parabola that starts (nearly) at rest."""
    path = parabola(track, reading, fps)
    if path is None or path.residual > STRAIGHT:
        return False
    drop = path.coefficients[2, 1] * path.duration**2
    total = drop + path.displacement[1]
    return bool(total >= _DROP and drop >= 0.5 * total)


def bounces(track: Track, reading: Reading, fps: float) -> bool:
    """Whether the object turns back at the edge of the picture at least once."""
    frames, at = places(track, reading)
    if len(frames) < max(4, MIN_PRESENCE * reading.num_frames):
        return False
    size = np.array([reading.width, reading.height]) / reading.unit
    # Half the box around the shape, in x and in y: the widest shape reaches 1.56 radii.
    reach = 1.56 * track.radius / reading.unit
    for axis in (0, 1):
        path = at[:, axis]
        for way, wall in ((path, size[axis] - path.max()), (-path, path.min())):
            stands_out = way.max() - max(way[0], way[-1]) >= _TURN
            if stands_out and wall <= reach + _WALL and _turns(way) <= _MOST_TURNS:
                return True
    return False


def _turns(path: np.ndarray) -> int:
    """How often a path (n,) turns back by more than a pixel."""
    turns, way, extreme = 0, 0.0, path[0]
    for place in path[1:]:
        step = place - extreme
        if way == 0 and abs(step) > 1:
            way = np.sign(step)
        if step * way >= 0:
            extreme = place if way else extreme
        elif abs(step) > 1:
            turns, way, extreme = turns + 1, -way, place
    return turns


def meeting(first: Track, second: Track, reading: Reading) -> tuple[int, np.ndarray] | None:
    """The nearest approach of two discs: its frame, and their gap (F,) in every frame.

    None when they are seen together too rarely. The gap is in px at 64, and negative where the
    discs overlap.
    """
    both = first.seen & second.seen
    if both.mean() < MIN_PRESENCE or both.sum() < 6:
        return None
    apart = np.linalg.norm(first.positions - second.positions, axis=1)
    gap = (apart - first.radius - second.radius) / reading.unit
    return int(np.nanargmin(gap)), gap


def collides(first: Track, second: Track, reading: Reading) -> bool:
    """Whether two discs come together, touch, and part again."""
    met = meeting(first, second, reading)
    if met is None:
        return False
    moment, gap = met
    seen = np.flatnonzero(~np.isnan(gap))
    before, after = gap[seen[0]] - gap[moment], gap[seen[-1]] - gap[moment]
    touches = abs(gap[moment]) <= _TOUCH and _turns(gap[seen]) == 1
    return bool(touches and before >= _TURN and after >= _TURN)


def exchange(
    first: Track, second: Track, reading: Reading, fps: float
) -> tuple[float, float] | None:
    """Relative change of momentum and of kinetic energy in a collision, masses radius squared.

    Momentum is compared with the sum of the partners' momenta, since the total may be near zero.
    None when fewer than three frames lie before or after the touch.
    """
    met = meeting(first, second, reading)
    if met is None:
        return None
    masses = np.array([first.radius, second.radius]) ** 2
    sides = []
    for chosen in (np.arange(reading.num_frames) < met[0], np.arange(reading.num_frames) > met[0]):
        speeds = []
        for track in (first, second):
            frames = np.flatnonzero(chosen & track.seen)
            if len(frames) < 3:
                return None
            at = track.positions[frames] / reading.unit
            path = fit(frames, at, degree=1, fps=fps, num_frames=reading.num_frames)
            speeds.append(path.velocity)
        sides.append(np.array(speeds))
    before, after = sides
    scale = float((masses * np.linalg.norm(before, axis=1)).sum())
    energy = float(masses @ (before**2).sum(1))
    if scale == 0:
        return None
    momentum = float(np.linalg.norm(masses @ after - masses @ before)) / scale
    return momentum, abs(float(masses @ (after**2).sum(1)) - energy) / energy


def reappears(track: Track, reading: Reading, fps: float) -> tuple[bool, float | None]:
    """Whether an object passes the bar as its motion before it foretells, and the error in px.

    The line through the places before the bar is continued; the error is the mean distance of the
    places after it. True when the object is on both sides and the error is under its radius.
    """
    if (reading.bars[:, 0] < 0).mean() > 0.5:
        return False, None
    frames, at = places(track, reading)
    x = at[:, 0]
    middle = reading.bars[frames].mean(1) / reading.unit
    known = reading.bars[frames, 0] >= 0
    start = x[0] < middle[0]
    before, after = known & ((x < middle) == start), known & ((x < middle) != start)
    if before.sum() < 3 or after.sum() < 3 or frames[before].max() > frames[after].min():
        return False, None
    path = fit(frames[before], at[before], degree=1, fps=fps, num_frames=reading.num_frames)
    expected = path.coefficients[0] + path.velocity * (frames[after] / fps)[:, None]
    error = float(np.linalg.norm(expected - at[after], axis=1).mean())
    return error <= track.radius / reading.unit, error
