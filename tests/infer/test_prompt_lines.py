"""Open-Sora's prompt lines mean what they mean there; what makes no sense is told."""

import pytest

from opensora.errors import UsageError
from opensora.infer.conditions import Reference
from opensora.infer.prompt_lines import Line, parse, references, turns, with_scores


def test_a_plain_prompt_is_a_prompt_whatever_braces_it_has():
    for text in ("a dog", "a sign that says {hello}", '{"quoted"} words', "x { y", "{} or {}"):
        assert parse(text) == Line((text,))
    found = parse('a {red} dog{"reference_path": "a.png"}')
    assert found == Line(("a {red} dog",), (Reference("a.png", count=1),))


def test_trailing_json_gives_frames():
    line = parse('a beach{"reference_path": "a.png;b.mp4", "mask_strategy": "0;0,1,0,-1,1"}')
    assert line.prompts == ("a beach",)
    assert line.references == (
        Reference("a.png", count=1),
        Reference("b.mp4", at=-1, count=1),
    )
    assert parse('a beach{"reference_path": "a.png"}').references == (Reference("a.png", count=1),)


def test_a_strategy_has_six_numbers():
    (found,) = references("a;b", "2,1,-8,0,8,0.4")
    assert found == Reference("b", at=0, start=-8, count=8, level=0.4, window=2)


def test_options_serve_lines_that_say_nothing():
    options = {"reference_path": "a.png", "mask_strategy": "0,0,0,3"}
    assert parse("a dog", **options).references == (Reference("a.png", at=3, count=1),)
    own = parse('a dog{"mask_strategy": "0"}', **options)
    assert own.references == (Reference("a.png", count=1),)


def test_turns_fill_windows():
    assert turns("|0|by day|2|by night") == ("by day", "by day", "by night")
    assert turns("|0| one |1| two") == ("one", "two")
    assert turns("no turns") == ("no turns",)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('a{"reference_pth": "x"}', "Did you mean 'reference_path'"),
        ('a{"reference_path": 3}', "it is a string"),
        ('a{"reference_path": "x",}', "cannot be read"),
        ('a{"mask_strategy": "0"}', "has no reference_path"),
        ('a{"reference_path": "x", "mask_strategy": "0,1"}', "there are 1"),
        ('a{"reference_path": "x", "mask_strategy": "0,0,0,0,1,0,0"}', "up to six numbers"),
        ('a{"reference_path": "x", "mask_strategy": "0,zero"}', "up to six numbers"),
        ('a{"reference_path": "x", "mask_strategy": "0,inf"}', "up to six numbers"),
        ('a{"reference_path": "x", "mask_strategy": "0,nan"}', "up to six numbers"),
        ('a{"reference_path": "x", "mask_strategy": "0,0,0,0,0"}', "count at least 1"),
        ('a{"reference_path": "x", "mask_strategy": "0,0,0,0,1,1.5"}', r"level in \[0, 1\]"),
        ("|1|late", "from window 0 on"),
        ("|0|a|2|b|1|c", "rising"),
        ("| a |", "from window 0 on"),
    ],
)
def test_lines_that_make_no_sense_are_refused(line, told):
    with pytest.raises(UsageError, match=told):
        parse(line)


def test_scores_are_said_in_the_words_of_training_and_once():
    said = with_scores("a dog", aesthetic=6.5, motion=4, camera="pan left")
    assert said == "a dog aesthetic score: 6.5. motion score: 4.0. camera motion: pan left."
    assert with_scores(said, aesthetic=1.0, motion=2.0, camera="x") == said
