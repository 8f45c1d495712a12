"""How far a reading is from the scene that the video should show, where the scene is known."""

from __future__ import annotations

import numpy as np

from opensora.arena import trajectory
from opensora.arena.grammar import DIRECTIONS
from opensora.arena.judge import assign
from opensora.arena.reading import Reading
from opensora.arena.truth import Scene
from opensora.errors import DataError


def against_truth(reading: Reading, truth: Scene, fps: float) -> dict[str, float]:
    """Errors of the most prominent tracks against the scene, matched by place."""
    if truth.frames != reading.num_frames:
        raise DataError(f"the truth has {truth.frames} frames, the video {reading.num_frames}")
    tracks = reading.objects[: len(truth.objects)]
    distance = np.array(
        [
            [
                np.linalg.norm(t.positions - truth.positions[:, n], axis=1)[t.seen].mean()
                for t in tracks
            ]
            for n in range(len(truth.objects))
        ]
    ).reshape(len(truth.objects), len(tracks))
    pairs = dict(assign(distance, limit=float(reading.height + reading.width)))
    scores: dict[str, float] = {}
    if pairs:
        errors = [distance[n, t] / reading.unit for n, t in pairs.items()]
        scores["position_error"] = float(np.mean(errors))
    speeds, falls = [], []
    for number, thing in enumerate(truth.objects):
        track = tracks[pairs[number]] if number in pairs else None
        if thing.clause.motion in DIRECTIONS:
            path = None if track is None else trajectory.line(track, reading, fps)
            expected = truth.velocities[0, number] / truth.scale
            speeds.append(_relative(None if path is None else path.velocity, expected))
        if thing.clause.motion == "fall" and truth.frames >= 3:
            path = None if track is None else trajectory.parabola(track, reading, fps)
            change = truth.velocities[-1, number] - truth.velocities[0, number]
            gravity = change / truth.scale * fps / (truth.frames - 1)
            falls.append(_relative(None if path is None else 2 * path.coefficients[2], gravity))
    if speeds:
        scores["speed_error"] = float(np.mean(speeds))
    if falls:
        scores["gravity_error"] = float(np.mean(falls))
    return scores


def _relative(measured: np.ndarray | None, expected: np.ndarray) -> float:
    """Length of the difference of two vectors against the expected length, at most 1."""
    if measured is None:
        return 1.0
    return min(1.0, float(np.linalg.norm(measured - expected) / np.linalg.norm(expected)))
