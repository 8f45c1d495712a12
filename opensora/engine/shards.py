"""Tensors and the safetensors files that hold them, whole or in pieces.

Tensors that are sharded over ranks are written by the ranks that have them, a file a rank, with
each piece's place in the header as torch.distributed.checkpoint's HuggingFaceStorageReader expects
it. Reading goes through that reader: into whole tensors or into shards of any other layout.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.dist.sharded import is_sharded, room
from opensora.errors import CheckpointError, StorageError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Tensors = dict[str, Tensor]
Like = Callable[[str], Tensor | None]


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: `tensor` lies at `offsets` in the tensor `name`."""

    name: str
    offsets: tuple[int, ...]
    tensor: Tensor


def pieces(tensors: Mapping[str, Tensor], rank: int) -> list[Piece]:
    """What a rank has to write, so that all ranks together write everything once.

    Whole tensors are rank 0's, and so is the choice between copies of a sharded one: the copy
    that rank 0 has a part of.
    """
    from torch.distributed.checkpoint import DefaultSavePlanner

    found = [
        Piece(name, (0,) * value.dim(), value.detach())
        for name, value in tensors.items()
        if rank == 0 and not is_sharded(value)
    ]
    sharded = {n: v for n, v in tensors.items() if is_sharded(v) and _first_copy(v)}
    if sharded:
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(sharded, is_coordinator=rank == 0)
        for item in planner.create_local_plan().items:
            assert item.tensor_data is not None
            offsets = tuple(item.tensor_data.chunk.offsets)
            found.append(Piece(item.index.fqn, offsets, planner.resolve_data(item)))  # type: ignore[arg-type]
    return found


def _first_copy(value: DTensor) -> bool:
    """Whether this rank's part belongs to the copy that rank 0 has a part of."""
    mesh, place = value.device_mesh, value.device_mesh.get_coordinate()
    if place is None or 0 not in mesh.mesh:
        return False
    copies = (k for k, placement in enumerate(value.placements) if placement.is_replicate())
    return all(place[k] == 0 for k in copies)


def any_sharded(tensors: Mapping[str, Tensor]) -> bool:
    return any(is_sharded(value) for value in tensors.values())


def file_name(part: str, rank: int, world_size: int, *, sharded: bool) -> str:
    """Where a rank writes its pieces of a part."""
    if not sharded:
        return f"{part}.safetensors"
    return f"{part}-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def files_of(part: str, names: Iterable[str]) -> list[str]:
    """The files of a part among the names of a folder."""
    pattern = re.compile(re.escape(part) + r"(-\d+-of-\d+)?\.safetensors")
    return sorted(name for name in names if pattern.fullmatch(name))


def write(path: Path, content: list[Piece]) -> None:
    """Write pieces to a file, which is not synced; its name is one of `file_name`.

    Raises:
        StorageError: the disk refuses.
    """
    sharded = "-of-" in path.name
    own = {piece.name: piece.tensor.cpu().contiguous() for piece in content}
    places = {piece.name: {"saved_offsets": list(piece.offsets)} for piece in content}
    # One entry only: safetensors writes several in any order, and equal runs write equal files.
    metadata = {"DCP_SHARDING_INFO": json.dumps(places)} if sharded else {"format": "pt"}
    try:
        save_file(_unshared(own), path, metadata)
    except SafetensorError as error:  # what it says of a disk that refuses has no errno
        raise StorageError(f"{path} cannot be written: {error}") from None


def _unshared(tensors: Tensors) -> Tensors:
    """Tensors that share memory, copied: safetensors stores each on its own."""
    seen: set[int] = set()
    result = {}
    for name, value in tensors.items():
        pointer = value.untyped_storage().data_ptr()
        result[name] = value.clone() if pointer in seen else value
        seen.add(pointer)
    return result


def read(files: list[Path], like: Like | None = None) -> Tensors:
    """The tensors of a part.

    Args:
        files: all files of the part.
        like: a tensor whose sharding a name's tensor gets where the shapes are equal; None for a
            whole tensor on the CPU.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if like is None and len(files) == 1:
        try:
            return load_file(files[0])
        except (OSError, SafetensorError, ValueError) as error:
            raise _unreadable(files, error) from None
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        reader = _reader(files)
        stored = reader.read_metadata().state_dict_metadata
        tensors = {
            name: room(entry.size, entry.properties.dtype, like(name) if like else None)  # type: ignore[union-attr]
            for name, entry in stored.items()
        }
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with torch.no_grad(), warnings.catch_warnings():
            # It says that ranks are not asked, which is what is wanted.
            warnings.filterwarnings("ignore", message=".*assuming the intent is to load")
            dcp.load(tensors, storage_reader=reader, planner=planner, no_dist=True)  # type: ignore[arg-type]
    except (OSError, SafetensorError, CheckpointException, ValueError) as error:
        raise _unreadable(files, error) from None
    return tensors


def _unreadable(files: list[Path], error: BaseException) -> CheckpointError:
    return CheckpointError(f"{files[0].parent} cannot be read: {str(error).splitlines()[0]}")


def _reader(files: list[Path]):
    """torch's reader of sharded safetensors, for these files only."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.filesystem import FileSystem

    class Listed(FileSystem):
        def ls(self, path: object) -> list[str]:
            return [str(file) for file in files]

    reader = HuggingFaceStorageReader(str(files[0].parent))
    reader.fs = Listed()
    return reader
