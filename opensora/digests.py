"""Digests of files, fine enough to name the tensor that was damaged.

No tensor container in common use notices a flipped bit, so the store does. SHA-256 of the whole
file decides; a CRC-32 per tensor, taken in the same pass over a safetensors file, says where.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

Result = TypeVar("Result")

_CHUNK_BYTES = 4 << 20
_SAFETENSORS_HEADER_LIMIT = 100_000_000  # bytes; the format's own cap on its JSON header


@dataclass(frozen=True)
class FileRecord:
    """What one file must look like.

    Attributes:
        size: bytes.
        sha256: hexadecimal digest of the content; this is what decides.
        tensors: CRC-32 of each tensor's bytes when the file is safetensors, else None; it only
            serves to name the damaged tensor.
    """

    size: int
    sha256: str
    tensors: dict[str, int] | None = None


def digest(path: Path) -> FileRecord:
    """Size, SHA-256 and (for a name ending in .safetensors) the CRC-32 of each tensor.

    Raises:
        OSError: the file is missing, unreadable or shrinking.
    """
    whole = hashlib.sha256()
    view = memoryview(bytearray(_CHUNK_BYTES))
    checks: dict[str, int] = {}
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        segments = _tensor_segments(file, size) if path.suffix == ".safetensors" else []
        for name, length in segments or [(None, size)]:
            check = 0
            while length > 0:
                count = file.readinto(view[: min(length, _CHUNK_BYTES)])
                if not count:
                    raise OSError(errno.EIO, "the file shrank while it was read", str(path))
                whole.update(view[:count])
                check = zlib.crc32(view[:count], check) if name is not None else 0
                length -= count
            if name is not None:
                checks[name] = check
    return FileRecord(size, whole.hexdigest(), checks if segments else None)


def difference(expected: FileRecord, found: FileRecord) -> str:
    """How a file differs from its record, as near to the damaged tensor as can be told."""
    if found.size != expected.size:
        return f"{found.size} bytes where {expected.size} were written"
    if expected.tensors is None:
        return "the content does not match its SHA-256"
    if found.tensors is None or found.tensors.keys() != expected.tensors.keys():
        return "the safetensors header is damaged"
    damaged = [name for name, check in expected.tensors.items() if found.tensors[name] != check]
    if not damaged:
        return "the safetensors header is damaged"
    more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
    return "damaged tensors: " + ", ".join(f"'{name}'" for name in damaged[:5]) + more


def in_threads(function: Callable[[str], Result], names: Iterable[str]) -> list[Result]:
    """`function` over `names` in order; reading and hashing let other threads run."""
    names = list(names)
    workers = min(8, os.cpu_count() or 1, len(names))
    if workers < 2:
        return [function(name) for name in names]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, names))


def _tensor_segments(file: BinaryIO, size: int) -> list[tuple[str | None, int]]:
    """A safetensors file as (tensor name, bytes) in file order, the header first under None.

    Empty where the header does not describe the file to its last byte. Rewinds the file.
    """
    try:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _SAFETENSORS_HEADER_LIMIT):
            return []
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    finally:
        file.seek(0)
    edges = [0, *(end for _, end, _ in spans)]
    if [begin for begin, _, _ in spans] != edges[:-1] or edges[-1] != size - 8 - length:
        return []
    return [(None, 8 + length), *((name, end - begin) for begin, end, name in spans)]
