"""Scenes are pure functions of their address, keep the rules, and tell the truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from opensora.arena.cast import reach
from opensora.arena.draw import render
from opensora.arena.measures import lower_third, radius_range, upper_third
from opensora.arena.place import GAP, MARGIN
from opensora.arena.scenes import HELD_OUT, SPLITS, SceneConfig, sample, varied
from opensora.arena.truth import record
from opensora.config import from_json, override, to_json, validate
from opensora.errors import UsageError

GOLDEN_CAPTION = "a blue square moving down"
GOLDEN_START = [[38.755842, 26.375311]]


def boxes(scene):
    """Lower and upper corners (F, N, 2) of the box around every object."""
    arms = np.stack(
        [
            [reach(thing.clause, radius) for radius in scene.radii[:, number]]
            for number, thing in enumerate(scene.objects)
        ],
        axis=1,
    )
    return scene.positions - arms[..., :2], scene.positions + arms[..., 2:]


def same(first, second):
    return first.caption == second.caption and np.array_equal(render(first), render(second))


def test_a_scene_depends_on_its_address_only(everything):
    scenes = [sample(everything, 9, index) for index in range(6)]
    assert all(same(scene, sample(everything, 9, scene.index)) for scene in reversed(scenes))
    assert not same(scenes[0], scenes[1])
    assert not same(scenes[0], sample(everything, 10, 0))
    assert not same(scenes[0], sample(everything, 9, 0, "heldout"))


def test_a_scene_is_the_same_in_every_process_and_version():
    scene = sample(SceneConfig(), 4, 17)
    assert scene.caption == GOLDEN_CAPTION, "raise dataset.SAMPLER when scenes change"
    np.testing.assert_allclose(scene.positions[0], GOLDEN_START, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        SceneConfig(),
        varied(),
        varied(height=96, width=160, frames=33, fps=16.0),
        varied(height=128, width=64, frames=9),
        SceneConfig(num_objects={3: 1}, shapes=("triangle",), held_out=()),
    ],
    ids=["default", "varied", "wide", "tall", "three triangles"],
)
def test_objects_stay_inside_and_never_overlap(config):
    for index in range(60):
        scene = sample(config, 2, index)
        low, high = boxes(scene)
        slack = MARGIN * scene.scale - 1e-6
        assert low.min() >= slack, scene.caption
        assert (high <= np.array([scene.width, scene.height]) - slack).all(), scene.caption
        if "colliding" in scene.caption:
            continue
        # A zooming camera shrinks the gaps together with everything else.
        gap = GAP * scene.scale * (scene.zoom.min() / scene.zoom.max()) - 1e-6
        for i in range(len(scene.objects)):
            for j in range(i):
                apart = np.maximum(low[:, i] - high[:, j], low[:, j] - high[:, i]).max(1)
                assert apart.min() >= gap, scene.caption


def test_straight_motion_goes_where_the_caption_says_at_the_speed_of_the_truth(plain):
    towards = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    for index in range(60):
        scene = sample(plain, 1, index)
        for number, thing in enumerate(scene.objects):
            moved = scene.positions[-1, number] - scene.positions[0, number]
            expected = thing.speed * 2.0 * np.array(towards[thing.clause.motion])
            np.testing.assert_allclose(moved, expected, atol=1e-9)
            assert 10 - 1e-9 <= np.abs(moved).max() <= 28 + 1e-9
            third = {
                "": plain.speed,
                "slowly": lower_third(plain.speed),
                "quickly": upper_third(plain.speed),
            }[thing.clause.speed]
            assert third[0] - 1e-9 <= thing.speed <= third[1] + 1e-9


def test_velocities_are_the_derivative_of_positions(varied_scenes):
    for scene in varied_scenes:
        change = np.diff(scene.positions, axis=0) * scene.fps
        mean = (scene.velocities[1:] + scene.velocities[:-1]) / 2
        calm = np.ones(scene.frames - 1, bool)
        for contact in scene.contacts:
            calm[int(np.floor(contact.time * scene.fps - 1e-9))] = False
            calm[min(int(np.floor(contact.time * scene.fps + 1e-9)), scene.frames - 2)] = False
        np.testing.assert_allclose(change[calm], mean[calm], atol=1e-6, err_msg=scene.caption)


def test_words_of_size_are_true():
    collisions = {"motions": {"collide": 1}, "num_objects": {2: 1}}
    configs = [varied(size_words=1.0), varied(size_words=1.0, cameras={"fixed": 1}, **collisions)]
    scenes = [sample(config, 1, index) for config in configs for index in range(60)]
    assert any("large" in scene.caption for scene in scenes)
    for scene in scenes:
        low_high = radius_range((9.0, 13.0), len(scene.objects))
        for number, thing in enumerate(scene.objects):
            radius = scene.radii[0, number]
            if thing.clause.size == "small":
                assert radius <= lower_third(low_high)[1] + 1e-9
            if thing.clause.size == "large":
                assert radius >= upper_third(low_high)[0] - 1e-9


def test_splits_share_no_look_and_each_colour_and_shape_is_trained():
    config = SceneConfig()
    seen = {
        split: {
            (t.colour, t.shape) for i in range(100) for t in sample(config, 0, i, split).objects
        }
        for split in SPLITS
    }
    assert seen["heldout"] == set(HELD_OUT)
    assert not seen["train"] & seen["heldout"]
    assert seen["train"] == seen["fast"]
    assert {c for c, _ in seen["train"]} == set(config.colours)
    assert {s for _, s in seen["train"]} == set(config.shapes)


def test_the_fast_split_is_faster_than_any_training_scene():
    config = SceneConfig(speed_words=1.0)
    for index in range(40):
        scene = sample(config, 0, index, "fast")
        low, high = config.fast_speed
        assert all(low <= thing.speed <= high for thing in scene.objects)
        assert "quickly" not in scene.caption
    assert config.fast_speed[0] > config.speed[1]


def test_a_group_moves_as_one():
    config = SceneConfig(num_objects={3: 1}, alike=1.0)
    for index in range(10):
        scene = sample(config, 0, index)
        assert scene.caption.startswith("three ")
        np.testing.assert_allclose(scene.velocities, scene.velocities[:, :1].repeat(3, 1))
        assert np.ptp(scene.radii) < 1e-9


def test_a_relation_is_true_and_clear(everything):
    config = everything.model_copy(update={"motions": {"beside": 1.0}, "num_objects": {2: 1.0}})
    axis = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
    seen = set()
    for index in range(40):
        scene = sample(config, 0, index)
        relation = scene.promise.relation
        if not relation:
            assert scene.promise.camera != "fixed"
            continue
        along, sign = axis[relation]
        apart = scene.positions[0, 0] - scene.positions[0, 1]
        assert sign * apart[along] > 1.5 * abs(apart[1 - along])
        seen.add(relation)
    assert seen == set(axis)


def test_discs_touch_at_the_contact_and_keep_momentum_and_energy():
    config = SceneConfig(num_objects={2: 1}, motions={"collide": 1})
    for index in range(20):
        scene = sample(config, 0, index)
        (contact,) = scene.contacts
        gap = np.linalg.norm(scene.positions[:, 0] - scene.positions[:, 1], axis=-1)
        gap -= scene.radii.sum(1)
        assert gap.min() >= -1e-9
        before = int(np.floor(contact.time * scene.fps))
        speed = scene.velocities[before]
        left = contact.time - before / scene.fps
        at = scene.positions[before] + speed * left
        assert np.linalg.norm(at[0] - at[1]) == pytest.approx(scene.radii[0].sum())
        mass = scene.radii[0] ** 2
        first, last = scene.velocities[0], scene.velocities[-1]
        np.testing.assert_allclose(mass @ first, mass @ last, atol=1e-9)
        assert mass @ (first**2).sum(1) == pytest.approx(mass @ (last**2).sum(1))


def test_a_camera_moves_all_objects_alike():
    config = varied(cameras={"pans left": 1, "zooms in": 1, "zooms out": 1}, num_objects={2: 1})
    for index in range(20):
        scene = sample(config, 0, index)
        if "pans" in scene.promise.camera:
            np.testing.assert_allclose(scene.velocities[:, 0], scene.velocities[:, 1])
            assert (scene.velocities[..., 0] > 0).all()  # the camera moves left, the world right
        else:
            growth = scene.radii[-1] / scene.radii[0]
            apart = np.linalg.norm(scene.positions[:, 0] - scene.positions[:, 1], axis=-1)
            assert growth[0] == pytest.approx(apart[-1] / apart[0])
            assert (growth[0] > 1.2) == (scene.promise.camera == "zooms in")


def test_the_record_says_what_the_scene_holds(varied_scenes):
    for scene in varied_scenes[:10]:
        told = record(scene)
        assert told["caption"] == scene.caption
        assert told["count"] == len(told["objects"]) == len(scene.objects)
        for number, thing in enumerate(told["objects"]):
            np.testing.assert_allclose(thing["position"], scene.positions[:, number], atol=5.1e-4)
            np.testing.assert_allclose(thing["visible"], scene.visible[:, number], atol=5.1e-5)
        assert len(told["contacts"]) == len(scene.contacts)
        assert all(0 <= contact["frame"] < scene.frames for contact in told["contacts"])


@given(
    side=st.sampled_from([32, 48, 64, 96, 130]),
    frames=st.integers(1, 24),
    count=st.integers(1, 3),
    index=st.integers(0, 10**9),
)
@settings(max_examples=25, deadline=None)
def test_any_size_and_length_can_be_made(side, frames, count, index):
    config = varied(height=side, width=130, frames=frames, fps=12.0, num_objects={count: 1})
    scene = sample(config, 0, index)
    low, high = boxes(scene)
    assert low.min() >= 0
    assert (high <= np.array([scene.width, scene.height])).all()
    assert len(scene.objects) == count
    assert render(scene).shape == (frames, side, 130, 3)


def test_the_config_survives_json_and_overrides(tmp_path, everything):
    (tmp_path / "config.json").write_text(to_json(everything), encoding="utf-8")
    assert from_json(SceneConfig, tmp_path / "config.json") == everything
    changed = validate(
        SceneConfig, override({}, ["num_objects.2=1", "motions.up=1"]), where="command line"
    )
    assert changed.num_objects == {2: 1.0}
    assert changed.motions == {"up": 1.0}


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"motions": {"left": 0}}, "motions needs at least one weight above 0"),
        ({"radius": (12, 9)}, r"radius is \(low, high\)"),
        ({"motions": {"behind": 1}}, "fits 2 objects"),
        ({"frames": 65}, "set speed to at most 4.7"),
        ({"shapes": ("circle",)}, "take one out of held_out"),
        ({"colours": ("red", "green"), "held_out": ()}, "3 objects need 3 colours"),
        (
            {
                "motions": {"collide": 1, "left": 1},
                "held_out": [
                    (c, "circle")
                    for c in ("red", "orange", "yellow", "green", "cyan", "blue", "pink")
                ],
            },
            "circles of two colours",
        ),
        ({"num_objects": {4: 1}}, "less than or equal to 3"),
        ({"height": 65}, "multiple of 2"),
        ({"colour": "red"}, "Extra inputs"),
    ],
)
def test_a_config_that_cannot_be_met_is_refused(fields, hint):
    with pytest.raises(ValidationError, match=hint):
        SceneConfig.model_validate(fields)


def test_a_split_that_is_empty_is_refused():
    with pytest.raises(UsageError, match="change held_out"):
        sample(SceneConfig(held_out=()), 0, 0, "heldout")
    with pytest.raises(UsageError, match="Did you mean 'heldout'"):
        sample(SceneConfig(), 0, 0, "held_out")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="fast_speed to at most"):
        sample(SceneConfig(fast_speed=(20.0, 30.0)), 0, 0, "fast")
