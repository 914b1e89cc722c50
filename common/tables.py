"""Tables from files: CSV with any of `,` `;` tab, with or without a header, and Parquet."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from common.errors import DataError
from common.schema import Schema

PARQUET = (".parquet", ".pq")
DELIMITERS = ",;\t"


@dataclass(frozen=True)
class Table:
    """A file's columns, all of them, unencoded. CSV cells are text: what they mean is the schema's to say."""

    frame: pl.DataFrame
    first_line: int  # the file's line on which the first row stands; 1 for Parquet, whose rows have numbers only
    source: str


def read(path: Path, schema: Schema) -> Table:
    """Reads a table whole.

    A first line that holds every required name of the schema is a header; otherwise the file has none, and
    the schema's `columns` name what it holds.

    Raises:
        DataError: the file is missing, empty, unreadable, or its columns cannot be told.
    """
    optional = {f.name for f in schema.features if f.optional}
    required = [name for name in schema.names if name not in optional]
    if path.suffix.lower() in PARQUET:
        return Table(frame=_parquet(path), first_line=1, source=path.name)
    text = _text(path)
    delimiter = _delimiter(text)
    first = _fields(text.splitlines()[0], delimiter)
    if set(required) <= set(first):
        if len(set(first)) < len(first):
            raise DataError(f"{path.name}: line 1: column names must differ, found {', '.join(first)}")
        return Table(frame=_csv(path, text, delimiter, first, skip=1), first_line=2, source=path.name)
    if schema.columns is not None and len(first) == len(schema.columns):
        return Table(frame=_csv(path, text, delimiter, schema.columns, skip=0), first_line=1, source=path.name)
    lacking = ", ".join(name for name in required if name not in first)
    if schema.columns is None:
        raise DataError(
            f"{path.name}: the first line does not name {lacking}; a file without a header needs `columns` in "
            "the federation's schema"
        )
    raise DataError(
        f"{path.name}: the first line neither names {lacking} nor has the {len(schema.columns)} fields of the "
        f"schema's `columns` (it has {len(first)})"
    )


def read_any(path: Path) -> pl.DataFrame:
    """Reads a table that no schema describes yet; CSV must have a header. Types are inferred."""
    if path.suffix.lower() in PARQUET:
        return _parquet(path)
    text = _text(path)
    delimiter = _delimiter(text)
    header = _fields(text.splitlines()[0], delimiter)
    return _csv(path, text, delimiter, header, skip=1)


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
    """The separator that stands most often in the first line."""
    first = text.split("\n", 1)[0]
    return max(DELIMITERS, key=first.count)


def _fields(line: str, delimiter: str) -> list[str]:
    return [field.strip() for field in next(csv.reader(io.StringIO(line), delimiter=delimiter))]


def _csv(path: Path, text: str, delimiter: str, names: Sequence[str], *, skip: int) -> pl.DataFrame:
    if not text.split("\n", skip)[skip:] or not text.split("\n", skip)[skip].strip():
        return pl.DataFrame({name: [] for name in names}, schema={name: pl.String for name in names})
    try:
        return pl.read_csv(
            io.BytesIO(text.encode()),
            separator=delimiter,
            has_header=False,
            skip_rows=skip,
            schema={name: pl.String for name in names},
        )
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path.name}: not a table of {len(names)} columns separated by {delimiter!r}: {reason}"
        ) from error
