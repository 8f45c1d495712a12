"""Captions and promises are exact inverses, and other sentences are refused with the mend."""

import itertools
from typing import get_args

import pytest

from opensora.arena.grammar import (
    DIRECTIONS,
    SHAPES,
    Clause,
    Promise,
    Size,
    Speed,
    caption,
    promise,
    words,
)
from opensora.arena.palette import COLOURS
from opensora.arena.scenes import SPLITS, sample
from opensora.errors import UsageError

EXAMPLES = {
    "a red circle moving left slowly": Promise((Clause("red", "circle", "left", speed="slowly"),)),
    "an orange square standing still": Promise((Clause("orange", "square"),)),
    "a large blue square moving up": Promise((Clause("blue", "square", "up", size="large"),)),
    "two green circles moving right": Promise((Clause("green", "circle", "right", count=2),)),
    "three small pink triangles falling": Promise(
        (Clause("pink", "triangle", "fall", count=3, size="small"),)
    ),
    "a red circle moving left and a blue square bouncing off the walls": Promise(
        (Clause("red", "circle", "left"), Clause("blue", "square", "bounce"))
    ),
    "a red circle moving left, a cyan square moving up and a blue triangle standing still": Promise(
        (
            Clause("red", "circle", "left"),
            Clause("cyan", "square", "up"),
            Clause("blue", "triangle"),
        )
    ),
    "a red circle colliding with a small blue circle": Promise(
        (Clause("red", "circle", "collide"), Clause("blue", "circle", "collide", size="small"))
    ),
    "a purple circle moving right behind a bar": Promise(
        (Clause("purple", "circle", "right", behind=True),)
    ),
    "a yellow square left of an orange circle, the camera zooms in": Promise(
        (Clause("yellow", "square"), Clause("orange", "circle")), "left of", "zooms in"
    ),
    "two cyan squares standing still, the camera pans down": Promise(
        (Clause("cyan", "square", count=2),), camera="pans down"
    ),
}


@pytest.mark.parametrize("text", EXAMPLES)
def test_a_sentence_means_its_promise_and_back(text):
    assert promise(text) == EXAMPLES[text]
    assert caption(EXAMPLES[text]) == text


def test_every_straight_clause_makes_the_round_trip():
    options = (COLOURS, SHAPES, DIRECTIONS, get_args(Speed), get_args(Size))
    for colour, shape, motion, pace, size in itertools.product(*options):
        made = Promise((Clause(colour, shape, motion, size=size, speed=pace),))
        assert promise(caption(made)) == made


def test_every_sampled_caption_makes_the_round_trip(everything):
    for split, index in itertools.product(SPLITS, range(60)):
        scene = sample(everything, 1, index, split)
        assert promise(scene.caption) == scene.promise
        assert set(scene.caption.replace(",", "").split()) <= set(words())


def test_case_and_outer_spaces_do_not_matter():
    assert promise("  A Red Circle moving LEFT ") == promise("a red circle moving left")


def test_a_group_counts_as_its_objects():
    objects = promise("two green circles moving right").objects
    assert objects == (Clause("green", "circle", "right"),) * 2


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("a rde circle moving left", "did you mean 'red'"),
        ("a red hexagon moving left", "'hexagon' is not a word of the arena"),
        ("a orange circle moving left", "an orange circle moving left"),
        ("two red circle moving left", "two red circles moving left"),
        ("a red circles moving left", "a red circle moving left"),
        ("", "a red circle moving left"),
        ("a red circle", "cannot read 'a red circle'"),
        ("a red circle standing still slowly", "moves slowly or quickly"),
        ("a red circle moving left and a red square moving up", "two red circles"),
        ("a red circle colliding with a blue square", "two single circles"),
        ("two red circles left of a blue square", "two single objects"),
        ("a red circle moving left, the camera pans up", "stand still"),
        ("two red circles moving left behind a bar", "one object alone"),
        ("three red circles moving left and a blue square moving up", "1 to 3 objects, not 4"),
    ],
)
def test_other_sentences_are_refused_with_the_mend(text, hint):
    with pytest.raises(UsageError) as error:
        promise(text)
    assert hint in str(error.value)
