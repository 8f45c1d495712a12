"""Manifests out of video files: probing a folder, or the files of a manifest that lacks columns.

Files that cannot be used are not dropped in silence: they come back with the reason, and
`write_refused` puts them into a CSV file beside the manifest.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from opensora.data.manifest import PROBED, Manifest, from_columns, rename_columns
from opensora.data.packed import PackedStrings
from opensora.data.tables import Column, read_table, write_table
from opensora.errors import DataError, did_you_mean
from opensora.media.probe import DEFAULT_LIMITS, Probe, probe
from opensora.media.source import Limits

log = logging.getLogger("opensora")

SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"),
    *(".ts", ".flv", ".wmv", ".ogv", ".gif"),
)
PATH_COLUMNS = ("path", "file", "file_name", "video")
TEXT_COLUMNS = ("text", "caption", "prompt")
Count = Literal["packets", "decode"]


@dataclass(frozen=True)
class Refused:
    """A file that is not used, as the manifest would have named it, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class ProbeOptions:
    """How files are probed.

    Attributes:
        count: 'decode' looks at every frame and finds all damage; 'packets' is many times faster.
        limits: what reading one file may cost.
        num_threads: files looked at together.
        progress: called with the files done so far and their number.
    """

    count: Count = "decode"
    limits: Limits = DEFAULT_LIMITS
    num_threads: int = 4
    progress: Callable[[int, int], None] | None = None


def probe_folder(
    folder: str | Path,
    *,
    captions: str | Path | None = None,
    options: ProbeOptions = ProbeOptions(),
) -> tuple[Manifest, list[Refused]]:
    """A manifest of the videos in a folder and below, in the order of their names.

    The text of a video is the first of: its row in `captions`; a file of the same name with the
    suffix .txt; its file name as words, without digits.

    Args:
        captions: a CSV or Parquet table of (path or file, text or caption); paths are relative to
            the folder, or bare file names.

    Returns:
        The manifest, whose paths are relative to the folder, and the files left out.

    Raises:
        DataError: there is no such folder, no video in it, or none of them is readable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    names = _video_names(folder)
    if not names:
        kinds = ", ".join(SUFFIXES)
        raise DataError(f"{folder} holds no video; looked for {kinds}, also in subfolders")
    texts = _read_captions(Path(captions)) if captions is not None else {}
    _tell_unmatched(texts, names)
    found, refused = _probe_all(folder, names, options)
    used = [name for name in names if name in found]
    table: dict[str, Column] = {
        "path": PackedStrings.pack(used),
        "text": PackedStrings.pack(_caption(folder, name, texts) for name in used),
    }
    for column in PROBED:
        table[column] = np.array([getattr(found[name], column) for name in used])
    if not used:
        raise DataError(f"none of the {len(names)} videos in {folder} can be read: {refused[0]}")
    return from_columns(table, folder=folder, where=str(folder)), refused


def fill(
    path: str | Path,
    *,
    options: ProbeOptions = ProbeOptions(),
) -> tuple[Manifest, list[Refused]]:
    """A manifest file whose missing columns and cells (size, length, rate) come from the files.

    What the file states is kept. Rows whose file cannot be read are left out.

    Raises:
        DataError: `path` or `text` are missing, or no row is left.
    """
    path = Path(path)
    table = rename_columns(read_table(path), path)
    for name in ("path", "text"):
        if name not in table:
            raise DataError(f"{path} lacks the column '{name}'." + did_you_mean(name, table))
    names = table["path"]
    stated = {name: _stated(table.get(name), len(names)) for name in PROBED}
    lacking = np.any([np.isnan(column) for column in stated.values()], axis=0)
    wanted = list(dict.fromkeys(str(names[row]) for row in np.flatnonzero(lacking).tolist()))
    found, refused = _probe_all(path.parent, wanted, options)
    usable = np.array([not lacking[r] or names[r] in found for r in range(len(names))], bool)
    if not usable.any():
        raise DataError(f"no row of {path} can be used: {refused[0] if refused else 'it is empty'}")
    for name, column in stated.items():
        for row in np.flatnonzero(np.isnan(column) & usable).tolist():
            column[row] = getattr(found[names[row]], name)
    rows = np.flatnonzero(usable)
    filled: dict[str, Column] = {**table, **stated}
    kept = {n: c.take(rows) if isinstance(c, PackedStrings) else c[rows] for n, c in filled.items()}
    return from_columns(kept, folder=path.parent, where=str(path)), refused


def write_refused(refused: Iterable[Refused], path: str | Path) -> None:
    """The files left out and why, as a table (path, reason)."""
    refused = list(refused)
    columns: dict[str, Column] = {
        "path": PackedStrings.pack(item.path for item in refused),
        "reason": PackedStrings.pack(item.reason for item in refused),
    }
    write_table(columns, Path(path))


def words_of(name: str) -> str:
    """A file name as a caption: 'Clips/red-CarDriving_720p_003.mp4' -> 'red car driving'.

    Without a single word in the name, the folder's name is taken, and then 'a video'.
    """
    path = Path(name)
    for part in (path.stem, path.parent.name):
        spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", part)
        words = re.split(r"[\W_]+", spaced)
        kept = [word.lower() for word in words if word and not any(c.isdigit() for c in word)]
        if kept:
            return " ".join(kept)
    return "a video"


def _video_names(folder: Path) -> list[str]:
    """Relative names with '/', sorted; hidden files and linked folders are passed over."""
    names = []
    for parent, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            path = Path(parent) / name
            if path.suffix.lower() in SUFFIXES and not name.startswith("."):
                names.append(path.relative_to(folder).as_posix())
    return sorted(names)


def _probe_all(
    folder: Path, names: list[str], options: ProbeOptions
) -> tuple[dict[str, Probe], list[Refused]]:
    def look(name: str) -> Probe | Refused:
        try:
            name.encode("utf-8")
            found = probe(folder / name, count=options.count, limits=options.limits)
        except UnicodeEncodeError:
            return Refused(ascii(name), "the file name is not UTF-8; rename the file")
        except DataError as error:
            return Refused(name, str(error))
        return found if found.damage is None else Refused(name, f"damaged: {found.damage}")

    found, refused = {}, []
    with ThreadPoolExecutor(options.num_threads) as pool:
        for count, (name, result) in enumerate(
            zip(names, pool.map(look, names), strict=True), start=1
        ):
            if isinstance(result, Refused):
                refused.append(result)
                log.warning("left out: %s (%s)", result.path, result.reason)
            else:
                found[name] = replace(result, fps=result.fps or 1.0)
            if options.progress is not None:
                options.progress(count, len(names))
    return found, refused


def _read_captions(path: Path) -> dict[str, str]:
    table = read_table(path)
    chosen = []
    for names in (PATH_COLUMNS, TEXT_COLUMNS):
        present = [name for name in names if name in table]
        if not present:
            raise DataError(
                f"{path} needs a column named {' or '.join(names)}; found {', '.join(table)}"
            )
        chosen.append(table[present[0]])
    return {str(name): str(text) for name, text in zip(*chosen, strict=True)}


def _tell_unmatched(texts: dict[str, str], names: list[str]) -> None:
    known = {*names, *(Path(name).name for name in names)}
    strangers = [name for name in texts if name not in known]
    if strangers:
        log.warning("%d captions belong to no video, such as %s", len(strangers), strangers[0])


def _caption(folder: Path, name: str, texts: dict[str, str]) -> str:
    for key in (name, Path(name).name):
        if texts.get(key, "").strip():
            return texts[key].strip()
    sidecar = (folder / name).with_suffix(".txt")
    if sidecar.is_file():
        try:
            text = " ".join(sidecar.read_text(encoding="utf-8-sig").split())
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"the caption {sidecar} cannot be read: {error}") from None
        if text:
            return text
    return words_of(name)


def _stated(column: Column | None, num_rows: int) -> np.ndarray:
    """The numbers that a manifest states, nan where it does not."""
    if column is None:
        return np.full(num_rows, np.nan)
    if not isinstance(column, PackedStrings):
        return np.array(column, np.float64)
    try:
        return np.array([float(cell) if cell.strip() else np.nan for cell in column])
    except ValueError as error:
        raise DataError(f"a cell is not a number: {error}") from None
