"""Prompt files, painters and folders of videos that the tests of this room share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from opensora.infer.pipeline import Sample, Shape
from opensora.media.write import write_video
from tests.infer.conftest import WHOLE


class Painter:
    """Stands in for a pipeline; `paint(prompt, seed)` gives uint8 (F, H, W, 3)."""

    team = None
    savings, weaker = WHOLE, None

    def __init__(self, paint, *, fingerprint="painter", stop_after=None, size=(5, 32, 48)):
        self.paint, self.fingerprint, self.stop_after = paint, fingerprint, stop_after
        self.shape = Shape(*size, 8.0)
        self.device = torch.device("cpu")
        self.drawn: list[tuple[str, int]] = []
        self.given: list = []

    def latent_shape(self, shape):
        return (8, 5, 8, 8)

    def __call__(self, prompts, *, seeds, shape, sampling, negative_prompt, given=None):
        self.given += given or []
        if self.stop_after is not None and len(self.drawn) >= self.stop_after:
            raise KeyboardInterrupt
        self.drawn += list(zip(prompts, seeds, strict=True))
        pairs = zip(prompts, seeds, strict=True)
        return [Sample(p, s, self.paint(p, s), shape.fps) for p, s in pairs]


def slide(frames: int, height: int, width: int, step: int, seed: int = 0) -> np.ndarray:
    """A textured picture that moves `step` pixels to the right a frame (0 is a still)."""
    chance = np.random.default_rng(seed)
    coarse = chance.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    picture = np.kron(coarse, np.ones((8, 8, 1), np.uint8))[:height, :width]
    return np.stack([np.roll(picture, step * i, axis=1) for i in range(frames)])


def moving(prompt: str, seed: int) -> np.ndarray:
    return slide(5, 32, 48, 4, seed=seed % 2**32)


def still(prompt: str, seed: int) -> np.ndarray:
    return slide(5, 32, 48, 0, seed=seed % 2**32)


ENTRIES = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {
        "prompt_en": "a person swimming in ocean",
        "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness"],
    },
    {
        "prompt_en": "a red bicycle",
        "dimension": ["color", "imaging_quality"],
        "auxiliary_info": {"color": {"color": "red"}},
    },
    {
        "prompt_en": "The bund Shanghai, oil painting",
        "dimension": ["appearance_style"],
        "auxiliary_info": {"appearance_style": {"appearance_style": "oil painting"}},
    },
    {
        "prompt_en": "The bund Shanghai, oil painting",
        "dimension": ["background_consistency", "aesthetic_quality"],
    },
]
"""A prompt file in small: one for flickering, one that stands twice, one for upstream only."""


@pytest.fixture
def prompts_file(tmp_path) -> Path:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(ENTRIES))
    return path


@pytest.fixture
def fill():
    """Write videos under their names into a folder: fill(folder, {name: frames})."""

    def write(folder: Path, videos: dict[str, np.ndarray], fps: float = 8.0) -> Path:
        for name, frames in videos.items():
            write_video(folder / name, frames, fps=fps)
        return folder

    return write
