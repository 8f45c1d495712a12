"""Videos and pictures inside the page: embedded while the budget lasts, linked beyond it.

Only files below the reported folder are opened, whatever a list names. The media room decodes one
frame of each, which gives its size, a still to show before (or instead of) the video, and proof
that it can be read.
"""

from __future__ import annotations

import base64
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from opensora.errors import OpensoraError
from opensora.media.read import read_clip
from opensora.media.source import Limits
from opensora.report.markup import Markup, element
from opensora.report.reading import Notes

TYPES = {
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".gif": "image/gif",
    ".png": "image/png",
}
SMALL_SIDE = 200
"""Clips up to this many px are shown larger than they are, with hard pixels."""

_STILL_SIDE = 256
_LIMITS = Limits(max_seconds=10.0)


@dataclass
class Shelf:
    """Hands out players and keeps the account of what was embedded.

    Attributes:
        root: files outside it are linked unopened, and never embedded.
        folder: where the page will lie; links are relative to it.
        bytes_left: characters of base64 that may still be embedded.
        num_linked: media that did not fit.
        num_outside: media outside the root.
        notes: where refused and damaged files are told.
    """

    root: Path
    folder: Path
    bytes_left: int
    notes: Notes
    num_linked: int = 0
    num_outside: int = 0

    def player(self, path: Path, label: str) -> Markup:
        """An element that shows the file, or says that it cannot."""
        if self._is_outside(path):
            return self._outsider(path, label)
        reason = self._refusal(path)
        if reason is not None:
            self.notes.add(path, reason)
            return missing(reason)
        try:
            return self._element(path, label)
        except (OpensoraError, OSError) as error:
            self.notes.add(path, error)
            return missing("cannot be read")

    def _element(self, path: Path, label: str) -> Markup:
        frame = read_clip(path, num_frames=1, limits=_LIMITS).frames[0]
        height, width = frame.shape[:2]
        look = "pixelated" if max(height, width) <= SMALL_SIDE else None
        kind = TYPES[path.suffix.lower()]
        if kind.startswith("image/"):
            source, _ = self._source(path, kind)
            return element(
                "img", src=source, alt=label, width=width, height=height, class_=look,
                loading="lazy",
            )  # fmt: skip
        poster = self._still(frame)
        source, embedded = self._source(path, kind)
        return element(
            "video",
            src=source,
            poster=poster,
            width=width,
            height=height,
            class_=look,
            autoplay=embedded,
            preload="auto" if embedded else "none",
            controls=not embedded,
            muted=True,
            loop=True,
            playsinline=True,
            aria_label=label,
        )

    def _refusal(self, path: Path) -> str | None:
        if path.suffix.lower() not in TYPES:
            return f"is none of {', '.join(TYPES)}"
        try:
            place = path.resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            return "does not exist"
        if not place.is_relative_to(self.root):
            return "is a link out of the reported folder"
        return None if place.is_file() else "is not a file"

    def _is_outside(self, path: Path) -> bool:
        """Whether this is a media file that exists, but not below the root."""
        try:
            place = path.resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            return False
        known = path.suffix.lower() in TYPES and place.suffix.lower() in TYPES
        return known and place.is_file() and not place.is_relative_to(self.root)

    def _outsider(self, path: Path, label: str) -> Markup:
        """A link without a look inside: a list may name files that are nobody's to publish."""
        self.num_outside += 1
        source = self._link(path)
        if TYPES[path.suffix.lower()].startswith("image/"):
            return element("img", src=source, alt=label, loading="lazy")
        return element(
            "video", src=source, preload="metadata", controls=True, muted=True, loop=True,
            playsinline=True, aria_label=label,
        )  # fmt: skip

    def _source(self, path: Path, kind: str) -> tuple[str, bool]:
        """A data: address while the budget lasts, then a relative link; and which of the two."""
        if self._take(path.stat().st_size):
            return _data_address(path.read_bytes(), kind), True
        self.num_linked += 1
        return self._link(path), False

    def _link(self, path: Path) -> str:
        # The name may hold bytes that are no UTF-8; quoting the bytes keeps the link true.
        return quote(os.fsencode(os.path.relpath(path.resolve(), self.folder)))

    def _still(self, frame: np.ndarray) -> str | None:
        content = _png(_shrunk(frame))
        return _data_address(content, "image/png") if self._take(len(content)) else None

    def _take(self, num_bytes: int) -> bool:
        cost = 4 * -(-num_bytes // 3)
        if cost > self.bytes_left:
            return False
        self.bytes_left -= cost
        return True


def missing(reason: str) -> Markup:
    """What stands where a player cannot."""
    return element("div", element("span", reason), class_="missing")


def _data_address(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _png(frame: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as a PNG file in memory (W3C PNG, third edition, 5.2, 9.2 and 11.2)."""
    height, width = frame.shape[:2]
    # Every row begins with its filter: 0, none.
    rows = np.pad(frame.reshape(height, 3 * width), ((0, 0), (1, 0))).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _shrunk(frame: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) averaged over square blocks until no side is above `_STILL_SIDE`."""
    block = -(-max(frame.shape[:2]) // _STILL_SIDE)
    if block == 1:
        return frame
    height, width = (max(1, length // block) for length in frame.shape[:2])
    cut = frame[: height * block, : width * block].astype(np.float32)
    rows, columns = min(block, cut.shape[0]), min(block, cut.shape[1])
    blocks = cut.reshape(height, rows, width, columns, 3)
    return blocks.mean((1, 3)).round().astype(np.uint8)
