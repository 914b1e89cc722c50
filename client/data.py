"""A participant's table as training and validation tensors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.dropout import RowIds, row_ids
from client.entries import BY_ID
from common import tables
from common.encoding import SHOWN_COLUMNS, EncodingReport, encode
from common.errors import ConfigError, DataError
from common.schema import Schema


@dataclass(frozen=True)
class Rows:
    """Encoded rows. `digests` is a keyed hash of each row's cells as text, uint64 [rows]. `columns` are the
    table's names and types, on which that text depends (the number 1 is `1` or `1.0`). `people` is such a hash of
    whom each row is about, if the owner named the column that says so; `columns` is then that one, with its place."""

    x: NDArray[np.float32]  # [rows, inputs]
    y: NDArray[np.int64] | NDArray[np.float32]  # [rows]
    digests: NDArray[np.uint64]
    columns: tuple[str, ...]
    report: EncodingReport
    people: NDArray[np.uint64] | None = None

    def take(self, index: NDArray[np.int64]) -> Rows:
        """The rows at `index`, in its order. The report stays that of the whole table."""
        people = None if self.people is None else self.people[index]
        return replace(self, x=self.x[index], y=self.y[index], digests=self.digests[index], people=people)


@dataclass(frozen=True)
class Dataset:
    """The two disjoint parts, as tensors on a device.

    `content` is a fingerprint of the table, its rows in their order; `split` of how rows were dealt to the parts.
    Where it is equal for two tables, rows with the same cells are in the same part of both, or (if it is by an
    identifier) those of one person. By cells, a row in which one was changed is another, and may be in the other part.
    """

    x: Tensor  # float32 [train rows, inputs]
    y: Tensor
    ids: RowIds  # of the training rows, for dropout
    validation_x: Tensor
    validation_y: Tensor
    content: str
    split: str
    report: EncodingReport


def read(path: Path, schema: Schema, *, key: bytes, leave_out: bool = False, person: str | None = None) -> Rows:
    """Reads and encodes a file; arguments as for `encode_rows`.

    Raises:
        DataError: the table does not fit the schema.
        ConfigError: `person` is none of the file's own columns, whatever the schema.
    """
    table = tables.read(path, schema)
    if person is not None and table.names_itself and person not in table.frame.columns:
        shown = ", ".join(table.frame.columns[:SHOWN_COLUMNS])
        raise ConfigError([f"data.id: {path.name} has no column {person}; it has {shown}"])
    return encode_rows(
        table.frame,
        schema,
        key=key,
        first_line=table.first_line,
        source=table.source,
        leave_out=leave_out,
        person=person,
    )


def encode_rows(
    frame: pl.DataFrame,
    schema: Schema,
    *,
    key: bytes,
    first_line: int = 1,
    source: str = "table",
    leave_out: bool = False,
    person: str | None = None,
) -> Rows:
    """Encodes a table that is in memory.

    Args:
        key: the owner's secret for the split, at most 64 bytes.
        leave_out: leave out the rows that do not fit.
        person: the column that says whom a row is about; all rows of one will be in one part. Rows in which it is empty
            count as one person's.

    Raises:
        DataError: the table does not fit the schema, or lacks that column.
    """
    if person is not None and person not in frame.columns:
        shown = ", ".join(frame.columns[:SHOWN_COLUMNS])
        raise DataError(f"{source}: the table lacks the column {person}, which data.id names; it has {shown}")
    encoded = encode(frame, schema, first_line=first_line, source=source, leave_out=leave_out)
    text = pl.DataFrame([_as_text(column, source) for column in frame.iter_columns()])
    text = text[encoded.kept] if len(encoded.kept) < frame.height else text
    if person is not None:
        encoded.report.nobody = int((text[person] == "").sum())
    return Rows(
        x=encoded.x,
        y=encoded.y,
        digests=_digests(text, key),
        columns=_columns(frame, person),
        report=encoded.report,
        people=None if person is None else _digests(text.select(person), key),
    )


def _columns(frame: pl.DataFrame, person: str | None) -> tuple[str, ...]:
    """The columns by which rows are dealt. A file without a header has the names that the document gives, so a name
    alone does not say which column it is."""
    if person is None:
        return tuple(f"{name} {dtype}" for name, dtype in frame.schema.items())
    return (f"{frame.columns.index(person)} {person} {frame.schema[person]}",)


def _digests(text: pl.DataFrame, key: bytes) -> NDArray[np.uint64]:
    """Of each row."""
    digests = [hashlib.blake2b("\x1f".join(row).encode(), digest_size=8, key=key).digest() for row in text.rows()]
    return np.frombuffer(b"".join(digests), np.uint64)


def _as_text(column: pl.Series, source: str) -> pl.Series:
    try:
        return column.cast(pl.String, strict=False).str.strip_chars().fill_null("")
    except pl.exceptions.PolarsError:
        raise DataError(
            f"{source}: column {column.name} is of type {column.dtype}, which cannot be read as text; leave it out of "
            "the table"
        ) from None


def split(rows: Rows, schema: Schema, *, key: bytes, device: torch.device, may_be_empty: bool = False) -> Dataset:
    """Deals each row to train or validation by its digest alone, or by that of whom it is about.

    So neither the order nor the presence of other rows moves a row, and adding or removing a row changes one
    part only. Equal rows go the same way, and all rows of one person.

    Raises:
        DataError: no rows are left to train on, unless the part `may_be_empty`.
    """
    dealt_by = rows.digests if rows.people is None else rows.people
    position = dealt_by.astype(np.float64) / 2.0**64
    validation = position < schema.validation_fraction
    if validation.all() and not may_be_empty:
        raise DataError(f"all {len(rows.y)} rows fell into the validation part; the table is too small to train on")

    def tensor(array: NDArray[np.generic], where: NDArray[np.bool_]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array[where])).to(device)

    how = "\x1f".join([hashlib.sha256(key).hexdigest(), repr(schema.validation_fraction), *rows.columns])
    return Dataset(
        x=tensor(rows.x, ~validation),
        y=tensor(rows.y, ~validation),
        ids=row_ids(rows.digests[~validation]),
        validation_x=tensor(rows.x, validation),
        validation_y=tensor(rows.y, validation),
        content=hashlib.sha256(rows.digests.tobytes()).hexdigest(),
        split=("" if rows.people is None else BY_ID) + hashlib.sha256(how.encode()).hexdigest()[:16],
        report=rows.report,
    )
