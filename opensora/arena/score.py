"""Did the video keep its prompt's promise: one number a question, and intervals over many videos.

Objects are matched to the promise by colour, then shape, among as many of the most prominent ones
as were promised, so painting more of them gains nothing. A question that a prompt does not ask is
absent from the result; every value is finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from opensora.arena import trajectory
from opensora.arena.accuracy import against_truth
from opensora.arena.grammar import DIRECTIONS, Clause, Promise
from opensora.arena.grammar import promise as parse
from opensora.arena.judge import assign, read
from opensora.arena.measures import RADIUS, SPEED, Range, radius_range
from opensora.arena.reading import Reading, Track
from opensora.arena.truth import Scene, relation

Scores = dict[str, float]

_ZOOM = 1.3
"""Ratio of last to first area from which a zoom is accepted; scenes have 1.69 and more."""

_KINDS = {"fall": trajectory.falls, "bounce": trajectory.bounces}
_OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
_ALL_OR_NOTHING = (
    "count",
    "binding",
    "direction",
    "motion",
    "reappearance",
    "relation",
    "camera",
    "speed",
    "size",
)


def score(
    video: np.ndarray | Reading,
    promise: Promise | str,
    *,
    fps: float = 8.0,
    truth: Scene | None = None,
    speed: Range = SPEED,
    radius: Range = RADIUS,
) -> Scores:
    """Judge one video against its prompt. `docs/arena.md` defines every key.

    Args:
        video: uint8 (F, H, W, 3) frames, or what `judge.read` made of them.
        promise: a prompt in the arena's grammar, or its parsed promise.
        truth: the scene that the video should show; adds the errors against it.
        speed, radius: the ranges that words of speed and size refer to, as in the config.

    Raises:
        UsageError: for a prompt outside the grammar.
        DataError: for frames of another kind, or a truth of another length.
    """
    promise = parse(promise) if isinstance(promise, str) else promise
    reading = video if isinstance(video, Reading) else read(video)
    found = match(reading, promise.objects)
    scores = _appearance(reading, promise, found)
    scores |= _permanence(reading, promise.objects, found)
    if reading.num_frames >= 3:
        scores |= _motion(reading, promise, found, fps)
        scores |= _physics(reading, promise, found, fps)
    scores |= _words(reading, promise.objects, found, fps, speed, radius)
    if promise.relation:
        scores["relation"] = _relation(promise, found)
    asked = [scores[name] for name in _ALL_OR_NOTHING if name in scores]
    scores["success"] = float(min(asked) == 1)
    return scores | (against_truth(reading, truth, fps) if truth is not None else {})


def match(reading: Reading, promised: Sequence[Clause]) -> list[Track | None]:
    """The track that stands for each promised object, or None where there is none.

    Only the most prominent tracks are taken, as many as were promised; among them the assignment
    with most right colours, then most right shapes, then of the more prominent ones.
    """
    present = reading.objects[: len(promised)]
    cost = np.array(
        [
            [4.0 - 2.0 * (t.colour == p.colour) - (t.shape == p.shape) for t in present]
            for p in promised
        ]
    ).reshape(len(promised), len(present))
    tracks: list[Track | None] = [None] * len(promised)
    for row, column in assign(cost, limit=5.0):
        tracks[row] = present[column]
    return tracks


def aggregate(
    scores: Sequence[Mapping[str, float]], *, seed: int = 0, resamples: int = 2000
) -> dict[str, dict[str, float]]:
    """Mean of each metric over the videos that have it, with its 95 % interval.

    Percentile bootstrap over videos (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    chapter 13), addressed by `seed`.

    Returns:
        {metric: {"mean", "low", "high", "n"}}.
    """
    summary = {}
    for name in sorted({name for one in scores for name in one}):
        values = np.array([one[name] for one in scores if name in one], float)
        chance = np.random.Generator(np.random.Philox(key=seed))
        rows = (chance.random((resamples, len(values))) * len(values)).astype(int)
        low, high = np.quantile(values[rows].mean(1), [0.025, 0.975])
        summary[name] = {
            "mean": float(values.mean()),
            "low": float(low),
            "high": float(high),
            "n": len(values),
        }
    return summary


def _appearance(reading: Reading, promise: Promise, found: list[Track | None]) -> Scores:
    promised = promise.objects
    colour = [t is not None and t.colour == p.colour for t, p in zip(found, promised, strict=True)]
    shape = [t is not None and t.shape == p.shape for t, p in zip(found, promised, strict=True)]
    has_bar = bool((reading.bars[:, 0] >= 0).mean() > 0.5)
    strangers = _mode(reading.strangers) + abs(has_bar - promise.has_bar)
    return {
        "count": float(_mode(reading.counts) == len(promised) and strangers == 0),
        "colour": float(np.mean(colour)),
        "shape": float(np.mean(shape)),
        "binding": float(np.mean(np.logical_and(colour, shape))),
    }


def _permanence(reading: Reading, promised: Sequence[Clause], found: list[Track | None]) -> Scores:
    """Whether what was promised is there in every frame, and stays what it is."""
    there, colours, shapes, variation = [], [], [], []
    for track, clause in zip(found, promised, strict=True):
        if track is None:
            there.append(0.0)
            colours.append(0.0)
            shapes.append(0.0)
            continue
        names = track.colours[track.seen]
        right = track.colour == clause.colour
        hidden = track.hidden if clause.behind else 0
        same = names == np.bincount(names).argmax()
        there.append(right * (same.sum() + hidden) / reading.num_frames)
        colours.append(same.mean())
        whole = track.whole if track.whole.any() else track.seen
        shapes.append((track.overlaps[whole].argmax(1) == track.shape_evidence.argmax()).mean())
        variation.append(track.areas[whole].std() / track.areas[whole].mean())
    scores = {
        "permanence": float(np.mean(there)),
        "colour_stability": float(np.mean(colours)),
        "shape_stability": float(np.mean(shapes)),
    }
    return scores | ({"area_variation": float(np.mean(variation))} if variation else {})


def _motion(reading: Reading, promise: Promise, found: list[Track | None], fps: float) -> Scores:
    """Directions, kinds of motion, and the camera, each where the promise names one."""
    pairs = list(zip(found, promise.objects, strict=True))
    headings = [None if t is None else trajectory.heading(t, reading, fps) for t, _ in pairs]
    if promise.camera != "fixed":
        return {"camera": float(_camera(promise.camera, headings, found))}
    scores: Scores = {}
    straight = [
        heading == clause.motion
        for heading, (_, clause) in zip(headings, pairs, strict=True)
        if clause.motion in (*DIRECTIONS, "still")
    ]
    if straight:
        scores["direction"] = float(np.mean(straight))
    kinds = [
        track is not None and _KINDS[clause.motion](track, reading, fps)
        for track, clause in pairs
        if clause.motion in _KINDS
    ]
    if promise.clauses[0].motion == "collide":
        both = [track for track in found if track is not None]
        kinds.append(len(both) == 2 and trajectory.collides(both[0], both[1], reading))
    if kinds:
        scores["motion"] = float(np.mean(kinds))
    if promise.has_bar:
        track = found[0]
        scores["reappearance"] = float(
            track is not None and trajectory.reappears(track, reading, fps)[0]
        )
    return scores


def _camera(camera: str, headings: list[str | None], found: list[Track | None]) -> bool:
    """Whether all objects move (or grow) as they must under a moving camera."""
    verb, way = camera.split()
    if verb == "pans":
        return all(heading == _OPPOSITE[way] for heading in headings)
    for track in found:
        if track is None:
            return False
        areas = track.areas[track.whole]
        if len(areas) < 3:
            return False
        growth = areas[-1] / areas[0]
        if (growth if way == "in" else 1 / growth) < _ZOOM:
            return False
    return True


def _physics(reading: Reading, promise: Promise, found: list[Track | None], fps: float) -> Scores:
    """Errors of motion in px and relative changes, of the objects that were found."""
    scores: Scores = {}
    residuals = [
        path.residual
        for track, clause in zip(found, promise.objects, strict=True)
        if track is not None
        and clause.motion in (*DIRECTIONS, "still")
        and (path := trajectory.line(track, reading, fps)) is not None
    ]
    if residuals and promise.camera == "fixed":
        scores["newton_residual"] = float(np.mean(residuals))
    if promise.clauses[0].motion == "collide" and found[0] and found[1]:
        changes = trajectory.exchange(found[0], found[1], reading, fps)
        if changes is not None:
            scores["momentum_error"], scores["energy_error"] = changes
    if promise.has_bar and found[0]:
        error = trajectory.reappears(found[0], reading, fps)[1]
        if error is not None:
            scores["reappearance_error"] = error
    return scores


def _words(
    reading: Reading,
    promised: Sequence[Clause],
    found: list[Track | None],
    fps: float,
    speed: Range,
    radius: Range,
) -> Scores:
    """Words of speed and size: right when the measure lies in the word's half of the range."""
    paces, sizes = [], []
    for track, clause in zip(found, promised, strict=True):
        if clause.speed:
            path = None if track is None else trajectory.line(track, reading, fps)
            moves = path is not None and np.linalg.norm(path.displacement) >= trajectory.STILL
            quick = moves and np.linalg.norm(path.velocity) > sum(speed) / 2  # type: ignore[union-attr]
            paces.append(moves and quick == (clause.speed == "quickly"))
        if clause.size:
            middle = sum(radius_range(radius, len(promised))) / 2
            large = track is not None and track.radius / reading.unit > middle
            sizes.append(track is not None and large == (clause.size == "large"))
    scores = {"speed": float(np.mean(paces))} if paces else {}
    return scores | ({"size": float(np.mean(sizes))} if sizes else {})


def _relation(promise: Promise, found: list[Track | None]) -> float:
    """1 when both objects are there in their colours and on the promised sides of each other."""
    means = []
    for track, clause in zip(found, promise.objects, strict=True):
        if track is None or track.colour != clause.colour:
            return 0.0
        means.append(np.nanmean(track.positions, axis=0))
    return float(relation(means[0], means[1]) == promise.relation)


def _mode(values: np.ndarray) -> int:
    return int(np.bincount(values).argmax())
