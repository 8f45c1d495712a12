"""The videos of a suite: drawn by all ranks, decoded, counted, and drawn again where one is broken.

A score is of the videos that lie in the folder, so each of them is decoded before any is judged.
What a seed and a batch draw is the same on any number of ranks (`infer.samples`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opensora.errors import DataError
from opensora.infer import samples
from opensora.infer.jobs import Job
from opensora.infer.pipeline import Shape, VideoPipeline
from opensora.media.read import read_clip
from opensora.media.write import write_video
from opensora.runtime import Runtime


def draw(
    pipeline: VideoPipeline,
    work: Sequence[Job],
    folder: Path,
    *,
    place: Runtime,
    **options: Any,
) -> list[dict[str, Any]]:
    """Draw what is missing, decode everything, and draw again what does not decode.

    Args:
        options: the others of `infer.samples.draw`.

    Returns:
        One record a job, in the order of `work`, on every rank.

    Raises:
        DataError: a video does not decode to what was drawn, twice.
        UsageError: the folder holds samples of other weights or settings.
    """
    for attempt in (1, 2):
        records = samples.draw(pipeline, work, folder, place=place, **options)
        mine = records[place.rank :: place.world_size]
        found = place.gather_objects([(r["file"], _damage(folder, r)) for r in mine])
        broken = [(file, reason) for part in found for file, reason in part if reason]
        if not broken:
            return records
        if attempt == 1 and place.is_main:
            for file, _ in broken:
                (folder / file).unlink(missing_ok=True)
        place.barrier()
    file, reason = broken[0]
    raise DataError(
        f"{len(broken)} of {len(records)} drawn videos do not decode; '{file}': {reason}. Check "
        f"the disk of {folder}"
    )


def through_a_file(frames: np.ndarray, fps: float) -> np.ndarray:
    """Rendered frames as the files of drawn videos hold them: mp4, with half the resolution of
    colour. Compared as they were rendered, they would be far from a model that draws them exactly.

    Args:
        frames: uint8 (F, H, W, 3).

    Returns:
        The same shape and dtype.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(Path(folder) / "clip.mp4", frames, fps=fps)
        return read_clip(path).frames[:, : frames.shape[1], : frames.shape[2]]


def _damage(folder: Path, record: dict[str, Any]) -> str:
    """Why a file does not decode to the shape of its record; empty where it does."""
    shape = Shape(**record["shape"])
    # 4:2:0 needs even sides: the writer adds a row or a column to odd ones.
    whole = (shape.num_frames, shape.height + shape.height % 2, shape.width + shape.width % 2)
    try:
        found = read_clip(folder / record["file"]).frames.shape[:3]
    except DataError as error:
        return str(error)
    return "" if found == whole else f"it decodes to {'x'.join(map(str, found))}"
