"""Captioned scenes whose truth is known in every frame.

`sample(config, seed, index)` is a pure function: a scene does not depend on how many others are
made, on the machine, or on the process. It says what is where; `draw.render` paints it,
`dataset.write_dataset` puts many on disk, `judge` reads pictures back without seeing any of this.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby, product
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import Field, model_validator

from opensora.arena import stage
from opensora.arena.cast import Cast, Picture
from opensora.arena.draw import EXTENTS
from opensora.arena.grammar import (
    DIRECTIONS,
    SHAPES,
    Camera,
    Clause,
    Motion,
    Promise,
    Shape,
    Size,
    Speed,
)
from opensora.arena.measures import RADIUS, SPEED, lower_third, radius_range, upper_third
from opensora.arena.place import MARGIN, Dice
from opensora.arena.truth import Scene, Thing
from opensora.config import Config
from opensora.errors import UsageError, did_you_mean
from opensora.runtime import address

Colour = Literal["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"]
Kind = Literal[
    "left", "right", "up", "down", "still", "bounce", "fall", "collide", "behind", "beside"
]
Split = Literal["train", "heldout", "fast"]
SPLITS: tuple[Split, ...] = get_args(Split)

Side = Annotated[int, Field(ge=32, le=2048, multiple_of=2)]  # even, as h264 needs
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

HELD_OUT: tuple[tuple[Colour, Shape], ...] = (
    ("red", "square"),
    ("orange", "triangle"),
    ("yellow", "circle"),
    ("green", "triangle"),
    ("cyan", "square"),
    ("blue", "circle"),
    ("purple", "triangle"),
    ("pink", "circle"),
)
"""Each colour misses one shape in training, and each shape two or three colours."""

_ONLY_WITH: dict[str, int] = {"collide": 2, "beside": 2, "behind": 1}


class SceneConfig(Config):
    """The distribution that scenes are drawn from. Lengths are px of a 64 x 64 picture and grow
    with min(height, width)."""

    kind: Literal["scenes"] = "scenes"
    height: Side = 64
    width: Side = 64
    frames: int = Field(default=17, ge=1, le=2048, description="frames a clip")
    fps: float = Field(default=8.0, gt=0, le=240, description="frames a second")
    num_objects: dict[Annotated[int, Field(ge=1, le=3)], Weight] = Field(
        default={1: 0.6, 2: 0.3, 3: 0.1}, description="weight of each number of objects"
    )
    motions: dict[Kind, Weight] = Field(
        default={"left": 1, "right": 1, "up": 1, "down": 1}, description="weight of each kind"
    )
    cameras: dict[Camera, Weight] = Field(
        default={"fixed": 1}, description="weights; a moving camera sees still objects"
    )
    colours: tuple[Colour, ...] = Field(default=get_args(Colour), min_length=1)
    shapes: tuple[Shape, ...] = Field(default=SHAPES, min_length=1)
    held_out: tuple[tuple[Colour, Shape], ...] = Field(
        default=HELD_OUT, description="pairs that only the split `heldout` shows"
    )
    radius: tuple[Positive, Positive] = Field(
        default=RADIUS, description="px, circle of equal area"
    )
    speed: tuple[Positive, Positive] = Field(
        default=SPEED, description="px/s of straight motion and camera pans"
    )
    fast_speed: tuple[Positive, Positive] = Field(
        default=(15.5, 18.5), description="px/s in the split `fast`"
    )
    speed_words: Share = Field(default=0.0, description="share of motions that say how fast")
    size_words: Share = Field(default=0.0, description="share of objects that say how large")
    alike: Share = Field(default=0.15, description="share of crowded scenes with a group of equals")
    ground: Literal["plain", "dots"] = Field(default="plain", description="dots show the camera")

    @model_validator(mode="after")
    def _check(self) -> SceneConfig:
        for name in ("num_objects", "motions", "cameras"):
            if not sum(getattr(self, name).values()) > 0:
                raise ValueError(f"{name} needs at least one weight above 0")
        for name in ("radius", "speed", "fast_speed"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} is (low, high), found ({low}, {high})")
        for count, weight in self.num_objects.items():
            if weight and not self.kinds(count):
                raise ValueError(
                    f"no motion of {sorted(self.motions)} fits {count} objects: give weight to "
                    f"'left', or set num_objects.{count}=0"
                )
        seen = self.looks("train")
        for name in (*self.colours, *self.shapes):
            if not any(name in look for look in seen):
                raise ValueError(
                    f"'{name}' never occurs in training because held_out has all its pairs: "
                    "take one out of held_out, or set held_out=[]"
                )
        if problem := self.shortage("train") or self.too_fast("speed"):
            raise ValueError(problem)
        return self

    def shortage(self, split: Split) -> str | None:
        """Why a split has too few looks for the scenes it should show, or None if it has enough."""
        looks = self.looks(split)
        most = max(count for count, weight in self.num_objects.items() if weight)
        colours = len({colour for colour, _ in looks})
        if colours < most:
            return f"{most} objects need {most} colours, but split '{split}' has {colours}"
        circles = sum(shape == "circle" for _, shape in looks)
        if self.motions.get("collide") and self.num_objects.get(2) and circles < 2:
            return f"collisions need circles of two colours, but split '{split}' has {circles}"
        return None

    def too_fast(self, name: Literal["speed", "fast_speed"]) -> str | None:
        """Why straight motion at this range does not fit between the edges, or None if it does."""
        arms = max(max(e[0] + e[2], e[1] + e[3]) for e in (EXTENTS[s] for s in self.shapes))
        room = 64 - 2 * MARGIN - arms * self.radius[0]
        duration, speed = (self.frames - 1) / self.fps, getattr(self, name)[1]
        if speed * duration <= room:
            return None
        return (
            f"at {name} {speed} px/s an object travels {speed * duration:.1f} px in "
            f"{duration:.3g} s, but has {room:.1f} px: set {name} to at most "
            f"{room / duration:.1f}, radius smaller, or fewer frames"
        )

    def looks(self, split: Split) -> list[tuple[Colour, Shape]]:
        """The colour-shape pairs that a split shows."""
        pairs = product(self.colours, self.shapes)
        return [pair for pair in pairs if (pair in self.held_out) == (split == "heldout")]

    def kinds(self, count: int, camera: Camera = "fixed") -> dict[Kind, float]:
        """The weights of the kinds of motion that `count` objects can have under a camera."""
        weights: dict[Kind, float] = dict(self.motions)
        if camera != "fixed":
            weights = {"still": 1.0, "beside": weights.get("beside", 0.0)}
        return {k: w for k, w in weights.items() if w and _ONLY_WITH.get(k, count) == count}


def varied(**changes: Any) -> SceneConfig:
    """Everything the arena knows: all motions, cameras and words. `changes` replace fields."""
    fields = {
        "num_objects": {1: 0.5, 2: 0.35, 3: 0.15},
        "motions": dict.fromkeys(get_args(Kind), 1.0),
        "cameras": {"fixed": 6.0, **dict.fromkeys(get_args(Camera)[1:], 0.25)},
        "speed_words": 0.5,
        "size_words": 0.3,
    }
    return SceneConfig.model_validate({**fields, **changes})


def sample(config: SceneConfig, seed: int, index: int, split: Split = "train") -> Scene:
    """Scene `index` of a split: a pure function of its arguments.

    Raises:
        UsageError: for an unknown split, or one that this config leaves empty.
    """
    _check_split(config, split)
    dice = Dice(address(seed, f"arena scene {split}", index))
    count = dice.pick(config.num_objects)
    camera = dice.pick(config.cameras)
    kind = dice.pick(config.kinds(count, camera))
    cast = _cast(dice, config, split, count=count, kind=kind, camera=camera)
    times = np.arange(config.frames) / config.fps
    picture = Picture(config.height, config.width, times)
    stagings = {"collide": stage.colliding, "behind": stage.behind, "beside": stage.beside}
    layout = stagings.get(kind, stage.freely)(dice, cast, picture)
    groups = [(clause, len(list(group))) for clause, group in groupby(layout.clauses)]
    clauses = tuple(replace(clause, count=number) for clause, number in groups)
    speeds = np.linalg.norm(layout.velocities[0], axis=-1)
    things = zip(layout.clauses, speeds.tolist(), strict=True)
    arrays = ("positions", "velocities", "radii", "visible", "contacts", "pan", "zoom", "bar")
    return Scene(
        promise=Promise(clauses, layout.relation, camera),
        objects=tuple(Thing(clause, speed) for clause, speed in things),
        height=config.height,
        width=config.width,
        fps=config.fps,
        ground=config.ground,
        split=split,
        seed=seed,
        index=index,
        **{name: getattr(layout, name) for name in arrays},
    )


def _check_split(config: SceneConfig, split: Split) -> None:
    if split not in SPLITS:
        raise UsageError(f"no split '{split}'." + did_you_mean(split, SPLITS))
    problem = config.shortage(split)
    if problem:
        raise UsageError(f"{problem}: change held_out, num_objects or motions")
    if split == "fast" and (problem := config.too_fast("fast_speed")):
        raise UsageError(problem)


def _cast(
    dice: Dice, config: SceneConfig, split: Split, *, count: int, kind: Kind, camera: Camera
) -> Cast:
    """Who plays: looks, motions, words, sizes and speeds, before anything has a place."""
    motions = _motions(dice, config, count, kind, camera)
    looks = _looks(dice, config.looks(split), count, circles=kind == "collide")
    alike = count > 1 and kind not in ("collide", "beside") and dice.chance(config.alike)
    unit = min(config.height, config.width) / 64
    duration = (config.frames - 1) / config.fps
    clauses, radii, speeds = [], [], []
    pan_speed = dice.uniform(*config.speed)
    for (colour, shape), motion in zip(looks, motions, strict=True):
        says_speed = split != "fast" and motion in DIRECTIONS and kind != "behind"
        pace, speed = _pace(dice, config, split, says=says_speed)
        pans = camera.startswith("pans")
        speed = pan_speed if pans else speed
        moves = speed * duration if pans or motion in DIRECTIONS else 0.0
        size, radius = _size(dice, config, shape, count, camera, moves)
        behind = kind == "behind"
        clauses.append(Clause(colour, shape, motion, size=size, speed=pace, behind=behind))
        radii.append(radius * unit)
        speeds.append(speed * unit)
    if alike:
        clauses, radii, speeds = clauses[:1] * count, radii[:1] * count, speeds[:1] * count
    return Cast(tuple(clauses), np.array(radii), np.array(speeds), camera)


def _motions(
    dice: Dice, config: SceneConfig, count: int, kind: Kind, camera: Camera
) -> list[Motion]:
    if camera != "fixed" or kind == "beside":
        return ["still"] * count
    if kind == "collide":
        return ["collide"] * count
    if kind == "behind":
        return [dice.choose(("left", "right"))]
    free = {k: w for k, w in config.kinds(count).items() if k not in ("collide", "beside")}
    return [kind, *(dice.pick(free) for _ in range(count - 1))]  # type: ignore[list-item]


def _looks(
    dice: Dice, pairs: list[tuple[Colour, Shape]], count: int, *, circles: bool
) -> list[tuple[Colour, Shape]]:
    """Looks of `count` objects, all of different colours."""
    chosen: list[tuple[Colour, Shape]] = []
    for _ in range(count):
        used = {colour for colour, _ in chosen}
        fit = [p for p in pairs if p[0] not in used and (p[1] == "circle" or not circles)]
        chosen.append(dice.choose(fit))
    return chosen


def _pace(dice: Dice, config: SceneConfig, split: Split, *, says: bool) -> tuple[Speed, float]:
    """A speed in px/s at 64, and the word for it if the caption says one."""
    if not (says and dice.chance(config.speed_words)):
        return "", dice.uniform(*(config.fast_speed if split == "fast" else config.speed))
    if dice.chance(0.5):
        return "slowly", dice.uniform(*lower_third(config.speed))
    return "quickly", dice.uniform(*upper_third(config.speed))


def _size(
    dice: Dice, config: SceneConfig, shape: Shape, count: int, camera: Camera, moves: float
) -> tuple[Size, float]:
    """A radius in px at 64 that leaves room to move, and the word that the caption has for it."""
    low, high = radius_range(config.radius, count)
    zooms = camera.startswith("zooms")
    if zooms:  # placed at its largest
        low = (low + high) / 2
    left, up, right, down = EXTENTS[shape]
    fit = max(low, (64 - 2 * MARGIN - moves) / max(left + right, up + down))
    if not zooms and dice.chance(config.size_words):
        small, large = lower_third((low, high)), upper_third((low, high))
        if dice.chance(0.5):
            return "small", dice.uniform(low, min(small[1], fit))
        if fit > large[0]:
            return "large", dice.uniform(large[0], min(high, fit))
    return "", dice.uniform(low, min(high, fit))
