"""A dataset's manifest as a reader of the page wants it: how much, of what, and some examples."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from opensora.data import manifest
from opensora.data.manifest import Manifest
from opensora.errors import OpensoraError
from opensora.report import scale
from opensora.report.findings import Dataset, Sample
from opensora.report.reading import Notes

NAMES = ("manifest.csv", "manifest.parquet")
NUM_EXAMPLES = 8


def read(path: Path, notes: Notes) -> Dataset | None:
    """The dataset of a manifest, or None with a note where training could not read it either."""
    try:
        rows = manifest.read(path)
    except (OpensoraError, OSError) as error:
        notes.add(path, error)
        return None
    if not len(rows):
        notes.add(path, "lists no clips")
        return None
    spread = np.linspace(0, len(rows) - 1, min(NUM_EXAMPLES, len(rows))).round().astype(int)
    examples = [Sample(rows.location(row), rows.texts[row]) for row in spread.tolist()]
    return Dataset(path, len(rows), _facts(rows), tuple(examples))


def _facts(rows: Manifest) -> dict[str, str]:
    """Sizes, lengths and rates, each as one figure or the range from least to most."""
    return {
        "size": f"{_range(rows.width)} × {_range(rows.height)} px",
        "frames": _range(rows.num_frames),
        "rate": f"{_range(rows.fps)} fps",
        "in all": scale.duration(float(rows.seconds.sum())),
    }


def _range(values: np.ndarray) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"
