"""Real clips that something is compared with: of a manifest, of a folder, or rendered scenes.

All of them are named, cut to one shape, and the same in every run; which files are too short is
counted, never hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from opensora.arena.draw import render
from opensora.arena.scenes import SceneConfig, sample
from opensora.config import Config
from opensora.data import manifest as manifests
from opensora.data.folder import ProbeOptions, probe_folder
from opensora.data.manifest import Manifest
from opensora.data.transforms import fit, to_uint8
from opensora.errors import DataError, UsageError
from opensora.infer.pipeline import Shape
from opensora.media.read import read_clip
from opensora.runtime import uniform

_QUICK = ProbeOptions(count="packets", num_threads=1)


class RealClipsConfig(Config):
    """Which clips, and how they are cut."""

    path: Path | None = Field(
        default=None,
        description="manifest (CSV, Parquet) or folder of videos; null renders held-out scenes",
    )
    scenes: SceneConfig = Field(
        default=SceneConfig(), description="scenes to render where there is no path"
    )
    num: int = Field(default=256, ge=1, description="how many clips at most")
    start: str = Field(
        default="first", pattern="^(first|random)$", description="where in a file a clip begins"
    )
    frames: int | None = Field(default=None, ge=1, description="null: as the model draws")
    height: int | None = Field(default=None, ge=1, description="pixels; null: as the model draws")
    width: int | None = Field(default=None, ge=1, description="pixels; null: as the model draws")
    fps: float | None = Field(default=None, gt=0, description="null: as the model draws")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of random starts and of the scenes")


@dataclass(frozen=True)
class Clips:
    """Clips of one shape, read one at a time.

    Attributes:
        ids: a name for each.
        texts: captions.
        too_short: rows of the manifest that were passed over.
    """

    config: RealClipsConfig
    shape: Shape
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    too_short: int = 0
    _manifest: Manifest | None = None
    _rows: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> np.ndarray:
        """uint8 (F, H, W, 3).

        Raises:
            DataError: the file cannot be read.
        """
        if self._manifest is None:
            return render(sample(self.config.scenes, self.config.seed, index, "heldout"))
        row, rows, shape = self._rows[index], self._manifest, self.shape
        start = float(rows.start[row])
        if self.config.start == "random":
            slack = float(rows.seconds[row]) - 1 / float(rows.fps[row])
            slack = max(0.0, slack - (shape.num_frames - 1) / shape.fps)
            start += slack * float(uniform([row], self.config.seed, "evaluation clip"))
        location = rows.location(row)
        clip = read_clip(location, num_frames=shape.num_frames, fps=shape.fps, start=start)
        return to_uint8(fit(clip.frames, (shape.height, shape.width)))

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the clips, for settings."""
        shape = self.shape
        facts: dict[str, Any] = {
            "clips": len(self), "frames": shape.num_frames, "height": shape.height,
            "width": shape.width, "fps": shape.fps, "seed": self.config.seed,
            "start": self.config.start, "too_short": self.too_short,
        }  # fmt: skip
        if self._manifest is None:
            return {**facts, "scenes": self.config.scenes.model_dump(mode="json")}
        return {**facts, "manifest": self._manifest.identity[:16]}


def open_clips(config: RealClipsConfig, default: Shape | None, *, where: str = "clips") -> Clips:
    """Find the clips and settle their shape.

    Args:
        default: for sides, frames and rate that the config leaves open; None where nothing is
            known of them.

    Raises:
        DataError: nothing is there, or nothing is long enough.
        UsageError: the shape is not known, or not the one of the scenes.
    """
    shape = _shape(config, default, where)
    if config.path is None:
        scenes = config.scenes
        theirs = Shape(scenes.frames, scenes.height, scenes.width, scenes.fps)
        if theirs != shape:
            raise UsageError(
                f"the clips are to be {_told(shape)}, the scenes are {_told(theirs)}: set "
                f"{where}.scenes.frames, .height, .width, .fps, or {where}.path"
            )
        drawn = [sample(scenes, config.seed, index, "heldout") for index in range(config.num)]
        texts = tuple(scene.caption for scene in drawn)
        return Clips(config, shape, tuple(f"scene-{i:06d}" for i in range(config.num)), texts)
    rows = read_manifest(config.path)
    needed = (shape.num_frames - 0.5) / shape.fps
    long_enough = [row for row in range(len(rows)) if rows.seconds[row] >= needed - 1e-6]
    if not long_enough:
        raise DataError(
            f"none of the {len(rows)} clips of {config.path} has {shape.num_frames} frames at "
            f"{shape.fps:g} per second: set {where}.frames or {where}.fps"
        )
    chosen = tuple(long_enough[: config.num])
    return Clips(
        config,
        shape,
        tuple(f"{row:06d} {rows.paths[row]}" for row in chosen),
        tuple(rows.texts[row] for row in chosen),
        len(rows) - len(long_enough),
        rows,
        chosen,
    )


def _shape(config: RealClipsConfig, default: Shape | None, where: str) -> Shape:
    known = default
    if known is None and config.path is None:
        scenes = config.scenes
        known = Shape(scenes.frames, scenes.height, scenes.width, scenes.fps)
    wanted = (config.frames, config.height, config.width, config.fps)
    if known is None:
        names = ("frames", "height", "width", "fps")
        missing = [f"{where}.{n}" for n, v in zip(names, wanted, strict=True) if v is None]
        if missing:
            raise UsageError(f"the shape of the clips is not known: set {', '.join(missing)}")
        known = Shape(1, 1, 1, 1.0)
    return Shape(
        config.frames or known.num_frames,
        config.height or known.height,
        config.width or known.width,
        config.fps or known.fps,
    )


def _told(shape: Shape) -> str:
    return f"{shape.num_frames}x{shape.height}x{shape.width} at {shape.fps:g} fps"


def read_manifest(path: Path) -> Manifest:
    """A manifest, that of a folder with `manifest.csv`, or the videos of a folder.

    Raises:
        DataError: it is none, or files are missing.
    """
    if path.is_dir():
        if (path / "manifest.csv").is_file():
            path = path / "manifest.csv"
        else:
            return probe_folder(path, options=_QUICK)[0]
    rows = manifests.read(path)
    manifests.check_files(rows)
    return rows
