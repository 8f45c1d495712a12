"""What was measured already, so that a stopped judging goes on instead of beginning again.

`measures.jsonl` has one line for each measure of a video. A line holds as long as the file, what
was asked of it and the weights are what they were; what a crash tore is measured again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from opensora.evaluate.vbench.measures import Measured
from opensora.evaluate.vbench.weights import Shelf, Weights

FILE = "measures.jsonl"
VERSION = 2
"""Of the arithmetic; raised when a change of it moves scores."""


class Ledger:
    """The measures of one output folder.

    Args:
        folder: exists; ranks share it, and each appends what it measures.
        shelf: decides which weights a line was made with.
    """

    def __init__(self, folder: Path, shelf: Shelf):
        self.path, self.shelf = folder / FILE, shelf
        self._known: dict[str, Measured] = {}
        self._sources: dict[Weights, Any] = {}
        self._read()

    def key(self, path: Path, what: str, weights: Sequence[Weights] = (), about: Any = None) -> str:
        """Names one measure of one file.

        Args:
            what: a dimension, a proxy, or the static filter.
            about: what of the prompt's entry enters the measure.
        """
        facts = path.stat()
        parts = [VERSION, path.name, facts.st_size, facts.st_mtime_ns, what, about]
        parts += [self._source(one) for one in weights]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    def get(self, key: str) -> Measured | None:
        """What stands under a key."""
        return self._known.get(key)

    def put(self, key: str, measured: Measured) -> None:
        """Write a measure down; it is in the file when this returns, unless it is no number, which
        is to be measured again."""
        self._known[key] = measured
        if not math.isfinite(measured.value):
            return
        line = json.dumps([key, measured.value, measured.weight]) + "\n"
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line)

    def _read(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        for line in content.decode("utf-8", errors="replace").split("\n"):
            with suppress(ValueError, TypeError):
                key, value, weight = json.loads(line)
                self._known[str(key)] = Measured(float(value), float(weight))
        if content and not content.endswith(b"\n"):  # so that the next line stands by itself
            with open(self.path, "ab") as file:
                file.write(b"\n")

    def _source(self, weights: Weights) -> Any:
        """What tells one version of weights from another without reading them."""
        if weights not in self._sources:
            source = self.shelf.find(weights)
            place = Path(source or "")
            files = sorted(place.rglob("*")) if place.is_dir() else [place]
            facts = [(str(f.relative_to(place)), f.stat()) for f in files if f.is_file()]
            seen = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in facts]
            self._sources[weights] = seen or source
        return self._sources[weights]
