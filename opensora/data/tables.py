"""Tables in and out of CSV and Parquet, as columns of strings or numbers.

This is the one owner of pyarrow. What a column means is not known here.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from opensora.data.packed import PackedStrings
from opensora.disk import replace_file
from opensora.errors import DataError, require

Column = PackedStrings | np.ndarray
"""Strings, or a numeric array (N,)."""

_CHUNK_ROWS = 65_536


def read_table(path: Path) -> dict[str, Column]:
    """The columns of a .csv or .parquet file by name.

    CSV is UTF-8 (a byte order mark is accepted) with commas and quotes, and its cells stay
    strings; Parquet columns that are neither strings nor numbers are left out.

    Raises:
        DataError: the file is missing, of another kind, or malformed.
        MissingPackageError: Parquet without pyarrow.
    """
    if not path.is_file():
        raise DataError(f"the table {path} does not exist")
    if path.suffix.lower() == ".csv":
        return _read_csv(path)
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path)
    raise DataError(f"{path} is neither .csv nor .parquet")


def write_table(table: dict[str, Column], path: Path) -> None:
    """Write columns to a .csv or .parquet file; the file appears whole or not at all.

    Raises:
        DataError: the suffix is another one.
        StorageError: the disk is full, read-only or failing.
    """
    if path.suffix.lower() == ".csv":
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(table)
        columns = [_cells(column) for column in table.values()]
        writer.writerows(zip(*columns, strict=True))
        replace_file(path, text.getvalue().encode("utf-8"))
    elif path.suffix.lower() == ".parquet":
        arrow = require("pyarrow", extra="parquet", purpose=f"writing {path.name}")
        parquet = require("pyarrow.parquet", extra="parquet", purpose=f"writing {path.name}")
        columns = {n: list(c) if isinstance(c, PackedStrings) else c for n, c in table.items()}
        buffer = io.BytesIO()
        parquet.write_table(arrow.table(columns), buffer)
        replace_file(path, buffer.getvalue())
    else:
        raise DataError(f"{path} is neither .csv nor .parquet")


def _cells(column: Column) -> list[str]:
    if isinstance(column, PackedStrings):
        return list(column)
    return [repr(value) if np.isfinite(value) else "" for value in column.tolist()]


def _read_csv(path: Path) -> dict[str, Column]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            names = [name.strip() for name in next(reader, [])]
            _check_header(path, names)
            parts: list[list[PackedStrings]] = [[] for _ in names]
            rows: list[list[str]] = []
            for row in reader:
                if not row:
                    continue
                if len(row) != len(names):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(row)} cells where the header has "
                        f"{len(names)}; put quotes around text that holds commas or line breaks"
                    )
                rows.append(row)
                if len(rows) == _CHUNK_ROWS:
                    _pack(rows, parts)
            _pack(rows, parts)
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text: {error}") from None
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}") from None
    return {name: PackedStrings.join(part) for name, part in zip(names, parts, strict=True)}


def _check_header(path: Path, names: list[str]) -> None:
    if not names:
        raise DataError(f"{path} is empty: its first line must name the columns")
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        raise DataError(f"{path} is not separated by commas; its first line is '{names[0]}'")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path} has the column '{twice[0]}' twice")


def _pack(rows: list[list[str]], parts: list[list[PackedStrings]]) -> None:
    for position, part in enumerate(parts):
        part.append(PackedStrings.pack(row[position] for row in rows))
    rows.clear()


def _read_parquet(path: Path) -> dict[str, Column]:
    arrow = require("pyarrow", extra="parquet", purpose=f"reading {path.name}")
    parquet = require("pyarrow.parquet", extra="parquet", purpose=f"reading {path.name}")
    try:
        table = parquet.read_table(path)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from None
    columns: dict[str, Column] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = column.type
        if arrow.types.is_string(kind) or arrow.types.is_large_string(kind):
            columns[name] = _packed(arrow, column)
        elif arrow.types.is_integer(kind) or arrow.types.is_floating(kind):
            columns[name] = column.cast(arrow.float64()).to_numpy().astype(np.float64)
    return columns


def _packed(arrow: Any, column: Any) -> PackedStrings:
    """An arrow string column of any chunking, almost without copying; null becomes ''."""
    require("pyarrow.compute", extra="parquet", purpose="reading Parquet")
    column = arrow.compute.fill_null(column.cast(arrow.large_string()), "")
    parts = []
    for chunk in column.chunks:
        _, offsets, data = chunk.buffers()
        edges = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        content = np.empty(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
        parts.append(PackedStrings(content[edges[0] : edges[-1]], edges - edges[0]))
    return PackedStrings.join(parts)
