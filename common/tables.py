"""Tables from files: CSV with any of `,` `;` tab, with or without a header, and Parquet."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from common.errors import DataError
from common.schema import Schema

PARQUET = (".parquet", ".pq")
DELIMITERS = ",;\t"
SHOWN_LINES = 10


@dataclass(frozen=True)
class Table:
    """A file's columns, all of them, unencoded. CSV cells are text: what they mean is the schema's to say."""

    frame: pl.DataFrame
    first_line: int  # the file's line on which the first row stands; 1 for Parquet, whose rows have numbers only
    source: str
    names_itself: bool = True  # are the columns' names the file's own, and not the schema's?


def read(path: Path, schema: Schema) -> Table:
    """Reads a table whole.

    A first row that holds every required name of the schema is a header. Otherwise the file has none, and the
    schema's `columns` name what it holds; where they cannot, a row with some of the names is a header too.

    Raises:
        DataError: the file is missing, empty, unreadable or ragged, or its columns cannot be told.
    """
    optional = {f.name for f in schema.features if f.optional}
    required = [name for name in schema.names if name not in optional]
    if path.suffix.lower() in PARQUET:
        return Table(frame=_parquet(path), first_line=1, source=path.name)
    text = _text(path)
    delimiter = _delimiter(text)
    first, height = _first_row(path, text, delimiter)
    named = [name for name in required if name in first]
    no_header = schema.columns is not None and len(first) == len(schema.columns)
    if named == required or (named and not no_header):
        _check_header(path, first)
        body = _below(text, height)
        return Table(frame=_csv(path, body, delimiter, first, height + 1), first_line=height + 1, source=path.name)
    if no_header and schema.columns is not None:
        frame = _csv(path, text, delimiter, schema.columns, 1)
        return Table(frame=frame, first_line=1, source=path.name, names_itself=False)
    names = ", ".join(required)
    if schema.columns is None:
        raise DataError(
            f"{path.name}: the first line does not name {names}; a file without a header needs `columns` in the "
            "federation's schema"
        )
    raise DataError(
        f"{path.name}: the first line neither names {names} nor has the {len(schema.columns)} fields of the "
        f"schema's `columns` (it has {len(first)})"
    )


def read_any(path: Path) -> pl.DataFrame:
    """Reads a table that no schema describes yet; CSV must have a header."""
    if path.suffix.lower() in PARQUET:
        return _parquet(path)
    text = _text(path)
    delimiter = _delimiter(text)
    header, height = _first_row(path, text, delimiter)
    _check_header(path, header)
    return _csv(path, _below(text, height), delimiter, header, height + 1)


def _parquet(path: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path.name}: cannot be read as Parquet: {error}") from error


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name}: cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise DataError(f"{path.name}: the file is empty")
    return text


def _delimiter(text: str) -> str:
    """The separator that stands most often in the first line, outside quotes."""
    first = re.sub(r'"[^"]*"', "", text.split("\n", 1)[0])
    return max(DELIMITERS, key=first.count)


def _first_row(path: Path, text: str, delimiter: str) -> tuple[list[str], int]:
    """The first row's fields, and how many lines it takes."""
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    try:
        return [field.strip() for field in next(reader)], reader.line_num
    except csv.Error as error:
        raise DataError(f"{path.name}: line 1: {error}; is there a quote that is not closed?") from error


def _check_header(path: Path, header: Sequence[str]) -> None:
    if len(set(header)) < len(header):
        raise DataError(f"{path.name}: line 1: column names must differ, found {', '.join(header)}")


def _below(text: str, height: int) -> str:
    """The text without its first lines."""
    return "".join(text.split("\n", height)[height:])


def _csv(path: Path, body: str, delimiter: str, names: Sequence[str], first_line: int) -> pl.DataFrame:
    """The rows of `body`, whose first line is line `first_line` of the file."""
    body = body.rstrip("\n")
    schema = {name: pl.String for name in names}
    if not body:
        return pl.DataFrame({name: [] for name in names}, schema=schema)
    try:
        # polars would fill a short row with empty cells.
        if ragged := _ragged(body, delimiter, len(names), first_line):
            shown = ", ".join(f"line {line} has {width}" for line, width in ragged[:SHOWN_LINES])
            more = f", and {len(ragged) - SHOWN_LINES} more" if len(ragged) > SHOWN_LINES else ""
            raise DataError(f"{path.name}: every line must have {len(names)} fields; {shown}{more}")
        return pl.read_csv(io.BytesIO(body.encode()), separator=delimiter, has_header=False, schema=schema)
    except (csv.Error, pl.exceptions.PolarsError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path.name}: not a table of {len(names)} columns separated by {delimiter!r}: {reason}"
        ) from error


def _ragged(body: str, delimiter: str, width: int, first_line: int) -> list[tuple[int, int]]:
    """Rows that do not have `width` fields: their lines, and how many fields they have."""
    if '"' not in body:
        widths = (row.count(delimiter) + 1 if row else 0 for row in body.split("\n"))
        return [(line, found) for line, found in enumerate(widths, first_line) if found != width]
    rows = csv.reader(io.StringIO(body), delimiter=delimiter, strict=True)
    try:
        return [(first_line + rows.line_num - 1, len(row)) for row in rows if len(row) != width]
    except csv.Error as error:
        raise csv.Error(f"line {first_line + rows.line_num - 1}: {error}") from error
