"""What a scene holds: every object's place, speed and size in every frame, and the caption.

Plain data with exact numbers; made by `scenes.sample`, painted by `draw.render`, stored as one JSON
line by `dataset.write_dataset`, and compared with what `judge` reads from pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from opensora.arena.grammar import Clause, Promise, Relation, caption
from opensora.arena.motion import Contact


@dataclass(frozen=True)
class Thing:
    """One object: what the caption says of it, and what it leaves open.

    Attributes:
        clause: colour, shape, motion and words, with count 1.
        speed: px/s at the start (of its apparent motion, where the camera pans).
    """

    clause: Clause
    speed: float

    @property
    def colour(self) -> str:
        return self.clause.colour

    @property
    def shape(self) -> str:
        return self.clause.shape


@dataclass(frozen=True, eq=False)
class Scene:
    """A scene of F frames and N objects, in picture coordinates (camera motion included).

    Attributes:
        promise: what the caption says; `caption` says it.
        positions: float64 (F, N, 2), centroid x, y in pixels, y down; pixel 0 covers [0, 1].
        velocities: float64 (F, N, 2), px/s.
        radii: float64 (F, N), radius of the circle of equal area, px.
        visible: float64 (F, N), the part of each object's area that nothing hides.
        contacts: touches of objects and walls, in order of time.
        pan: float64 (F, 2), how far the camera moved, px.
        zoom: float64 (F,), magnification about the centre.
        bar: left and right edge of the bar in px, or None.
    """

    promise: Promise
    objects: tuple[Thing, ...]
    height: int
    width: int
    fps: float
    positions: np.ndarray
    velocities: np.ndarray
    radii: np.ndarray
    visible: np.ndarray
    contacts: tuple[Contact, ...]
    pan: np.ndarray
    zoom: np.ndarray
    bar: tuple[float, float] | None
    ground: str
    split: str
    seed: int
    index: int

    @property
    def caption(self) -> str:
        return caption(self.promise)

    @property
    def frames(self) -> int:
        return len(self.positions)

    @property
    def scale(self) -> float:
        """Pixels of this scene to one pixel of a 64 x 64 picture."""
        return min(self.height, self.width) / 64


def relation(first: np.ndarray, second: np.ndarray) -> Relation:
    """Where `first` (x, y) is, seen from `second`: by the larger of the two differences."""
    x, y = first - second
    if abs(x) > abs(y):
        return "left of" if x < 0 else "right of"
    return "above" if y < 0 else "below"


def record(scene: Scene) -> dict[str, Any]:
    """The scene as JSON-ready data; lengths in px to 3 decimals, times in seconds."""
    pairs = [(i, j) for j in range(len(scene.objects)) for i in range(j)]
    start = scene.positions[0]
    return {
        "caption": scene.caption,
        "count": len(scene.objects),
        "camera": scene.promise.camera,
        "split": scene.split,
        "seed": scene.seed,
        "index": scene.index,
        "height": scene.height,
        "width": scene.width,
        "frames": scene.frames,
        "fps": scene.fps,
        "bar": None if scene.bar is None else [round(edge, 3) for edge in scene.bar],
        "pan": scene.pan.round(3).tolist(),
        "zoom": scene.zoom.round(5).tolist(),
        "objects": [_object(scene, number) for number in range(len(scene.objects))],
        "relations": [[i, relation(start[i], start[j]), j] for i, j in pairs],
        "contacts": [
            {
                "frame": int(np.ceil(c.time * scene.fps - 1e-9)),
                "time": round(c.time, 5),
                "thing": c.thing,
                "other": c.other,
            }
            for c in scene.contacts
        ],
    }


def _object(scene: Scene, number: int) -> dict[str, Any]:
    thing = scene.objects[number]
    return {
        "colour": thing.colour,
        "shape": thing.shape,
        "motion": thing.clause.motion,
        "size_word": thing.clause.size,
        "speed_word": thing.clause.speed,
        "behind": thing.clause.behind,
        "speed": round(thing.speed, 3),
        "position": scene.positions[:, number].round(3).tolist(),
        "velocity": scene.velocities[:, number].round(3).tolist(),
        "radius": scene.radii[:, number].round(3).tolist(),
        "visible": scene.visible[:, number].round(4).tolist(),
    }
