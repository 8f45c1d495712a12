"""Small videos, and the helpers in data_support.py made importable in every import mode."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from data_support import write_clip


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """A folder of six readable videos 0000.mp4 ... 0005.mp4, each of its own red."""
    folder = tmp_path_factory.mktemp("videos")
    for row in range(6):
        write_clip(folder / f"{row:04d}.mp4", colour=(40 * row, 40, 40))
    return folder


@pytest.fixture(scope="session")
def footage() -> Path:
    """Real and hostile footage kept beside the repository."""
    folder = Path(__file__).parents[3] / "shared" / "data" / "videos"
    if not folder.is_dir():
        pytest.skip(f"no footage at {folder}")
    return folder
