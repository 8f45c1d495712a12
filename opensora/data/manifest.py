"""The list of training clips: columns in memory, checked once, read from CSV or Parquet.

One row is one clip of one file; its number, counted from 0, is the sample id that randomness is
addressed by, so rows may be appended but not reordered within a run. `num_frames`, `height`,
`width` and `fps` describe the whole file; `start` and `end` (seconds) choose a window of it.
Nothing is decoded here; `folder.py` makes manifests by probing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from opensora.data.packed import PackedStrings
from opensora.data.tables import Column, read_table, write_table
from opensora.errors import DataError, closest

log = logging.getLogger("opensora")

REQUIRED = ("path", "text", "num_frames", "height", "width", "fps")
PROBED = ("num_frames", "height", "width", "fps")
OPTIONAL = ("start", "end", "id")
# Open-Sora 1.x names -> ours.
RENAMED = {"aes": "score_aes", "flow": "score_flow", "match": "score_match"}
# Open-Sora columns that are derived from others here, or that are no numbers to filter by.
IGNORED = ("aspect_ratio", "resolution", "text_len", "cmotion", "timestamp", "name", "ref", "neg")
NUM_OFFENDERS_SHOWN = 10


@dataclass(frozen=True)
class Manifest:
    """N clips as columns.

    Attributes:
        folder: where relative paths start.
        paths: as written in the file.
        texts: captions; an empty one stands for no caption.
        num_frames, height, width: int32 (N,), of the whole file.
        fps: float64 (N,), of the whole file.
        start, end: float64 (N,), the window in seconds; end is inf where it is open.
        scores: 'score_...' -> float32 (N,), nan where there is none.
        ids: the file's own names for the clips, or None.
    """

    folder: Path
    paths: PackedStrings
    texts: PackedStrings
    num_frames: np.ndarray
    height: np.ndarray
    width: np.ndarray
    fps: np.ndarray
    start: np.ndarray
    end: np.ndarray
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    ids: PackedStrings | None = None

    def __len__(self) -> int:
        return len(self.num_frames)

    def location(self, row: int) -> Path:
        """Where the file of a row lies."""
        return self.folder / self.paths[row]

    @cached_property
    def seconds(self) -> np.ndarray:
        """float64 (N,), how long each clip is inside its window."""
        return np.minimum(self.num_frames / self.fps, self.end) - self.start

    @cached_property
    def identity(self) -> str:
        """SHA-256 over every row: equal content gives an equal data plan."""
        digest = hashlib.sha256()
        for name, column in self.columns():
            arrays = (
                [column.offsets, column.data] if isinstance(column, PackedStrings) else [column]
            )
            digest.update(f"{name} {len(self)} ".encode())
            for array in arrays:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def columns(self) -> Iterator[tuple[str, Column]]:
        """Every column that says something, under the name it has in files."""
        yield "path", self.paths
        yield "text", self.texts
        for name in PROBED:
            yield name, getattr(self, name)
        if self.start.any() or np.isfinite(self.end).any():
            yield "start", self.start
            yield "end", self.end
        if self.ids is not None:
            yield "id", self.ids
        yield from sorted(self.scores.items())


def read(path: str | Path) -> Manifest:
    """Read and check a manifest (.csv or .parquet).

    Raises:
        DataError: the file is unreadable, lacks columns (with those expected and found, and the
            nearest names), or has impossible rows (the first ten with their number and reason).
        MissingPackageError: Parquet without pyarrow.
    """
    path = Path(path)
    table = rename_columns(read_table(path), path)
    missing = [name for name in REQUIRED if name not in table]
    if missing:
        raise DataError(_missing_columns(path, missing, list(table)))
    return from_columns(table, folder=path.parent, where=str(path))


def write(manifest: Manifest, path: str | Path) -> None:
    """Write a manifest as .csv or .parquet; relative paths are kept as they are."""
    write_table(dict(manifest.columns()), Path(path))


def rename_columns(table: dict[str, Column], path: Path) -> dict[str, Column]:
    """The table under this project's column names; what will not be used is named in the log."""
    for old, new in RENAMED.items():
        if old in table and new in table:
            raise DataError(f"{path} has both '{old}' and '{new}', which mean the same")
    renamed = {RENAMED.get(name, name): column for name, column in table.items()}
    known = (*REQUIRED, *OPTIONAL)
    used = {n: c for n, c in renamed.items() if n in known or n.startswith("score_")}
    strangers = sorted(set(renamed) - set(used) - set(IGNORED))
    for name in strangers:
        near = closest(name, set(known) - set(used))
        if near is not None and near not in REQUIRED:
            raise DataError(f"{path}: unknown column '{name}'. Did you mean '{near}'?")
    unused = sorted(set(renamed) - set(used))
    if unused:
        log.info("%s: columns not used here: %s", path, ", ".join(unused))
    return {**used, **{name: renamed[name] for name in strangers}}


def from_columns(table: dict[str, Column], *, folder: Path, where: str) -> Manifest:
    """A checked manifest from columns of text or numbers.

    Args:
        where: what to call the table in messages.

    Raises:
        DataError: there are no rows, or impossible ones.
    """
    num_rows = len(table["path"])
    if num_rows == 0:
        raise DataError(f"{where} has no rows")
    offences = _Offences()
    numbers = {name: _numbers(table[name], name, offences) for name in PROBED}
    numbers["start"] = _numbers(table.get("start"), "start", offences, num_rows, default=0.0)
    numbers["end"] = _numbers(table.get("end"), "end", offences, num_rows, default=np.inf)
    scores = {
        name: _numbers(column, name, offences, default=np.nan).astype(np.float32)
        for name, column in table.items()
        if name.startswith("score_")
    }
    # A still picture has no rate.
    still = (numbers["num_frames"] == 1) & ~(numbers["fps"] > 0)
    numbers["fps"] = np.where(still, 1.0, numbers["fps"])
    paths, texts, ids = _strings(table["path"]), _strings(table["text"]), table.get("id")
    _check_rows(paths, numbers, offences)
    offences.refuse(where)
    without_text = np.flatnonzero(texts.lengths == 0)
    if len(without_text):
        rows = ", ".join(map(str, without_text[:NUM_OFFENDERS_SHOWN]))
        log.warning("%s: %d rows have no text, among them %s", where, len(without_text), rows)
    return Manifest(
        folder,
        paths,
        texts,
        *(numbers[name].astype(np.int32) for name in ("num_frames", "height", "width")),
        *(numbers[name] for name in ("fps", "start", "end")),
        scores=scores,
        ids=None if ids is None else _strings(ids),
    )


def check_files(manifest: Manifest, *, at_most: int = 10_000) -> int:
    """Look whether the files exist, before anything expensive starts.

    Args:
        at_most: rows to look at, spread evenly over the manifest when it has more.

    Returns:
        How many rows were looked at.

    Raises:
        DataError: with the first ten that are missing.
    """
    count = min(at_most, len(manifest))
    rows = np.unique(np.linspace(0, len(manifest) - 1, count).astype(np.int64)).tolist()
    with ThreadPoolExecutor(16) as pool:  # each look may wait for a network
        present = list(pool.map(lambda row: manifest.location(row).is_file(), rows))
    missing = [row for row, there in zip(rows, present, strict=True) if not there]
    if missing:
        shown = "; ".join(f"row {r}: {manifest.location(r)}" for r in missing[:NUM_OFFENDERS_SHOWN])
        raise DataError(
            f"{len(missing)} of {len(rows)} files looked at do not exist: {shown}. Relative paths "
            f"start at the manifest's folder, {manifest.folder}"
        )
    return len(rows)


class _Offences:
    """Rows that break a rule, gathered over all rules and told together."""

    def __init__(self) -> None:
        self._reasons: dict[int, str] = {}

    def add(self, mask: np.ndarray, rule: str, values: Column | None = None) -> None:
        """Note the rows where `mask` is true; a row keeps the first reason that was found."""
        for row in np.flatnonzero(mask).tolist():
            value = "" if values is None else str(values[row]).replace("nan", "nothing")
            self._reasons.setdefault(row, rule + (f", found {value}" if value else ""))

    def refuse(self, where: str) -> None:
        if not self._reasons:
            return
        rows = sorted(self._reasons)
        shown = "; ".join(f"row {row}: {self._reasons[row]}" for row in rows[:NUM_OFFENDERS_SHOWN])
        raise DataError(
            f"{where}: {len(rows)} rows cannot be used (rows are counted from 0, without the "
            f"header): {shown}"
        )


def _check_rows(paths: PackedStrings, numbers: dict[str, np.ndarray], offences: _Offences) -> None:
    offences.add(paths.lengths == 0, "path is empty")
    for name in ("num_frames", "height", "width"):
        values = numbers[name]
        whole = (values >= 1) & (values < 2**31) & (values == np.floor(values))
        offences.add(~whole, f"{name} must be a whole number, 1 or more", values)
    fps, start, end = numbers["fps"], numbers["start"], numbers["end"]
    offences.add(~((fps > 0) & (fps <= 1000)), "fps must be above 0 and up to 1000", fps)
    offences.add(~(start >= 0) | ~np.isfinite(start), "start must be 0 or more seconds", start)
    offences.add(~(end > start), "end must come after start", end)
    with np.errstate(divide="ignore", invalid="ignore"):
        late = start >= numbers["num_frames"] / fps
    offences.add(late & (start > 0), "start must come before the end of the file", start)


def _strings(column: Column) -> PackedStrings:
    if isinstance(column, PackedStrings):
        return column
    return PackedStrings.pack(str(value) for value in column.tolist())


def _numbers(
    column: Column | None,
    name: str,
    offences: _Offences,
    num_rows: int = 0,
    default: float = np.nan,
) -> np.ndarray:
    """A column as float64 (N,), with `default` where a cell is empty or the column is absent."""
    if column is None:
        return np.full(num_rows, default)
    if not isinstance(column, PackedStrings):
        values = np.asarray(column, np.float64)
        return np.where(np.isnan(values), default, values)
    try:
        return np.array([float(cell) if cell else default for cell in column], np.float64)
    except ValueError:
        values = np.array([_number(cell, default) for cell in column])
        bad = np.array([value is None for value in values])
        offences.add(bad, f"{name} must be a number", column)
        return np.where(bad, np.nan, values).astype(np.float64)


def _number(cell: str, default: float) -> float | None:
    try:
        return float(cell) if cell.strip() else default
    except ValueError:
        return None


def _missing_columns(path: Path, missing: list[str], found: list[str]) -> str:
    told = []
    for name in missing:
        near = closest(name, set(found) - set(REQUIRED))
        told.append(f"'{name}'" + (f" (is '{near}' meant for it?)" if near else ""))
    fill = ""
    if set(missing) <= set(PROBED):
        fill = " `opensora data probe` fills these from the files."
    return (
        f"{path} lacks the columns {', '.join(told)}.{fill} "
        f"Expected: {', '.join(REQUIRED)}. Found: {', '.join(found) or 'none'}."
    )
