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

from client.account.entries import BY_ID
from client.row_hash import Digests, RowHash, positions
from client.training.row_draws import RowIds, row_ids
from common.data import tables
from common.data.cells import Cells, Mask, holds_cells
from common.data.encoding import SHOWN_COLUMNS, encode_table
from common.data.encoding_report import EncodingReport
from common.data.tables import AS_IT_SEEMS, FileFormat, Table
from common.document.schema import Schema
from common.errors import ConfigError, DataError

DEAL = "cells 2"  # the rule by which rows are dealt: another one may deal a row to the other part
MOVED_ROWS = 1 << 12  # at a time


@dataclass(frozen=True)
class Rows:
    """Encoded rows. `digests` is a keyed hash of each row's cells (client/row_hash.py), whatever the schema. `columns`
    are the table's names and types, on which it depends (the number 1 is no text). `people` is such a hash of whom each
    row is about, if the owner named the column that says so; `columns` is then that one, with its place."""

    x: NDArray[np.float32]  # [rows, inputs]
    y: NDArray[np.int64] | NDArray[np.float32]  # [rows]
    digests: Digests
    columns: tuple[str, ...]
    report: EncodingReport
    people: Digests | None = None
    group: NDArray[np.int64] | None = None  # [rows], where the schema declares a group's column

    def take(self, index: NDArray[np.int64]) -> Rows:
        """The rows at `index`, in its order. The report stays that of the whole table."""
        people = None if self.people is None else self.people[index]
        group = None if self.group is None else self.group[index]
        return replace(self, x=self.x[index], y=self.y[index], digests=self.digests[index], people=people, group=group)


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
    validation_group: Tensor | None = None  # int64 [rows], where the schema declares a group's column

    @property
    def rows(self) -> int:
        """How many there are to train on."""
        return len(self.y)

    @property
    def validation_rows(self) -> int:
        return len(self.validation_y)


def read(
    path: Path,
    schema: Schema,
    *,
    key: bytes,
    form: FileFormat = AS_IT_SEEMS,
    leave_out: bool = False,
    person: str | None = None,
) -> Rows:
    """Reads and encodes a file; arguments as for `encode_rows`.

    Raises:
        DataError: the table does not fit the schema.
        ConfigError: `person` is none of the file's own columns, whatever the schema.
    """
    table = tables.read(path, schema, form)
    if person is not None and table.names_itself and person not in table.types:
        shown = ", ".join(table.columns[:SHOWN_COLUMNS])
        raise ConfigError([f"data.id: {path.name} has no column {person}; it has {shown}"])
    return encode_rows(table, schema, key=key, leave_out=leave_out, person=person)


def encode_rows(
    table: Table | pl.DataFrame,
    schema: Schema,
    *,
    key: bytes,
    leave_out: bool = False,
    person: str | None = None,
) -> Rows:
    """Encodes a table, or one that is in memory.

    Args:
        key: the owner's secret for the split, at most 64 bytes.
        leave_out: leave out the rows that do not fit.
        person: the column that says whom a row is about; all rows of one will be in one part. Rows in which it is empty
            count as one person's.

    Raises:
        DataError: the table does not fit the schema, or lacks that column.
    """
    table = tables.of_frame(table) if isinstance(table, pl.DataFrame) else table
    if person is not None and not holds_cells(table.types.get(person, pl.Object())):
        shown = ", ".join(table.columns[:SHOWN_COLUMNS])
        raise DataError(f"{table.source}: the table lacks the column {person}, which data.id names; it has {shown}")
    row_hash = RowHash(key)
    digests: list[Digests] = []
    people: list[Digests] = []
    nobody = 0

    def look(kept: pl.DataFrame) -> None:
        nonlocal nobody
        digests.append(row_hash(kept))
        if person is not None:
            people.append(row_hash(kept.select(person)))
            nobody += int(Cells(kept[person]).empty().sum())

    encoded = encode_table(table, schema, leave_out=leave_out, look=look)
    encoded.report.nobody = nobody
    return Rows(
        x=encoded.x,
        y=encoded.y,
        digests=np.concatenate(digests),
        columns=_columns(table, person),
        report=encoded.report,
        people=None if person is None else np.concatenate(people),
        group=encoded.group,
    )


def _columns(table: Table, person: str | None) -> tuple[str, ...]:
    """The columns by which rows are dealt. A file without a header has the names that the document gives, so a name
    alone does not say which column it is."""
    if person is None:
        return tuple(f"{name} {dtype}" for name, dtype in table.types.items())
    return (f"{table.columns.index(person)} {person} {table.types[person]}",)


def split(
    rows: Rows,
    schema: Schema,
    *,
    key: bytes,
    device: torch.device,
    use_up: bool = False,
) -> Dataset:
    """Deals each row to train or validation by its digest and by which copy it is of the rows with that digest, or by
    whom it is about.

    Args:
        use_up: the rows are not needed any more, and their memory may become that of the training part.

    Adding or removing a row changes one part by that row, and the other not at all. Proof: let a table have m copies
    of a row. They are in the parts of (digest, 0) to (digest, m - 1), each of which follows from the key alone; which
    of them is in which does not matter, as they are equal. One copy more is in the part of (digest, m), and all others
    stay where they are, as do all rows with other digests. What private training computes of a part does not depend on
    the order of its rows: sums are exact, each row is drawn by itself, and dropout goes by the digest and by which copy
    it is within the part. Rows that differ have equal digests with probability 2^-64 a pair. Dealt by whom they are
    about, rows of one person are where the key says, however many they are, and all others stay where they are.
    """
    validation = in_validation(rows.digests, rows.people, schema, key=key)
    # Before rows are moved.
    ids, content = row_ids(rows.digests[~validation]), content_name(rows.digests)
    validation_x, validation_y = rows.x[validation], rows.y[validation]
    x, y = _moved_up(rows.x, ~validation) if use_up else rows.x[~validation], rows.y[~validation]

    def tensor(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(device)

    return Dataset(
        x=tensor(x),
        y=tensor(y),
        ids=ids,
        validation_x=tensor(validation_x),
        validation_y=tensor(validation_y),
        content=content,
        split=split_name(rows, schema, key=key),
        report=rows.report,
        validation_group=None if rows.group is None else tensor(rows.group[validation]),
    )


def in_validation(digests: Digests, people: Digests | None, schema: Schema, *, key: bytes) -> Mask:
    """Which rows of a table are dealt to the validation part (`split`)."""
    ids = row_ids(digests) if people is None else np.stack([people, np.zeros_like(people)], axis=1)
    return positions(ids, key) < schema.validation_fraction


def content_name(digests: Digests) -> str:
    """`Dataset.content` of rows with these digests."""
    return hashlib.sha256(digests.tobytes()).hexdigest()


def split_name(rows: Rows, schema: Schema, *, key: bytes) -> str:
    """`Dataset.split` of these rows, or of some of them."""
    how = "\x1f".join([DEAL, hashlib.sha256(key).hexdigest(), repr(schema.validation_fraction), *rows.columns])
    return ("" if rows.people is None else BY_ID) + hashlib.sha256(how.encode()).hexdigest()[:16]


def _moved_up(array: NDArray[np.float32], where: Mask) -> NDArray[np.float32]:
    """The rows at `where`, in the memory of all: a table may be half of what there is."""
    index = np.flatnonzero(where)
    for start in range(0, len(index), MOVED_ROWS):
        some = index[start : start + MOVED_ROWS]
        array[start : start + len(some)] = array[some]
    return array[: len(index)]
