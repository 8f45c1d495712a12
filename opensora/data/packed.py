"""Millions of strings in one block of memory.

A Python string costs some fifty bytes beside its letters and its reference count is written on
every use, which copies memory into each worker; a manifest of 10^7 captions cannot afford either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

_BLOCK = 65_536  # strings whose positions are turned into Python numbers together


class PackedStrings:
    """An immutable sequence of strings, held as UTF-8 bytes and where each one begins."""

    def __init__(self, data: np.ndarray, offsets: np.ndarray) -> None:
        """Args:
        data: uint8, all strings one after another.
        offsets: int64 (N + 1,), string i is data[offsets[i]:offsets[i + 1]].
        """
        self.data = data
        self.offsets = offsets

    @classmethod
    def pack(cls, strings: Iterable[str]) -> PackedStrings:
        """Raises UnicodeEncodeError for a string that UTF-8 cannot hold."""
        encoded = [string.encode("utf-8") for string in strings]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    @classmethod
    def join(cls, parts: Sequence[PackedStrings]) -> PackedStrings:
        """The strings of all parts in order."""
        if len(parts) == 1:
            return parts[0]
        lengths = [np.zeros(1, np.int64), *(np.diff(part.offsets) for part in parts)]
        data = [part.data for part in parts] or [np.empty(0, np.uint8)]
        return cls(np.concatenate(data), np.cumsum(np.concatenate(lengths)))

    def take(self, rows: np.ndarray) -> PackedStrings:
        """The strings at these rows, in this order."""
        return PackedStrings.pack(self[int(row)] for row in rows)

    @property
    def lengths(self) -> np.ndarray:
        """int64 (N,), bytes of each string."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> str:
        if not -len(self) <= row < len(self):
            raise IndexError(f"string {row} of {len(self)}")
        row %= len(self)
        return self.data[self.offsets[row] : self.offsets[row + 1]].tobytes().decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        view = np.ascontiguousarray(self.data).data
        for first in range(0, len(self), _BLOCK):
            edges = self.offsets[first : first + _BLOCK + 1].tolist()
            for begin, end in pairwise(edges):
                yield str(view[begin:end], "utf-8")
