"""`samples.jsonl`: a line for each video of a folder, on how it was drawn.

Lines are appended, and one may be torn by a crash: its video is then drawn again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from opensora.errors import DataError, UsageError
from opensora.infer.jobs import Job

RECORD_NAME = "samples.jsonl"
Records = dict[int, dict[str, Any]]
"""Index -> line."""


def read_records(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a folder of samples, in the order of their index.

    Raises:
        DataError: the folder has none.
    """
    # A video that was lost has been drawn again; its last record counts.
    records = {record["index"]: record for record in lines(Path(folder) / RECORD_NAME)}
    if not records:
        raise DataError(f"{folder} holds no samples: {RECORD_NAME} is missing or empty")
    return [records[index] for index in sorted(records)]


def finished(folder: Path, settings: dict[str, Any], work: Sequence[Job], suffix: str) -> Records:
    """The records of the videos of `work` that are there already.

    Raises:
        UsageError: some were drawn with other settings, or of another prompt or seed.
    """
    wanted, done = {job.index: job for job in work}, {}
    for record in lines(folder / RECORD_NAME):
        differing = [key for key, value in settings.items() if record.get(key) != value]
        if Path(record["file"]).suffix != suffix:
            differing.append("format")
        job = wanted.get(record["index"])
        if job is not None and any(record.get(key) != value for key, value in job.record.items()):
            differing.append("prompt or seed, or given frames")
        if differing:
            raise UsageError(
                f"{folder} holds samples drawn differently ({', '.join(differing)}): choose "
                "another folder, or remove it"
            )
        if job is not None and (folder / record["file"]).is_file():
            done[record["index"]] = record
    return done


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Records; a line may be torn by a crash, and its video is then drawn again."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(json.JSONDecodeError):
            yield {"tiled": False, **json.loads(line)}  # older records do not say


def append(path: Path, record: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as log:
        log.write(json.dumps(record, ensure_ascii=False) + "\n")


def mend(path: Path) -> None:
    """End a line that was torn, so that the next record does not become part of it."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with open(path, "ab") as log:
            log.write(b"\n")
