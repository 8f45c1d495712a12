"""The controls of docs/arena.md: each known failure leaves its signature in the scores."""

import re
from pathlib import Path

import numpy as np
import pytest

from opensora.arena.draw import render
from opensora.arena.scenes import SceneConfig, sample
from opensora.arena.score import aggregate, score

ASKED = ("count", "colour", "shape", "binding", "permanence", "direction", "success")
GOOD = ("ground truth", "H.264 at crf 30", "blur 1.2 + noise 12")
EMPTY = ("blur 3", "mean of all videos", "noise", "empty ground")


@pytest.fixture(scope="module")
def results(arena_controls, plain, tmp_path_factory):
    return arena_controls.controls(
        plain, num_scenes=20, seed=1, folder=tmp_path_factory.mktemp("coded")
    )


def means(results, name):
    return {metric: summary["mean"] for metric, summary in results[name].items()}


@pytest.mark.parametrize("name", GOOD)
def test_right_videos_score_high_through_harmless_damage(results, name):
    found = means(results, name)
    # One object in 20 scenes may be lost to a codec at crf 30; nothing may be lost of the truth.
    least = 1.0 if name == "ground truth" else 0.95
    assert all(found[metric] >= least for metric in ASKED), found
    assert found["speed_error"] < 0.02
    assert found["position_error"] < 0.3
    assert found["newton_residual"] < 0.3


@pytest.mark.parametrize("name", EMPTY)
def test_videos_without_objects_score_nothing(results, name):
    found = means(results, name)
    assert all(found[metric] == 0 for metric in ASKED), found
    assert found["speed_error"] == 1


@pytest.mark.parametrize("name", ["first frame repeated", "time reversed", "frames shuffled"])
def test_wrong_motion_costs_direction_and_nothing_else(results, name):
    found = means(results, name)
    assert found["direction"] == found["success"] == 0
    assert found["count"] == found["binding"] == 1
    assert found["speed_error"] > 0.8


def test_shuffled_frames_break_newtons_first_law(results):
    assert means(results, "frames shuffled")["newton_residual"] > 3
    assert means(results, "time reversed")["newton_residual"] < 0.1


def test_wrong_prompts_score_at_chance(results):
    found = means(results, "wrong prompts")
    # Chance is 1/8 for colour, 1/3 for shape, 1/4 for direction; three standard deviations over
    # the 20 videos, taken as independent.
    for metric, chance in (("colour", 1 / 8), ("shape", 1 / 3), ("direction", 1 / 4)):
        assert found[metric] <= chance + 3 * np.sqrt(chance * (1 - chance) / 20)
    assert found["binding"] < 0.25
    assert found["success"] < 0.05


def test_a_disc_of_every_colour_gains_nothing(results):
    found = means(results, "a disc of every colour")
    assert found["count"] == found["direction"] == found["success"] == 0
    assert found["colour"] <= 1 / 8 + 3 * np.sqrt(7 / 64 / 20)


def test_every_value_is_a_finite_number(results):
    for summary in results.values():
        for interval in summary.values():
            assert np.isfinite(list(interval.values())).all()
            assert interval["low"] <= interval["mean"] <= interval["high"]


def test_the_table_has_a_row_for_every_control(arena_controls, results):
    lines = arena_controls.table(results).splitlines()
    assert len(lines) == 2 + len(results)
    assert lines[2].startswith("| ground truth | 1.000 | 1.000 |")


def test_every_kind_of_motion_and_camera_is_recognised(varied_scenes, varied_readings):
    summary = aggregate(
        [
            score(reading, scene.promise, truth=scene)
            for scene, reading in zip(varied_scenes, varied_readings, strict=True)
        ]
    )
    kinds = ("direction", "motion", "camera", "relation", "reappearance", "speed", "size")
    for name in (*ASKED, *kinds):
        assert summary[name]["mean"] == 1, (name, summary[name])
    assert summary["gravity_error"]["mean"] < 0.02
    # The side of an object that a bar cuts is known to half a pixel.
    assert summary["reappearance_error"]["mean"] < 1.5


def test_collisions_keep_momentum_and_energy():
    config = SceneConfig(num_objects={2: 1}, motions={"collide": 1})
    scenes = [sample(config, 0, index) for index in range(8)]
    summary = aggregate([score(render(s), s.promise, truth=s) for s in scenes])
    assert summary["success"]["mean"] == summary["motion"]["mean"] == 1
    assert summary["momentum_error"]["n"] >= 6
    assert summary["momentum_error"]["mean"] < 0.02
    assert summary["energy_error"]["mean"] < 0.05


def test_the_command_prints_both_tables(arena_controls, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["arena_controls.py", "--scenes", "2"])
    arena_controls.main()
    printed = capsys.readouterr().out
    assert "straight motion: 2 scenes" in printed
    assert printed.count("| ground truth | 1.000 |") == 2


def test_the_example_in_the_documentation_runs(monkeypatch, tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "arena.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("count=2000", "count=1"), {})
    assert (tmp_path / "scenes" / "manifest.csv").exists()
