"""The shards of a latent cache: what is known of each clip, and the files that hold its tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.store import write
from opensora.types import Condition

SHARD_KIND = "latents"
TENSORS_NAME = "latents.safetensors"
ENTRIES_NAME = "entries.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """One encoded clip.

    Attributes:
        row: of the manifest, the sample id.
        text: caption.
        fps: frames per second of the pixels.
        resolution, num_frames, height, width: the bucket it was cut for.
        recipe: digest of everything but the file that the latents depend on.
        file_sha256, file_size, file_mtime_ns: the file it was cut from.
        shard: name of the folder that holds its tensors.
    """

    row: int
    text: str
    fps: float
    resolution: str
    num_frames: int
    height: int
    width: int
    recipe: str
    file_sha256: str
    file_size: int
    file_mtime_ns: int
    shard: str = ""

    @property
    def name(self) -> str:
        """The latents' name among the tensors; text features add '.tokens', '.mask', '.pooled'."""
        return f"{self.row:08d}"


def write_entries(entries: list[Entry], path: Path) -> None:
    """Entries as JSON, column by column."""
    columns = {f.name: [getattr(entry, f.name) for entry in entries] for f in fields(Entry)}
    path.write_text(json.dumps(columns, ensure_ascii=False), encoding="utf-8")


def read_entries(path: Path) -> list[Entry]:
    """Entries as `write_entries` wrote them."""
    columns = json.loads(path.read_text(encoding="utf-8"))
    rows = zip(*(columns[field.name] for field in fields(Entry)), strict=True)
    return [Entry(*values) for values in rows]


class ShardWriter:
    """Gathers encoded clips and writes them away, a complete shard at a time.

    Args:
        directory: of the cache.
        rank: of this process; ranks write shards of their own.
        dtype: of stored floating tensors.
        shard_bytes: a shard is closed when it holds this much.
        meta: JSON that is kept in each shard's manifest.
    """

    def __init__(
        self, directory: Path, rank: int, dtype: torch.dtype, shard_bytes: int, meta: dict[str, Any]
    ) -> None:
        self._directory = directory
        self._rank = rank
        self._dtype = dtype
        self._shard_bytes = shard_bytes
        self._meta = meta
        taken = [path.name.split("-")[1] for path in directory.glob(f"shard-*-rank{rank:03d}")]
        self._number = 1 + max(map(int, taken), default=-1)
        self._entries: list[Entry] = []
        self._tensors: dict[str, Tensor] = {}
        self._num_bytes = 0

    def add(self, entry: Entry, latents: Tensor, features: Condition | None, index: int) -> int:
        """Take one clip in; returns its bytes.

        Args:
            latents: (C, T, H, W).
            features: of a batch of prompts, of which `index` is this clip's; padding on the right
                is not stored.
        """
        tensors = {entry.name: latents}
        if features is not None:
            length = int(features.mask[index].nonzero().max()) + 1
            tensors[f"{entry.name}.tokens"] = features.tokens[index, :length]
            tensors[f"{entry.name}.mask"] = features.mask[index, :length]
            if features.pooled is not None:
                tensors[f"{entry.name}.pooled"] = features.pooled[index]
        stored = {name: self._stored(tensor) for name, tensor in tensors.items()}
        num_bytes = sum(tensor.nbytes for tensor in stored.values())
        self._tensors |= stored
        self._entries.append(replace(entry, shard=self._name))
        self._num_bytes += num_bytes
        if self._num_bytes >= self._shard_bytes:
            self.close()
        return num_bytes

    def close(self) -> None:
        """Write what is gathered, if anything."""
        if not self._entries:
            return
        from safetensors.torch import save_file

        with write(self._directory / self._name, kind=SHARD_KIND, meta=self._meta) as folder:
            save_file(self._tensors, folder / TENSORS_NAME)
            write_entries(self._entries, folder / ENTRIES_NAME)
        self._number += 1
        self._entries, self._tensors, self._num_bytes = [], {}, 0

    @property
    def _name(self) -> str:
        return f"shard-{self._number:06d}-rank{self._rank:03d}"

    def _stored(self, tensor: Tensor) -> Tensor:
        dtype = self._dtype if tensor.is_floating_point() else None
        # Cloned, because a slice would keep the whole batch in memory.
        return tensor.detach().to("cpu", dtype).clone(memory_format=torch.contiguous_format)
