"""Fixtures of the media tests: a scene whose every frame can be told from the others."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from media_support import VIDEOS, numbered_frames

from opensora.media.write import write_video


@pytest.fixture(scope="session")
def videos() -> Path:
    """The folder of real test videos, where this checkout has one beside it."""
    if not (VIDEOS / "MANIFEST.csv").is_file():
        pytest.skip(f"no test videos at {VIDEOS}")
    return VIDEOS


@pytest.fixture(scope="session")
def frames() -> np.ndarray:
    """48 frames whose grey level tells their number: uint8 (48, 48, 64, 3)."""
    return numbered_frames(48)


@pytest.fixture(scope="session")
def mp4(tmp_path_factory, frames) -> Path:
    """The numbered frames at 24 fps, with a key frame every 12."""
    return write_video(
        tmp_path_factory.mktemp("mp4") / "numbered.mp4", frames, fps=24, crf=10, keyframe_every=12
    )
