"""Table columns to model inputs, by declaration alone.

Nothing here looks at the data to decide how to encode it: bounds, categories and classes are declared, so
encoding costs no privacy and is the same at every site.

The encoding, once and for all (one row of the table is one row of the arrays, all float32):
    numeric      the value, clamped to its bounds and scaled to [-1, 1]; in a column that may be missing a second
                 input that is 1 where it is (the value then counts as 0, the middle)
    categorical  one input a category and one for any other value; all 0 where it is missing
    classes      the target's class index, int64
    numeric target  scaled to [0, 1] by its bounds, clamped, float32
    several targets  both side by side, float32; NaN where a row has none
    group        the index of the row's group, int64, for evaluations; the last if it is in none of those listed
What a cell means is in cells.py. A column may be missing if it declares `missing` markers, is `optional`, or
says `unfit: missing`; its empty cells are missing too. In any other column an empty cell is a mistake. A column's
`unfit` says what becomes of a cell that is no number, or none of the categories: it is missing, or other, or a mistake.
Each is a rule for one row by itself, so a table is encoded block by block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import polars as pl
from numpy.typing import NDArray

from common.data import tables
from common.data.cells import Cells, Mask, could_be, holds_cells
from common.data.encoding_report import EncodingReport
from common.data.tables import Block, Table
from common.document.group import Group
from common.document.schema import Bounds, Categorical, Classes, Numeric, NumericTarget, Schema
from common.document.values import Scalar, may_be_number, spelled
from common.errors import DataError

Targets = NDArray[np.int64] | NDArray[np.float32]

DECIMAL_COMMA = re.compile(r"[-+]?[0-9]*,[0-9]+")
SHOWN_CELLS = 10
SHOWN_COLUMNS = 30


@dataclass(frozen=True)
class Encoded:
    """`x`: float32 [rows, inputs]. `y`: int64 class indices [rows], or float32 [rows] in [0, 1]; of several targets
    float32 [rows, targets], with NaN for one that is missing. `kept`: which of the
    table's rows these are. `group`: int64 [rows], where the schema declares a group's column."""

    x: NDArray[np.float32]
    y: Targets
    report: EncodingReport
    kept: NDArray[np.int64]
    group: NDArray[np.int64] | None = None


def encode(
    frame: pl.DataFrame,
    schema: Schema,
    *,
    first_line: int = 1,
    source: str = "table",
    leave_out: bool = False,
) -> Encoded:
    """Encodes a table that is in memory; for the rest see `encode_table`.

    Args:
        first_line: the file's line of the first row, so that errors can name lines.
    """
    return encode_table(tables.of_frame(frame, first_line=first_line, source=source), schema, leave_out=leave_out)


def encode_table(
    table: Table,
    schema: Schema,
    *,
    leave_out: bool = False,
    look: Callable[[pl.DataFrame], None] = lambda kept: None,
) -> Encoded:
    """A table to arrays. Columns that the schema does not name are ignored.

    Args:
        leave_out: rows with a cell that does not fit are left out, and reported, and no rows are no error: whether a
            table is taken then says nothing about any row.
        look: is given the rows that are kept, block by block, with all their columns.

    Raises:
        DataError: absent columns, and without `leave_out` no rows, or cells that do not fit; the first ten are quoted.
    """
    _check_columns(table, schema, schema.names)
    coder = _Coder(table, schema)
    x = np.empty((table.most_rows, schema.inputs), np.float32)
    y = _room_for_targets(table.most_rows, schema)
    kept: list[NDArray[np.int64]] = []
    groups: list[NDArray[np.int64]] = []
    rows = 0
    for block in table.blocks():
        if rows + block.frame.height > table.most_rows:
            raise DataError(f"{table.source}: the file grew while it was read; start again")
        fits = coder.encode(block, x[rows : rows + block.frame.height], y[rows : rows + block.frame.height])
        index = np.flatnonzero(fits)
        if len(index) < len(fits):
            x[rows : rows + len(index)] = x[rows + index]
            y[rows : rows + len(index)] = y[rows + index]
        look(block.frame if len(index) == len(fits) else block.frame[index])
        if schema.group is not None:
            found = _groups(block, table, schema, schema.group)[index]
            coder.report.in_no_group += int((found == len(schema.groups) - 1).sum())
            groups.append(found)
        kept.append(coder.report.rows - block.frame.height + index)
        rows += len(index)
    if coder.report.rows == 0 and not leave_out:
        raise DataError(f"{table.source}: the table has no rows")
    coder.end(leave_out=leave_out)
    return Encoded(
        x=x[:rows],
        y=y[:rows],
        report=coder.report,
        kept=np.concatenate(kept),
        group=np.concatenate(groups) if groups else None,
    )


def _room_for_targets(rows: int, schema: Schema) -> Targets:
    if schema.also:
        return np.zeros((rows, len(schema.targets)), np.float32)
    return np.zeros(rows, np.int64) if isinstance(schema.target, Classes) else np.zeros(rows, np.float32)


def _groups(block: Block, table: Table, schema: Schema, group: Group) -> NDArray[np.int64]:
    """The index of each row's group."""
    last = len(group.labels) - 1
    if group.name not in table.types:  # an optional feature
        return np.full(block.frame.height, last, np.int64)
    return group_of(Cells(block.frame[group.name], table.decimals), schema, group)


def group_of(cells: Cells, schema: Schema, group: Group) -> NDArray[np.int64]:
    """The index of the group of each cell in the column of groups. What the schema calls missing is in none of them,
    but for a value that is listed as a group's."""
    listed = [value for values in (group.groups or {}).values() for value in values]
    feature = next((feature for feature in schema.features if feature.name == group.name), None)
    last = len(group.labels) - 1
    if group.cuts is not None:
        empty = cells.empty() if feature is None else missing_of(cells, feature)
        part = np.searchsorted(group.cuts, cells.number, "right")
        return np.where(np.isfinite(cells.number) & ~empty, part, last).astype(np.int64)
    found = np.full(len(cells.text), last, np.int64)
    empty = cells.empty(listed)
    for i, values in enumerate((group.groups or {}).values()):
        for value in values:
            found[cells.means(value) & ~empty] = i
    return found


class RowEncoder:
    """Encodes a table block by block, for whoever uses a model: what comes of it need not fit into memory."""

    def __init__(self, table: Table, schema: Schema, *, with_target: bool) -> None:
        """Raises `DataError` where columns are absent; that of the target need not be there without `with_target`."""
        targets = tuple(target.name for target in schema.targets) if with_target else ()
        named = (*schema.feature_names, *targets)
        _check_columns(table, schema, named)
        self._table, self._schema, self._with_target = table, schema, with_target
        self._coder = _Coder(table, schema, with_target=with_target)

    @property
    def report(self) -> EncodingReport:
        """What it has met so far."""
        return self._coder.report

    @property
    def unfit(self) -> int:
        """How many cells did not fit so far. A row that lacks its target, where it may, is left out and no mistake."""
        return self._coder.unfit

    def blocks(self) -> Iterator[EncodedBlock]:
        """All rows, those that do not fit among them."""
        for block in self._table.blocks():
            rows = block.frame.height
            x = np.zeros((rows, self._schema.inputs), np.float32)
            y = _room_for_targets(rows, self._schema) if self._with_target else None
            fits = self._coder.encode(block, x, y)
            yield EncodedBlock(self._table, block, x, y, fits)

    def end(self, *, leave_out: bool) -> None:
        """After the last block. Raises `DataError` if cells did not fit, or (`leave_out`) reports them."""
        self._coder.end(leave_out=leave_out)


@dataclass(frozen=True)
class EncodedBlock:
    """Some rows of a table, as they stand there and encoded. What `x` and `y` hold of a row that does not fit means
    nothing."""

    table: Table
    block: Block
    x: NDArray[np.float32]  # [rows, inputs]
    y: Targets | None  # [rows]; None where the target was not asked for
    fits: Mask  # [rows]


def _check_columns(table: Table, schema: Schema, wanted: Sequence[str]) -> None:
    for name in wanted:
        if name in table.types and not holds_cells(dtype := table.types[name]):
            raise DataError(f"{table.source}: column {name} holds {dtype}, not text, numbers or truth values")
    optional = schema.optional
    absent = [name for name in wanted if name not in optional and name not in table.types]
    if not absent:
        return
    spare = [name for name in table.columns if name and name not in wanted]
    near = {name: nearest(name, spare) for name in absent}
    said = ", ".join(f"{name} (did you mean {near[name]}?)" if near[name] else name for name in absent)
    raise DataError(f"{table.source}: the table lacks {said}; it has {', '.join(table.columns[:SHOWN_COLUMNS])}")


def check_column(table: Table, name: str, *, asked: str) -> None:
    """Raises `DataError`, saying how the column was `asked` for, unless the table has it, and in it cells."""
    if name not in table.types:
        near = nearest(name, table.columns)
        hint = f" (did you mean {near}?)" if near else ""
        raise DataError(f"{table.source}: {asked}: the table has no column {name}{hint}")
    if not holds_cells(table.types[name]):
        raise DataError(f"{table.source}: {asked}: the column holds {table.types[name]}, not text or numbers")


def nearest(name: str, others: list[str]) -> str:
    """The one of the others that is most like a name, in any case; "" if none is."""
    by_lower = {other.casefold(): other for other in reversed(others)}
    found = get_close_matches(name.casefold(), by_lower, n=1)
    return by_lower[found[0]] if found else ""


def check_values(table: Table, schema: Schema) -> None:
    """Checks what the schema lists for columns that have a type, such as text for a column of numbers.

    One value that cannot be there is no mistake, since another table may spell it so; none that can is.

    Raises:
        DataError: a column of which no category can be there, or a class or group of which no value can.
    """
    wrong = []
    for feature in schema.features:
        if isinstance(feature, Categorical) and not _can_be_in(table, feature.name, feature.categories):
            wrong.append(_never(table, feature.name, "category", feature.categories))
    for target in schema.targets:
        for label, values in target.classes.items() if isinstance(target, Classes) else ():
            if not _can_be_in(table, target.name, values):
                wrong.append(_never(table, target.name, f"value of class {label}", values))
    if (group := schema.group) is not None:
        for label, values in (group.groups or {}).items():
            if not _can_be_in(table, group.name, values):
                wrong.append(_never(table, group.name, f"value of group {label}", values))
    if wrong:
        raise DataError(f"{table.source}: {'; '.join(wrong)}")


def _can_be_in(table: Table, name: str, values: Iterable[Scalar]) -> bool:
    dtype = table.types.get(name)
    return dtype is None or any(could_be(value, dtype) for value in values)


def _never(table: Table, name: str, what: str, values: Iterable[Scalar]) -> str:
    listed = ", ".join(map(spelled, values))
    return f"column {name} holds {table.types[name]}, so no {what} can be in it (the schema lists {listed})"


class _Unfit:
    """The cells that do not fit: how many, and the first of them in the order of the file."""

    def __init__(self) -> None:
        self.cells = 0
        self.shown: list[str] = []
        self._met: list[tuple[int, str]] = []  # of the block in hand: row and sentence

    def begin(self, block: Block) -> Mask:
        self._block = block
        self.fits: Mask = np.ones(block.frame.height, np.bool_)
        return self.fits

    def note(self, where: Mask, sentence: Callable[[int], str]) -> None:
        rows = np.flatnonzero(where)
        self.cells += len(rows)
        self.fits[rows] = False
        self._met += [(int(row), sentence(int(row))) for row in rows[:SHOWN_CELLS]]

    def end(self) -> None:
        self._met.sort(key=lambda met: met[0])
        room = SHOWN_CELLS - len(self.shown)
        self.shown += [f"line {self._block.lines[row]}: {what}" for row, what in self._met[:room]]
        self._met = []

    def lines(self) -> list[str]:
        more = self.cells - len(self.shown)
        return [*self.shown, f"and {more} more"] if more else self.shown


class _Coder:
    """Encodes the blocks of one table, and keeps the report."""

    def __init__(self, table: Table, schema: Schema, *, with_target: bool = True) -> None:
        self._table, self._schema = table, schema
        self._kept = 0
        self._unfit = _Unfit()
        self._places = places(schema)
        self._usual = _Usual(table, self._places)
        self.report = EncodingReport()
        targets = schema.targets if with_target else ()
        self.report.absent = [column.name for column in (*schema.features, *targets) if column.name not in table.types]
        if with_target and schema.also:
            self.report.targets_missing = tuple(t.name for t in schema.targets if t.may_be_missing)
        if with_target and isinstance(schema.target, Classes):
            self.report.classes = dict.fromkeys(schema.target.classes, 0)

    @property
    def unfit(self) -> int:
        return self._unfit.cells

    def encode(self, block: Block, x: NDArray[np.float32], y: Targets | None) -> Mask:
        """Fills `x`, and `y` unless it is None, with the block's rows. Returns which of them fit."""
        self._unfit.begin(block)
        self.report.rows += block.frame.height
        done = self._usual.encode(block, x, self.report.clamped)
        for feature, at in self._places:
            if feature.name in done:
                continue
            place = x[:, at : at + feature.inputs]
            if feature.name not in self._table.types:
                place[:] = 0
                place[:, 1:] = isinstance(feature, Numeric)
            elif isinstance(feature, Numeric):
                self._numeric(self._cells(block, feature.name), feature, place)
            else:
                self._categorical(self._cells(block, feature.name), feature, place)
        for i, target in enumerate(self._schema.targets if y is not None else ()):
            assert y is not None
            its = y if y.ndim == 1 else y[:, i]
            if target.name not in self._table.types:
                its[:] = np.nan
            else:
                self._target(self._cells(block, target.name), target, its)
        self._unfit.end()
        self._kept += int(np.count_nonzero(self._unfit.fits))
        return self._unfit.fits

    def end(self, *, leave_out: bool) -> None:
        """Raises `DataError` if cells did not fit, or reports the rows that are left out."""
        if not self._unfit.cells:
            return
        shown = self._unfit.lines()
        if not leave_out:
            cells_word = "cell does" if self._unfit.cells == 1 else "cells do"
            listed = "".join(f"\n  {line}" for line in shown)
            raise DataError(f"{self._table.source}: {self._unfit.cells} {cells_word} not fit the schema:{listed}")
        self.report.left_out, self.report.unfit = self.report.rows - self._kept, shown

    def _cells(self, block: Block, name: str) -> Cells:
        return Cells(block.frame[name], self._table.decimals)

    def _numeric(self, cells: Cells, feature: Numeric, place: NDArray[np.float32]) -> None:
        missing = self._missing(cells, feature)
        unread = ~missing & ~np.isfinite(cells.number)
        if feature.unfit == "missing":
            missing = self._unfit_missing(feature, missing, unread)
        else:
            self._left_out(cells, feature.name, "a number", unread)
        position = _scaled(cells, feature.name, feature.bounds, missing | unread, self.report.clamped)
        place[:, 0] = np.where(missing, 0.0, 2 * position - 1)
        place[:, 1:] = missing[:, None]

    def _categorical(self, cells: Cells, feature: Categorical, place: NDArray[np.float32]) -> None:
        missing = self._missing(cells, feature)
        other = ~missing
        for i, category in enumerate(feature.categories):
            hot = cells.means(category) & other  # of two that a cell could mean, the first
            place[:, i] = hot
            other &= ~hot
        if feature.unfit == "missing":
            self._unfit_missing(feature, missing, other)
            other = np.zeros_like(other)
        elif feature.unfit == "left_out":
            known = ", ".join(spelled(category) for category in feature.categories)
            self._left_out(cells, feature.name, f"one of {known}", other)
        else:
            _count(self.report.other, feature.name, other)
        place[:, -1] = other

    def _target(self, cells: Cells, target: Classes | NumericTarget, y: Targets) -> None:
        values = [v for some in target.classes.values() for v in some] if isinstance(target, Classes) else []
        empty = cells.empty((*target.missing, *values))
        for marker in target.missing:
            empty = empty | cells.means(marker)
        if target.may_be_missing:
            _count(self.report.missing, target.name, empty)
            if not self._schema.also:
                self._unfit.fits[empty] = False  # it is left out, and no mistake
        else:
            self._unfit.note(empty, lambda row: f"{target.name}: the target is empty")
        if isinstance(target, NumericTarget):
            unread = ~empty & ~np.isfinite(cells.number)
            self._left_out(cells, target.name, "a number", unread)
            clamped: dict[str, int] = {}
            y[:] = _scaled(cells, target.name, target.bounds, empty | unread, clamped)
            y[empty] = np.nan
            self.report.targets_clamped += clamped.get(target.name, 0)
            return
        y[:] = -1
        for i, (label, some) in enumerate(target.classes.items()):
            for value in some:
                y[cells.means(value) & (y < 0) & ~empty] = i
            if target is self._schema.target:
                self.report.classes[label] += int((y == i).sum())
        known = ", ".join(map(spelled, values))
        self._unfit.note(
            (y < 0) & ~empty,
            lambda row: f"{target.name}: unknown class {cells.text[row]!r}; the schema knows {known}",
        )
        if self._schema.also:
            y[empty] = np.nan

    def _missing(self, cells: Cells, feature: Numeric | Categorical) -> Mask:
        missing = missing_of(cells, feature)
        if feature.may_be_missing:
            _count(self.report.missing, feature.name, missing)
        else:
            why = f"{feature.name}: is empty, and the schema gives this column no `missing` marker"
            self._unfit.note(missing, lambda row: why)
        return missing

    def _unfit_missing(self, feature: Numeric | Categorical, missing: Mask, unfit: Mask) -> Mask:
        """What is missing when what does not fit is."""
        _count(self.report.unfit_missing, feature.name, unfit)
        _count(self.report.missing, feature.name, unfit)
        return missing | unfit

    def _left_out(self, cells: Cells, name: str, expected: str, where: Mask) -> None:
        def sentence(row: int) -> str:
            cell = cells.text[row]
            comma = expected == "a number" and DECIMAL_COMMA.fullmatch(cell)
            hint = '; is that a decimal comma? `decimal: ","` below `data:`, or --decimal, says so' if comma else ""
            return f"{name}: expected {expected}, found {cell!r}{hint}"

        self._unfit.note(where, sentence)


def missing_of(cells: Cells, feature: Numeric | Categorical) -> Mask:
    """Where a feature's cells are missing: empty, or one of its markers. A text that the schema lists is neither."""
    listed = feature.categories if isinstance(feature, Categorical) else ()
    missing = cells.empty((*feature.missing, *listed))
    for marker in feature.missing:
        missing = missing | cells.means(marker)
    return missing


def places(schema: Schema) -> list[tuple[Numeric | Categorical, int]]:
    """The features, and where their inputs begin."""
    ends = np.cumsum([feature.inputs for feature in schema.features])
    return [(f, int(end) - f.inputs) for f, end in zip(schema.features, ends, strict=True)]


class _Usual:
    """Columns of numbers in which every cell is one, encoded together: most tables have little else."""

    def __init__(self, table: Table, places: list[tuple[Numeric | Categorical, int]]) -> None:
        unusual = table.decimals.declared and table.decimals.mark == ","  # 1.234 is 1234 then
        features = [
            (feature, at)
            for feature, at in places
            if isinstance(feature, Numeric)
            and feature.name in table.types
            and could_be(0, table.types[feature.name])
            and not unusual
            and not any(may_be_number(marker) for marker in feature.missing)
        ]
        self._names = [feature.name for feature, _ in features]
        self._at = np.array([at for _, at in features], np.int64)
        self._flags = np.array([at + 1 for feature, at in features if feature.inputs > 1], np.int64)
        self._low, self._high = (np.array([feature.bounds[i] for feature, _ in features]) for i in (0, 1))

    def encode(self, block: Block, x: NDArray[np.float32], clamped: dict[str, int]) -> set[str]:
        """Fills what it can of `x`. Returns the columns that it could."""
        if not self._names:
            return set()
        numbers = block.frame.select(pl.col(self._names).cast(pl.Float64, strict=False).fill_null(np.nan))
        value = numbers.to_numpy(order="fortran")
        good = np.isfinite(value).all(axis=0)
        for j in np.flatnonzero(((value < self._low) | (value > self._high)).any(axis=0) & good):
            _count(clamped, self._names[j], (value[:, j] < self._low[j]) | (value[:, j] > self._high[j]))
        position = (np.clip(value, self._low, self._high) - self._low) / (self._high - self._low)
        x[:, self._at] = 2 * position - 1
        x[:, self._flags] = 0
        return {name for name, usable in zip(self._names, good, strict=True) if usable}


def _scaled(cells: Cells, name: str, bounds: Bounds, absent: Mask, clamped: dict[str, int]) -> NDArray[np.float64]:
    """Position between the bounds, in [0, 1], after clamping, which is counted; that of an absent value is 0."""
    low, high = bounds
    value = np.where(absent, low, cells.number)
    _count(clamped, name, (value < low) | (value > high))
    scaled: NDArray[np.float64] = (np.clip(value, low, high) - low) / (high - low)
    return scaled


def _count(counts: dict[str, int], name: str, where: Mask) -> None:
    if n := int(where.sum()):
        counts[name] = counts.get(name, 0) + n
