"""A video scores what it deserves: the controls, and the ways to cheat that occurred to us."""

import numpy as np
import pytest

from opensora.arena.draw import coverage, render
from opensora.arena.palette import COLOURS, GROUND
from opensora.arena.scenes import SceneConfig, sample, varied
from opensora.arena.score import aggregate, match, score
from opensora.errors import DataError, UsageError

PROMPT = "a red circle moving right"
F = 17


def paint(*things, frames=F):
    video = np.empty((frames, 64, 64, 3))
    video[:] = GROUND
    for colour, shape, start, step in things:
        centres = np.asarray(start, float) + np.arange(frames)[:, None] * np.asarray(step, float)
        covered = coverage(shape, centres, np.full(frames, 9.5), (frames, 64, 64))[..., None]
        video += covered * (np.asarray(COLOURS[colour], float) - video)
    return np.rint(video).astype(np.uint8)


RIGHT = ("red", "circle", (14, 32), (1.5, 0))


def test_a_kept_promise_scores_one_in_all_it_asks():
    scores = score(paint(RIGHT), PROMPT)
    for name in ("count", "colour", "shape", "binding", "permanence", "direction", "success"):
        assert scores[name] == 1, name
    assert scores["colour_stability"] == scores["shape_stability"] == 1
    assert scores["area_variation"] < 0.01
    assert scores["newton_residual"] < 0.1
    unasked = {"motion", "relation", "camera", "speed", "size", "reappearance", "position_error"}
    assert not unasked & set(scores)


@pytest.mark.parametrize(
    ("prompt", "wrong"),
    [
        ("a red circle moving left", {"direction"}),
        ("a red circle standing still", {"direction"}),
        ("a red square moving right", {"shape", "binding"}),
        ("a blue circle moving right", {"colour", "binding", "permanence"}),
        ("two red circles moving right", {"count"}),
    ],
)
def test_a_broken_promise_fails_where_it_is_broken(prompt, wrong):
    scores = score(paint(RIGHT), prompt)
    asked = ("count", "colour", "shape", "binding", "permanence", "direction")
    failed = {name for name in asked if scores[name] < 1}
    assert wrong <= failed
    assert scores["success"] == 0
    if "two" not in prompt:
        assert failed == wrong
        assert all(scores[name] == 0 for name in wrong)


def test_half_a_promise_counts_half():
    text = "a red circle moving right and a blue square moving up"
    scores = score(paint(RIGHT), text)
    assert scores["count"] == 0
    for name in ("colour", "shape", "binding", "direction", "permanence"):
        assert scores[name] == 0.5


def test_painting_more_gains_nothing():
    # All colours at once, each of them moving in another direction.
    places = [(12 + 20 * (n % 3), 12 + 20 * (n // 3)) for n in range(8)]
    many = paint(*[(c, "circle", p, (0, 0)) for c, p in zip(COLOURS, places, strict=True)])
    totals = dict.fromkeys(("count", "colour", "binding", "direction", "success"), 0.0)
    for colour in COLOURS:
        scores = score(many, f"{'an' if colour == 'orange' else 'a'} {colour} circle moving up")
        for name in totals:
            totals[name] += scores[name]
    assert totals == {"count": 0, "colour": 1, "binding": 1, "direction": 0, "success": 0}


def test_a_second_object_spoils_the_count_but_not_the_rest():
    scores = score(paint(RIGHT, ("blue", "square", (30, 52), (0, 0))), PROMPT)
    # The intruder is the more prominent one, or the promised: never both.
    assert scores["count"] == scores["success"] == 0


def test_a_ghost_spoils_the_count():
    video = paint(RIGHT).astype(float)
    pale = paint(("blue", "square", (30, 52), (0, 0))).astype(float)
    mixed = np.rint(video - 0.35 * (np.array(GROUND) - pale)).clip(0, 255).astype(np.uint8)
    scores = score(mixed, PROMPT)
    assert scores["count"] == 0
    assert scores["binding"] == scores["direction"] == 1


def test_a_flash_is_no_object():
    video = paint(RIGHT)
    video[7:] = GROUND
    scores = score(video, PROMPT)
    assert scores["colour"] == scores["shape"] == scores["direction"] == scores["count"] == 0


def test_changing_colours_costs_stability_and_permanence():
    video = np.concatenate([paint(RIGHT)[:12], paint(("blue", *RIGHT[1:]))[12:]])
    scores = score(video, PROMPT)
    assert scores["colour"] == 1
    assert scores["colour_stability"] == scores["permanence"] == pytest.approx(12 / 17)


def test_changing_size_costs_area_variation():
    grown = np.concatenate([paint(RIGHT)[:1].repeat(9, 0), np.zeros((8, 64, 64, 3), np.uint8)])
    radii = np.where(np.arange(F) < 9, 8.0, 12.0)
    covered = coverage("circle", np.full((F, 2), 32.0), radii, (F, 64, 64))[..., None]
    grown = GROUND + covered * (np.array(COLOURS["red"]) - np.array(GROUND))
    scores = score(np.rint(grown).astype(np.uint8), "a red circle standing still")
    areas = np.pi * radii**2
    assert scores["area_variation"] == pytest.approx(areas.std() / areas.mean(), abs=0.01)


def test_words_of_speed_and_size_are_checked():
    slow = paint(("red", "circle", (20, 32), (0.75, 0)))  # 6 px/s
    quick = paint(("red", "circle", (14, 32), (1.6, 0)))  # 12.8 px/s
    still = paint(("red", "circle", (14, 32), (0, 0)))
    assert score(slow, f"{PROMPT} slowly")["speed"] == 1
    assert score(quick, f"{PROMPT} slowly")["speed"] == 0
    assert score(quick, f"{PROMPT} quickly")["speed"] == 1
    assert score(still, f"{PROMPT} slowly")["speed"] == 0
    assert score(quick, f"{PROMPT} slowly", fps=4.0)["speed"] == 1  # 6.4 px/s
    assert score(slow, "a small red circle moving right")["size"] == 1
    assert score(slow, "a large red circle moving right")["size"] == 0
    assert score(slow, "a large red circle moving right", radius=(5.0, 9.0))["size"] == 1


def test_a_relation_is_judged_with_its_sign():
    video = paint(("red", "circle", (16, 32), (0, 0)), ("blue", "square", (48, 32), (0, 0)))
    assert score(video, "a red circle left of a blue square")["relation"] == 1
    assert score(video, "a red circle right of a blue square")["relation"] == 0
    assert score(video, "a red circle above a blue square")["relation"] == 0
    assert score(video, "a blue square right of a red circle")["relation"] == 1
    assert score(video, "a green circle left of a blue square")["relation"] == 0


def test_objects_of_a_promise_are_matched_by_colour_before_shape():
    from opensora.arena.grammar import promise
    from opensora.arena.judge import read

    video = paint(("red", "square", (16, 32), (0, 0)), ("blue", "circle", (48, 32), (0, 0)))
    promised = promise("a red circle standing still and a blue square standing still").objects
    matched = match(read(video), promised)
    assert [track.colour for track in matched if track] == ["red", "blue"]


def test_a_bar_belongs_only_where_it_is_promised():
    config = varied(motions={"behind": 1}, num_objects={1: 1}, cameras={"fixed": 1}, size_words=0)
    scene = sample(config, 0, 3)
    video = render(scene)
    assert score(video, scene.promise)["success"] == 1
    text = scene.caption.replace(" behind a bar", "")
    assert score(video, text)["count"] == 0
    assert score(paint(RIGHT), f"{PROMPT} behind a bar")["reappearance"] == 0


def test_one_frame_is_judged_without_motion():
    scores = score(paint(RIGHT)[:1], PROMPT)
    assert scores["count"] == scores["binding"] == 1
    assert "direction" not in scores


def test_the_truth_measures_the_error():
    scene = sample(SceneConfig(num_objects={1: 1}), 0, 0)
    video = render(scene)
    right = score(video, scene.promise, truth=scene)
    assert right["position_error"] < 0.1
    assert right["speed_error"] < 0.01
    moved = np.roll(video, 2, axis=2)
    assert score(moved, scene.promise, truth=scene)["position_error"] == pytest.approx(2, abs=0.1)
    back = score(video[::-1], scene.promise, truth=scene)
    assert back["speed_error"] == 1
    assert score(np.full_like(video, GROUND), scene.promise, truth=scene)["speed_error"] == 1
    with pytest.raises(DataError, match="17 frames, the video 16"):
        score(video[:16], scene.promise, truth=scene)


def test_a_prompt_outside_the_grammar_is_refused():
    with pytest.raises(UsageError, match="cannot read"):
        score(paint(RIGHT), "a cat on a skateboard")


def test_an_interval_holds_the_mean_and_shrinks_with_more_videos():
    chance = np.random.default_rng(0)
    values = (chance.random(400) < 0.7).astype(float)
    few = aggregate([{"colour": v} for v in values[:40]])["colour"]
    many = aggregate([{"colour": v} for v in values])["colour"]
    assert few["low"] <= few["mean"] <= few["high"]
    assert few["n"] == 40
    # The normal approximation of a share's interval: 1.96 sqrt(p (1 - p) / n) on each side.
    half = 1.96 * np.sqrt(many["mean"] * (1 - many["mean"]) / 400)
    assert many["high"] - many["low"] == pytest.approx(2 * half, rel=0.15)
    assert aggregate([{"colour": v} for v in values]) == aggregate([{"colour": v} for v in values])


def test_a_metric_is_averaged_over_the_videos_that_have_it():
    summary = aggregate([{"colour": 1.0, "speed": 0.0}, {"colour": 0.0}])
    assert summary["colour"]["mean"] == 0.5
    assert summary["speed"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 1}
    assert aggregate([]) == {}
