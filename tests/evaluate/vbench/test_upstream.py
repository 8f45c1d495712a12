"""Dimensions that an installed upstream package measures, with a stand-in for the package."""

import json
import sys

import pytest

from opensora.errors import DataError
from opensora.evaluate.suite import Subject
from opensora.evaluate.vbench.aggregate import QUALITY
from opensora.evaluate.vbench.config import UpstreamConfig
from opensora.evaluate.vbench.suite import I2V_SUITE, SUITE
from opensora.evaluate.vbench.upstream import Upstream

from .conftest import slide

UTILS = """
def init_submodules(dimensions, **options):
    assert len(dimensions) == 1
    return {dimensions[0]: ['weights of ' + dimensions[0]]}
"""

COMPUTE = """
import json, os, sys

class Number:  # as numpy has them
    def item(self):
        return 40.0

def compute_{name}(info, device, weights, **options):
    assert weights == ['weights of {name}'], weights
    with open(os.path.join({folder!r}, 'calls'), 'a') as file:
        print('{name}', file=file)
    entries = [e for e in json.load(open(info)) if '{name}' in e['dimension']]
    videos = [path for entry in entries for path in entry['video_list']]
    rows = [{{'video_path': path, 'video_results': Number()}} for path in videos]
    return {overall}, rows
"""

BROKEN = """
raise ImportError('detectron2 is not there')
"""


def package(folder, name, dimensions, broken=()):
    """A stand-in for a package, and for torch, whose import would take seconds."""
    root = folder / name
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "utils.py").write_text(UTILS)
    for dimension, overall in dimensions.items():
        text = COMPUTE.format(name=dimension, folder=str(folder), overall=overall)
        (root / f"{dimension}.py").write_text(text)
    for dimension in broken:
        (root / f"{dimension}.py").write_text(BROKEN)
    (folder / "torch.py").write_text("device = str\n")
    return {"folder": str(folder), "python": sys.executable}


@pytest.fixture
def videos(tmp_path, fill):
    return fill(tmp_path / "v", {f"v{i}.mp4": slide(3, 32, 48, 4, seed=i) for i in range(2)})


def judge(videos, output, suite=SUITE, **settings):
    config = suite.config.model_validate(settings)
    return suite.run(Subject(videos=videos), config, output, lambda *stage: None)


def calls(folder):
    path = folder / "calls"
    return path.read_text().split() if path.exists() else []


def test_what_is_not_measured_here_is_asked_of_upstream(tmp_path, videos):
    up = package(tmp_path / "up", "vbench", {n: 0.4 for n in QUALITY if n != "temporal_flickering"})
    scores = judge(videos, tmp_path / "out", mode="custom", upstream=up)
    assert set(scores["vbench"]) == set(QUALITY)
    assert scores["settings"]["skipped"] == {}
    assert "temporal_flickering" not in calls(tmp_path / "up")
    # All seven are there: Quality is given, and neither Semantic nor Total is.
    assert set(scores["totals"]) == {"quality"}
    assert scores["totals"]["quality"]["n"] == 7
    imaging = scores["vbench"]["imaging_quality"]
    assert imaging == {"mean": 0.4, "low": 0.4, "high": 0.4, "n": 2}
    results = json.loads((tmp_path / "out/vbench_eval_results.json").read_text())
    assert results["imaging_quality"][0] == 0.4
    assert [row["video_results"] for row in results["imaging_quality"][1]] == [40.0, 40.0]


def test_the_same_call_asks_upstream_nothing_again_until_a_video_changes(tmp_path, videos, fill):
    up = package(tmp_path / "up", "vbench", {"imaging_quality": 0.4})
    settings = {"mode": "custom", "dimensions": ["imaging_quality"], "upstream": up}
    first = judge(videos, tmp_path / "out", **settings)
    assert judge(videos, tmp_path / "out", **settings) == first
    assert calls(tmp_path / "up") == ["imaging_quality"]
    fill(videos, {"v0.mp4": slide(4, 32, 48, 4)})
    judge(videos, tmp_path / "out", **settings)
    assert calls(tmp_path / "up") == ["imaging_quality"] * 2


def test_one_that_fails_there_is_skipped_with_its_last_words(tmp_path, videos):
    up = package(tmp_path / "up", "vbench", {"imaging_quality": 0.4}, ["motion_smoothness"])
    settings = {"dimensions": ["imaging_quality", "motion_smoothness"], "upstream": up}
    scores = judge(videos, tmp_path / "out", mode="custom", **settings)
    assert set(scores["vbench"]) == {"imaging_quality"}
    reason = scores["settings"]["skipped"]["motion_smoothness"]
    assert "detectron2 is not there" in reason
    assert "motion_smoothness.log" in reason


def test_no_score_is_no_result(tmp_path, videos):
    up = package(tmp_path / "up", "vbench", {"imaging_quality": "float('nan')"})
    scores = judge(
        videos, tmp_path / "out", mode="custom", dimensions=["imaging_quality"], upstream=up
    )
    assert "found no score (nan)" in scores["settings"]["skipped"]["imaging_quality"]


def test_i2v_takes_its_own_three_from_the_i2v_package(tmp_path, fill):
    folder = fill(
        tmp_path / "v", {"a close up of a blue and orange liquid-0.mp4": slide(3, 32, 48, 4)}
    )
    up = package(tmp_path / "up", "vbench2_beta_i2v", {"i2v_background": 0.7})
    package_v1 = tmp_path / "up" / "vbench"
    package_v1.mkdir()
    (package_v1 / "__init__.py").write_text("")
    text = COMPUTE.format(name="imaging_quality", folder=str(tmp_path / "up"), overall=0.4)
    (package_v1 / "imaging_quality.py").write_text(text)
    wanted = ["imaging_quality", "i2v_background"]
    scores = judge(folder, tmp_path / "out", I2V_SUITE, dimensions=wanted, upstream=up)
    assert {n: v["mean"] for n, v in scores["vbench"].items()} == {
        "imaging_quality": 0.4,
        "i2v_background": 0.7,
    }


def test_an_interpreter_that_is_not_there_is_a_reason(tmp_path, videos):
    up = UpstreamConfig(python=str(tmp_path / "python"))
    assert "cannot be started" in str(Upstream(up, "v1").lacking)
    none = Upstream(UpstreamConfig(), "i2v").lacking
    assert none is not None
    assert "no package vbench2_beta_i2v" in none


def test_a_failure_without_words_tells_the_exit_code(tmp_path, videos):
    up = package(tmp_path / "up", "vbench", {})
    (tmp_path / "up/vbench/utils.py").write_text("import os\nos._exit(9)\n")
    info = tmp_path / "info.json"
    info.write_text("[]")
    upstream = Upstream(UpstreamConfig(**up), "v1")
    with pytest.raises(DataError, match="exit code 9"):
        upstream.run("color", info, [], tmp_path / "u", "cpu")
