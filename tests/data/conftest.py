"""Small videos and manifests for the data room's tests."""

from pathlib import Path

import numpy as np
import pytest

from opensora.data.manifest import Manifest, from_columns
from opensora.data.packed import PackedStrings
from opensora.media.write import write_video


def make_manifest(folder: Path, num_rows: int, **columns) -> Manifest:
    """Rows of 24 frames, 64 x 64 at 8 fps, unless a column says otherwise."""
    numbers = {"num_frames": 24, "height": 64, "width": 64, "fps": 8.0, **columns}
    table = {
        "path": PackedStrings.pack(f"{row:04d}.mp4" for row in range(num_rows)),
        "text": PackedStrings.pack(f"clip {row}" for row in range(num_rows)),
        **{name: np.broadcast_to(value, num_rows) for name, value in numbers.items()},
    }
    return from_columns(table, folder=folder, where="the test's table")


def write_clip(path: Path, *, colour=(200, 40, 40), num_frames=24, size=(64, 64), fps=8) -> Path:
    """A video whose frame k is the colour, with a bar of k x 2 white columns from the left."""
    frames = np.empty((num_frames, *size, 3), np.uint8)
    frames[:] = colour
    for k in range(num_frames):
        frames[k, :, : 2 * k] = 255
    return write_video(path, frames, fps=fps)


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
