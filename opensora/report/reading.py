"""Tolerant reading of what programs left behind, possibly in the middle of a write.

Nothing raises for what a file holds. Whatever cannot be used is named in `Notes`, which the page
shows; nothing is dropped in silence. Only the content is judged here, not its meaning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_NOTES = 50
MAX_DOCUMENT_BYTES = 32 * 2**20
MAX_DEPTH = 64
"""Deeper nesting than this is no run's, and would exhaust the stack of whoever walks it."""


@dataclass
class Notes:
    """What could not be read: (file, reason) pairs, each once, the first `MAX_NOTES` in words.

    Attributes:
        root: files are named relative to it.
        num_more: how many came after the list was full.
    """

    root: Path
    entries: list[tuple[str, str]] = field(default_factory=list)
    num_more: int = 0

    def add(self, path: Path, reason: object) -> None:
        """Remember that `path` (or a part of it) is missing from the page, and why."""
        name = path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path
        entry = (str(name), str(reason))
        if entry in self.entries:
            return
        if len(self.entries) < MAX_NOTES:
            self.entries.append(entry)
        else:
            self.num_more += 1


def read_document(path: Path, notes: Notes) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none, with a note unless the file is absent."""
    text = _text(path, notes)
    if text is None:
        return {}
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        notes.add(path, "is empty" if not text.strip() else f"is not JSON: {error}")
        return {}
    if not isinstance(document, dict):
        notes.add(path, f"holds {_kind(document)} where an object of keys is expected")
        return {}
    if _is_too_deep(document):
        notes.add(path, f"is nested more than {MAX_DEPTH} levels deep")
        return {}
    return document


def read_lines(path: Path, notes: Notes) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file with one a line, as they come; a file may be of any length.

    Lines that are no JSON objects are counted and told in one note.
    """
    bad: list[int] = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                suspect = line.count("{") + line.count("[") > MAX_DEPTH
                if isinstance(record, dict) and not (suspect and _is_too_deep(record)):
                    yield record
                else:
                    bad.append(number)
    except FileNotFoundError:
        return
    except OSError as error:
        notes.add(path, f"cannot be read: {error.strerror}")
    if bad:
        first = f"line {bad[0]}" if len(bad) == 1 else f"{len(bad)} lines, the first {bad[0]},"
        verb = "is" if len(bad) == 1 else "are"
        notes.add(path, f"{first} {verb} torn or not a JSON object, and left out")


def read_commands(folder: Path, notes: Notes) -> list[dict[str, Any]]:
    """What `commands.json` (a list of objects) or `commands.log` (a line each) says was run.

    A line of the log is a JSON object or the command itself.

    Returns:
        Objects that have a 'command'; 'seconds' and 'exit' are optional.
    """
    path = folder / "commands.json"
    if path.exists():
        text = _text(path, notes) or ""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            notes.add(path, f"is not JSON: {error}")
            found = []
        found = found if isinstance(found, list) else [found]
    else:
        found = [
            _command(line) for line in (_text(folder / "commands.log", notes) or "").split("\n")
        ]
        found = [entry for entry in found if entry is not None]
    rows = [{"command": entry} if isinstance(entry, str) else entry for entry in found]
    good = [row for row in rows if isinstance(row, dict) and row.get("command")]
    if len(good) < len(rows):
        notes.add(path, f"{len(rows) - len(good)} entries have no 'command'")
    return good


def number(value: object) -> float | None:
    """A JSON value as a number; the strings 'nan', 'inf' and '-inf' count, others give None."""
    if type(value) is float:  # nearly every value of a metrics file
        return value
    if isinstance(value, int):
        try:
            return float(value)
        except OverflowError:  # an integer of more than 308 digits
            return math.inf if value > 0 else -math.inf
    if isinstance(value, str) and value.strip().lower().lstrip("+-") in ("nan", "inf", "infinity"):
        return float(value)
    return None


def finite(value: object) -> float | None:
    """A JSON value as a finite number, or None."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def mapping(value: object) -> dict[str, Any]:
    """`value` if it is an object of keys, and {} otherwise."""
    return value if isinstance(value, dict) else {}


def _command(line: str) -> Any:
    line = line.strip()
    if not line:
        return None
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return line
    return entry if isinstance(entry, dict) else line


def _text(path: Path, notes: Notes) -> str | None:
    """The file as text, or None with a note unless it simply does not exist."""
    try:
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            notes.add(path, f"is larger than {MAX_DOCUMENT_BYTES >> 20} MiB, and left out")
            return None
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        notes.add(path, f"cannot be read: {error.strerror}")
        return None


def _is_too_deep(document: object) -> bool:
    level = [document]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for node in level
            if isinstance(node, dict | list)
            for item in (node.values() if isinstance(node, dict) else node)
        ]
    return bool(level)


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
