"""What the data room's tests share: manifests, configs, files and stand-ins."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from opensora import config
from opensora.data.assignment import BucketAssigner
from opensora.data.buckets import BucketsConfig
from opensora.data.clips import ClipReader, ClipsConfig
from opensora.data.encode import EncodeConfig, EncodeJob
from opensora.data.manifest import Manifest, from_columns
from opensora.data.packed import PackedStrings
from opensora.errors import DataError
from opensora.media.write import write_video
from opensora.types import Clip, Condition

STRIDE, PATCH = (4, 8, 8), (1, 2, 2)


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


def buckets(resolutions, **rest) -> BucketsConfig:
    return config.validate(BucketsConfig, {"resolutions": resolutions, **rest}, where="test")


def assign(manifest, config, *, seed=0) -> BucketAssigner:
    return BucketAssigner(manifest, config, stride=STRIDE, patch=PATCH, seed=seed)


@dataclass
class FakeRead:
    """Stands in for `media.read_clip`: grey frames that tell the file's row and the start."""

    bad: frozenset[int] = frozenset()
    calls: list = field(default_factory=list)

    def __call__(self, path, *, num_frames, fps, start, backend, limits, on_damage):
        row = int(Path(path).stem)
        self.calls.append((row, start, fps))
        if row in self.bad:
            raise DataError(f"'{path}' is bad")
        frames = np.full((num_frames, 64, 64, 3), row, np.uint8)
        return Clip(frames, start + np.arange(num_frames) / fps, fps, str(path))


CACHED = buckets({"64px": {1: [1, 3], 17: [1, 4]}}, aspect_ratios=["1:1"], fps=8)
IDENTITY = {"vae": "tiny", "weights": "abc", "text": ["words", 3]}


def encode_video(pixels):
    """(B, 3, F, H, W) -> (B, 3, 1 + (F - 1) / 4, H / 8, W / 8)."""
    return pixels[:, :, ::4, ::8, ::8] * 2


def encode_text(texts):
    lengths = [1 + int(text.split()[1]) % 3 for text in texts]
    mask = torch.arange(4)[None] < torch.tensor(lengths)[:, None]
    tokens = torch.tensor([float(text.split()[1]) for text in texts])[:, None, None]
    return Condition(tokens * mask[..., None].expand(-1, -1, 5), mask, tokens[:, :, 0])


def make_job(tmp_path, num_rows=11, **changes) -> EncodeJob:
    options = {
        "read": FakeRead(),
        "text": encode_text,
        "latents": encode_video,
        "identity": IDENTITY,
        "clips": ClipsConfig(start="first", max_bad_fraction=0.5),
        "config": EncodeConfig(shard_bytes=6000),
        **changes,
    }
    folder = tmp_path / "videos"
    folder.mkdir(exist_ok=True)
    rows = np.arange(num_rows)
    manifest = make_manifest(folder, num_rows, num_frames=np.where(rows % 4 == 3, 1, 40))
    for row in range(num_rows):
        if not manifest.location(row).exists():
            manifest.location(row).write_bytes(f"file {row}".encode())
    reader = ClipReader(manifest, CACHED, options["clips"], seed=0, read=options["read"])
    return EncodeJob(
        tmp_path / "cache",
        assign(manifest, CACHED),
        reader,
        options["latents"],
        options["text"],
        options["identity"],
        options["config"],
    )


def part_of(rank: int, world_size: int):
    """What one of so many data-parallel ranks reads of every bucket."""
    return lambda bucket: (rank, world_size)
