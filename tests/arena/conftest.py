"""Scenes and videos that several tests read."""

import importlib.util
from pathlib import Path

import pytest

from opensora.arena.draw import render
from opensora.arena.judge import read
from opensora.arena.scenes import SceneConfig, sample, varied


@pytest.fixture(scope="session")
def plain():
    """One or two objects in straight motion, half of the captions saying how fast."""
    return SceneConfig(num_objects={1: 0.5, 2: 0.5}, speed_words=0.5)


@pytest.fixture(scope="session")
def everything():
    """All motions, cameras, numbers of objects and words."""
    return varied(ground="dots")


@pytest.fixture(scope="session")
def varied_scenes(everything):
    return [sample(everything, 5, index) for index in range(80)]


@pytest.fixture(scope="session")
def varied_videos(varied_scenes):
    return [render(scene) for scene in varied_scenes]


@pytest.fixture(scope="session")
def varied_readings(varied_videos):
    return [read(video) for video in varied_videos]


@pytest.fixture(scope="session")
def arena_controls():
    """The module eval/arena/controls.py."""
    path = Path(__file__).parents[2] / "eval" / "arena" / "controls.py"
    spec = importlib.util.spec_from_file_location("arena_controls", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
