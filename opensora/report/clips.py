"""Videos and pictures inside the page: embedded while the budget lasts, linked beyond it.

Only files below the reported folder are touched, whatever a list names. The media room decodes one
frame of each, which gives its size, a still to show before (or instead of) the video, and proof
that it can be read.
"""

from __future__ import annotations

import base64
import io
import os
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
        root: files outside it are refused.
        folder: where the page will lie; links are relative to it.
        bytes_left: characters of base64 that may still be embedded.
        num_linked: media that did not fit.
        notes: where refused and damaged files are told.
    """

    root: Path
    folder: Path
    bytes_left: int
    notes: Notes
    num_linked: int = 0

    def player(self, path: Path, label: str) -> Markup:
        """An element that shows the file, or says that it cannot."""
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
            inside = path.resolve(strict=True).is_relative_to(self.root)
        except (OSError, RuntimeError, ValueError):
            return "does not exist"
        if not inside:
            return "lies outside the reported folder, so the page leaves it out"
        return None if path.is_file() else "is not a file"

    def _source(self, path: Path, kind: str) -> tuple[str, bool]:
        """A data: address while the budget lasts, then a relative link; and which of the two."""
        if self._take(path.stat().st_size):
            return _data_address(path.read_bytes(), kind), True
        self.num_linked += 1
        # The name may hold bytes that are no UTF-8; quoting the bytes keeps the link true.
        return quote(os.fsencode(os.path.relpath(path.resolve(), self.folder))), False

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
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG")
    return buffer.getvalue()


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
