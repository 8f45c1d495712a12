"""The captions of the arena, and what each one promises.

`caption(promise)` writes a sentence and `promise(text)` reads it back; each is the exact inverse of
the other, so a generated video can be judged against its prompt with no other truth at hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from opensora.arena.palette import COLOURS
from opensora.errors import UsageError, closest

Shape = Literal["circle", "square", "triangle"]
Direction = Literal["left", "right", "up", "down"]
Motion = Literal["left", "right", "up", "down", "still", "bounce", "fall", "collide"]
Size = Literal["", "small", "large"]
Speed = Literal["", "slowly", "quickly"]
Relation = Literal["", "left of", "right of", "above", "below"]
Camera = Literal[
    "fixed", "pans left", "pans right", "pans up", "pans down", "zooms in", "zooms out"
]

SHAPES: tuple[Shape, ...] = get_args(Shape)
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
MAX_OBJECTS = 3

_NUMBERS = {1: "a", 2: "two", 3: "three"}
_PHRASES: dict[str, str] = {
    **{direction: f"moving {direction}" for direction in DIRECTIONS},
    "still": "standing still",
    "bounce": "bouncing off the walls",
    "fall": "falling",
}
_MOTIONS = {phrase: motion for motion, phrase in _PHRASES.items()}

_NOUN = (
    r"(?P<number>an?|two|three) (?:(?P<size>small|large) )?"
    rf"(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})s?"
)
_CLAUSE = re.compile(
    rf"{_NOUN} (?P<motion>{'|'.join(_MOTIONS)})"
    r"(?: (?P<speed>slowly|quickly)|(?P<behind> behind a bar))?"
)
_PAIR = re.compile(r"(.+) (left of|right of|above|below|colliding with) (.+)")
_CAMERA = re.compile(
    rf", the camera ({'|'.join(camera for camera in get_args(Camera) if camera != 'fixed')})$"
)


@dataclass(frozen=True)
class Clause:
    """What a caption promises of one object, or of `count` objects that are alike.

    Attributes:
        size, speed: '' where the caption leaves it open.
        behind: the object passes behind the bar.
    """

    colour: str
    shape: Shape
    motion: Motion = "still"
    count: int = 1
    size: Size = ""
    speed: Speed = ""
    behind: bool = False


@dataclass(frozen=True)
class Promise:
    """Everything that a caption promises.

    Attributes:
        clauses: in the order of the sentence.
        relation: where the first of two still objects is, seen from the second.
        camera: how the camera moves; unless it is fixed, the objects stand still in the world.

    Raises:
        UsageError: for a promise that the grammar has no sentence for.
    """

    clauses: tuple[Clause, ...]
    relation: Relation = ""
    camera: Camera = "fixed"

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise UsageError(f"{problem} (found {self.clauses}, camera '{self.camera}')")

    @property
    def objects(self) -> tuple[Clause, ...]:
        """One clause an object, groups taken apart."""
        return tuple(replace(c, count=1) for c in self.clauses for _ in range(c.count))

    @property
    def has_bar(self) -> bool:
        return any(clause.behind for clause in self.clauses)


def caption(promise: Promise) -> str:
    """The one sentence that says `promise`."""
    nouns = [_noun(clause) for clause in promise.clauses]
    if promise.relation:
        text = f"{nouns[0]} {promise.relation} {nouns[1]}"
    elif promise.clauses[0].motion == "collide":
        text = f"{nouns[0]} colliding with {nouns[1]}"
    else:
        pairs = zip(nouns, promise.clauses, strict=True)
        parts = [f"{noun} {_action(clause)}" for noun, clause in pairs]
        text = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return text if promise.camera == "fixed" else f"{text}, the camera {promise.camera}"


def promise(text: str) -> Promise:
    """What `text` promises: the inverse of `caption` (case and outer spaces do not matter).

    Raises:
        UsageError: for a sentence outside the grammar, naming the part that cannot be read, the
            nearest known word, and a sentence that can be read.
    """
    sentence = text.strip().lower()
    found = _CAMERA.search(sentence)
    body = sentence[: found.start()] if found else sentence
    camera = found.group(1) if found else "fixed"
    pair = _PAIR.fullmatch(body)
    if pair:
        first, link, second = pair.groups()
        motion = "collide" if link == "colliding with" else "still"
        still = _PHRASES["still"]
        clauses = tuple(
            replace(_clause(f"{noun} {still}", text), motion=motion) for noun in (first, second)
        )
        relation = "" if motion == "collide" else link
    else:
        clauses = tuple(_clause(part, text) for part in re.split(", | and ", body))
        relation = ""
    result = Promise(clauses, relation, camera)  # type: ignore[arg-type]
    if caption(result) != sentence:
        raise UsageError(f"prompt '{text}' is not quite in the grammar: say '{caption(result)}'")
    return result


def words() -> list[str]:
    """Every word that a caption can contain, sorted."""
    links = "and a an two three small large slowly quickly behind bar with colliding of above below"
    cameras = " ".join(get_args(Camera)[1:])
    text = " ".join([links, "the camera", cameras, *COLOURS, *_MOTIONS])
    return sorted({*text.split(), *SHAPES, *(f"{shape}s" for shape in SHAPES)})


def _noun(clause: Clause) -> str:
    described = " ".join(filter(None, [clause.size, clause.colour, clause.shape]))
    if clause.count > 1:
        return f"{_NUMBERS[clause.count]} {described}s"
    return f"an {described}" if described[0] in "aeiou" else f"a {described}"


def _action(clause: Clause) -> str:
    return " ".join(
        filter(None, [_PHRASES[clause.motion], clause.speed, "behind a bar" * clause.behind])
    )


def _clause(part: str, text: str) -> Clause:
    match = _CLAUSE.fullmatch(part)
    if match is None:
        strangers = [w for w in re.findall(r"[^\s,]+", part) if w not in words()]
        near = closest(strangers[0], words()) if strangers else None
        hint = f" '{strangers[0]}' is not a word of the arena" if strangers else ""
        hint += f" (did you mean '{near}'?)." if near else "." if strangers else ""
        raise UsageError(
            f"prompt '{text}': cannot read '{part}'.{hint} Write for example "
            "'a red circle moving left' or 'two green squares moving up slowly'."
        )
    return Clause(
        colour=match["colour"],
        shape=match["shape"],  # type: ignore[arg-type]
        motion=_MOTIONS[match["motion"]],  # type: ignore[arg-type]
        count={word: number for number, word in _NUMBERS.items()}.get(match["number"], 1),
        size=match["size"] or "",  # type: ignore[arg-type]
        speed=match["speed"] or "",  # type: ignore[arg-type]
        behind=match["behind"] is not None,
    )


def _problem(promise: Promise) -> str | None:
    """Why no sentence says this promise, or None."""
    return next(_problems(promise), None)


def _problems(promise: Promise) -> Iterator[str]:
    clauses = promise.clauses
    motions = {clause.motion for clause in clauses}
    total = sum(clause.count for clause in clauses)
    singles_of_two = len(clauses) == 2 and total == 2
    if not 1 <= total <= MAX_OBJECTS:
        yield f"a scene has 1 to {MAX_OBJECTS} objects, not {total}"
    for clause in clauses:
        if clause.colour not in COLOURS or clause.shape not in SHAPES:
            yield f"no such object: {clause.colour} {clause.shape}"
        if clause.speed and clause.motion not in DIRECTIONS:
            yield "only what moves left, right, up or down moves slowly or quickly"
        if clause.behind and (clause.motion not in ("left", "right") or total > 1 or clause.speed):
            yield "one object alone passes behind the bar, moving left or right"
    if len({clause.colour for clause in clauses}) < len(clauses):
        yield "objects of one colour are named once, as a group: 'two red circles ...'"
    if promise.relation and (not singles_of_two or motions != {"still"}):
        yield "a relation joins two single objects that stand still"
    if "collide" in motions and (
        not singles_of_two or len(motions) > 1 or {c.shape for c in clauses} != {"circle"}
    ):
        yield "a collision joins two single circles"
    if promise.camera != "fixed" and motions != {"still"}:
        yield "the camera moves only over objects that stand still"
