"""The judge sees what is there, follows it, and does not see what is not."""

import ast
import itertools
from pathlib import Path

import numpy as np
import pytest

import opensora.arena
from opensora.arena.draw import coverage, render
from opensora.arena.judge import assign, read
from opensora.arena.palette import COLOURS, GROUND
from opensora.arena.scenes import SceneConfig, sample
from opensora.errors import DataError

ROOM = Path(opensora.arena.__file__).parent


def paint(*things, frames=17, size=64):
    """A video of (colour, shape, path, radius, frames in which it is there)."""
    video = np.empty((frames, size, size, 3))
    video[:] = GROUND
    for colour, shape, path, radius, there in things:
        centres = np.broadcast_to(np.asarray(path, float), (frames, 2))
        covered = coverage(shape, centres, np.full(frames, radius), video.shape[:3])[..., None]
        covered = covered * np.isin(np.arange(frames), list(there))[:, None, None, None]
        rgb = COLOURS[colour] if isinstance(colour, str) else colour
        video += covered * (np.asarray(rgb) - video)
    return np.rint(video).astype(np.uint8)


def moving(start, step, frames=17):
    return np.asarray(start) + np.arange(frames)[:, None] * np.asarray(step)


ALWAYS = range(17)


def imports_of(name):
    tree = ast.parse((ROOM / f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "opensora.arena":
                yield from (alias.name for alias in node.names)
            elif node.module.startswith("opensora.arena."):
                yield node.module.rsplit(".", 1)[1]


def test_the_judge_shares_no_drawing_code():
    reached, todo = set(), ["score"]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += imports_of(name)
    assert {"judge", "segment", "silhouette", "palette", "grammar"} <= reached
    assert not reached & {"draw", "scenes", "stage", "lanes", "cast", "place", "dataset"}


def test_everything_in_a_scene_is_read_exactly(varied_scenes, varied_readings):
    for scene, reading in zip(varied_scenes, varied_readings, strict=True):
        assert not reading.strangers.any(), scene.caption
        assert len(reading.tracks) == len(scene.objects), scene.caption
        left = list(range(len(scene.objects)))
        for track in reading.tracks:
            error = [
                np.abs(track.positions - scene.positions[:, n])[track.whole].max() for n in left
            ]
            number = left.pop(int(np.argmin(error)))
            thing = scene.objects[number]
            assert (track.colour, track.shape) == (thing.colour, thing.shape), scene.caption
            # A tenth of a pixel: what anti-aliasing with 8 bits and a dead zone of 10 % leave.
            assert min(error) < 0.12, scene.caption
            if scene.promise.camera == "fixed":
                assert track.radius == pytest.approx(scene.radii[0, number], rel=0.01)


@pytest.mark.parametrize("size", [48, 128])
def test_other_sizes_are_read_as_well(size):
    config = SceneConfig(height=size, width=size + 16)
    for index in range(6):
        scene = sample(config, 0, index)
        reading = read(render(scene))
        assert (reading.counts == len(scene.objects)).all()
        found = sorted((t.colour, t.shape) for t in reading.tracks)
        assert found == sorted((t.colour, t.shape) for t in scene.objects)


def test_a_half_transparent_object_is_a_stranger():
    rgb = (np.array(COLOURS["red"]) + np.array(GROUND)) / 2
    reading = read(paint((rgb * 1.02, "circle", (32, 32), 10, ALWAYS)))
    assert not reading.counts.any()
    assert (reading.strangers == 1).all()


def test_a_colour_off_the_palette_is_a_stranger():
    reading = read(paint(((90, 60, 30), "square", (32, 32), 10, ALWAYS)))
    assert not reading.counts.any()
    assert (reading.strangers == 1).all()


def test_a_speck_is_nothing():
    reading = read(paint(("red", "circle", (32, 32), 3, ALWAYS)))
    assert not reading.counts.any()
    assert not reading.strangers.any()


def test_a_smear_is_a_stranger(arena_controls):
    video = paint(("blue", "circle", (32, 32), 11, ALWAYS))
    assert (read(arena_controls.blurred(video, 1.2).astype(np.uint8)).counts == 1).all()
    smeared = read(arena_controls.blurred(video, 3.0).astype(np.uint8))
    assert not smeared.counts.any()
    assert (smeared.strangers == 1).all()


def test_a_ghost_beside_the_object_is_a_stranger():
    pale = np.array(GROUND) + 0.35 * (np.array(COLOURS["green"]) - np.array(GROUND))
    reading = read(
        paint(
            ("green", "circle", (16, 32), 9, ALWAYS),
            (pale, "circle", (46, 32), 9, ALWAYS),
        )
    )
    assert (reading.counts == 1).all()
    assert (reading.strangers == 1).all()


def test_a_missing_frame_does_not_break_a_track():
    there = [frame for frame in ALWAYS if frame not in (5, 6)]
    reading = read(paint(("red", "square", moving((15, 32), (2, 0)), 9, there)))
    (track,) = reading.tracks
    assert track.seen.tolist() == [frame in there for frame in ALWAYS]
    assert np.isnan(track.positions[5]).all()
    assert track.presence == pytest.approx(15 / 17)


def test_objects_that_pass_each_other_keep_their_tracks():
    reading = read(
        paint(
            ("red", "circle", moving((12, 20), (2.5, 0)), 8, ALWAYS),
            ("blue", "circle", moving((52, 44), (-2.5, 0)), 8, ALWAYS),
        )
    )
    colours = {track.colour: track for track in reading.tracks}
    assert set(colours) == {"red", "blue"}
    assert (np.diff(colours["red"].positions[:, 0]) > 2).all()
    assert (np.diff(colours["blue"].positions[:, 0]) < -2).all()


def test_twins_that_cross_over_keep_their_tracks():
    reading = read(
        paint(
            ("red", "circle", moving((12, 18), (2.5, 0)), 8, ALWAYS),
            ("red", "circle", moving((52, 44), (-2.5, 0)), 8, ALWAYS),
        )
    )
    assert len(reading.tracks) == 2
    for track in reading.tracks:
        assert np.ptp(track.positions[:, 1]) < 0.5


def test_a_change_of_colour_is_seen_in_one_track():
    reading = read(
        paint(
            ("red", "circle", (32, 32), 10, range(10)),
            ("blue", "circle", (32, 32), 10, range(10, 17)),
        )
    )
    (track,) = reading.tracks
    assert track.colour == "red"
    assert len(set(track.colours)) == 2


@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
def test_a_shape_between_two_shapes_is_unclear(shape):
    # The mean outline of a circle and a square: neither template wins by the margin.
    y, x = np.mgrid[:64, :64] + 0.5 - 32
    radius = 10.0
    exponent = 3.6
    inside = (np.abs(x) ** exponent + np.abs(y) ** exponent) <= radius**exponent
    video = np.empty((5, 64, 64, 3))
    video[:] = GROUND
    video[:, inside] = COLOURS["purple"]
    (track,) = read(video.astype(np.uint8)).tracks
    assert track.shape == "unclear"
    clear = read(paint(("purple", shape, (32, 34), 10, ALWAYS)))
    assert clear.tracks[0].shape == shape


def test_empty_noisy_and_full_pictures_hold_no_objects():
    chance = np.random.default_rng(0)
    empty = np.broadcast_to(np.array(GROUND, np.uint8), (4, 64, 64, 3)).copy()
    assert read(empty).tracks == ()
    assert not read(empty).strangers.any()
    assert not read(chance.integers(0, 256, (4, 64, 64, 3), np.uint8)).counts.any()
    full = np.broadcast_to(np.array(COLOURS["red"], np.uint8), (4, 64, 64, 3)).copy()
    assert read(full).tracks[0].shape != "circle"


def test_assignment_is_the_cheapest_of_all():
    chance = np.random.default_rng(1)
    for rows, columns in ((3, 3), (2, 4), (5, 3), (6, 6)):
        cost = chance.random((rows, columns))
        pairs = assign(cost, limit=9.0)
        assert len(pairs) == min(rows, columns)
        total = sum(cost[r, c] for r, c in pairs)
        short, long = sorted((rows, columns))
        table = cost if rows <= columns else cost.T
        least = min(
            sum(table[i, order[i]] for i in range(short))
            for order in itertools.permutations(range(long), short)
        )
        assert total == pytest.approx(least)


def test_assignment_leaves_what_is_too_far():
    assert assign(np.array([[1.0, 50.0], [50.0, 40.0]]), limit=10.0) == [(0, 0)]
    assert assign(np.zeros((0, 3)), limit=1.0) == []


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((4, 64, 64, 3), np.float32),
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((4, 3, 64, 64), np.uint8),
        np.zeros((0, 64, 64, 3), np.uint8),
        np.zeros((4, 8, 64, 3), np.uint8),
    ],
)
def test_frames_of_another_kind_are_refused(frames):
    with pytest.raises(DataError, match="judge"):
        read(frames)
