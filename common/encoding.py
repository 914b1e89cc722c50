"""Table columns to model inputs, by declaration alone.

Nothing here looks at the data to decide how to encode it: bounds, categories and classes are declared, so
encoding costs no privacy and is the same at every site.

The encoding, once and for all (one row of the table is one row of the arrays, all float32):
    numeric      the value, clamped to its bounds and scaled to [-1, 1]; in a column that may be missing a second
                 input that is 1 where it is (the value then counts as 0, the middle)
    categorical  one input a category and one for any other value; all 0 where it is missing
    classes      the target's class index, int64
    numeric target  scaled to [0, 1] by its bounds, clamped, float32
A column may be missing if it declares `missing` markers, is `optional`, or says `unfit: missing`; its empty cells are
missing too. In any other column an empty cell is a mistake. A column's `unfit` says what becomes of a cell that is no
number, or none of the categories: it is missing, or other, or a mistake. Each is a rule for one row by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches

import numpy as np
import polars as pl
from numpy.typing import NDArray

from common.errors import DataError
from common.schema import Bounds, Categorical, Classes, Numeric, NumericTarget, Scalar, Schema

SHOWN_CELLS = 10
SHOWN_COLUMNS = 30


@dataclass
class EncodingReport:
    """What encoding met, for the owner's eyes only: exact counts never leave a client."""

    rows: int = 0
    missing: dict[str, int] = field(default_factory=dict)
    clamped: dict[str, int] = field(default_factory=dict)
    other: dict[str, int] = field(default_factory=dict)
    unfit_missing: dict[str, int] = field(default_factory=dict)  # also among the missing
    absent: list[str] = field(default_factory=list)
    classes: dict[str, int] = field(default_factory=dict)
    nobody: int = 0  # rows that do not say whom they are about
    left_out: int = 0  # rows with a cell that does not fit
    unfit: list[str] = field(default_factory=list)  # the first of those cells, quoted

    def lines(self) -> list[str]:
        """The report as sentences, the least expected first."""
        said = [f"column {name} is absent; it is optional and counts as missing" for name in self.absent]
        if sum(1 for n in self.classes.values() if n) == 1:
            said.append(f"all rows are of one class: {next(c for c, n in self.classes.items() if n)}")
        if self.nobody:
            said.append(f"rows whose data.id is empty: {self.nobody}; they are dealt as one person's")
        if self.left_out:
            rows = "1 row that does" if self.left_out == 1 else f"{self.left_out} rows that do"
            said.append(f"left out: {rows} not fit the schema: {'; '.join(self.unfit)}")
        for what, counts in [
            ("outside their bounds, clamped", self.clamped),
            ("outside their categories, counted as other", self.other),
            ("that do not fit, counted as missing", self.unfit_missing),
            ("missing", self.missing),
        ]:
            if counts:
                said.append(f"cells {what}: " + ", ".join(f"{name} {n}" for name, n in counts.items()))
        if self.classes:
            said.append("classes: " + ", ".join(f"{label} {n}" for label, n in self.classes.items()))
        return said


@dataclass(frozen=True)
class Encoded:
    """`x`: float32 [rows, inputs]. `y`: int64 class indices [rows], or float32 [rows] in [0, 1]. `kept`: which of the
    table's rows these are."""

    x: NDArray[np.float32]
    y: NDArray[np.int64] | NDArray[np.float32]
    report: EncodingReport
    kept: NDArray[np.int64]


def encode(
    frame: pl.DataFrame,
    schema: Schema,
    *,
    first_line: int = 1,
    source: str = "table",
    leave_out: bool = False,
) -> Encoded:
    """A table to arrays.

    Args:
        frame: columns of text, numbers or booleans; columns that the schema does not name are ignored.
        first_line: the file's line of the first row, so that errors can name lines.
        leave_out: rows with a cell that does not fit are left out, and reported, and no rows are no error: whether a
            table is taken then says nothing about any row.

    Raises:
        DataError: absent columns, and without `leave_out` no rows, or cells that do not fit; the first ten are quoted.
    """
    if frame.height == 0 and not leave_out:
        raise DataError(f"{source}: the table has no rows")
    _check_columns(frame, schema, source)
    report = EncodingReport(rows=frame.height)
    offending: list[tuple[int, str]] = []
    blocks: list[NDArray[np.float32]] = []
    for feature in schema.features:
        if feature.name not in frame.columns and feature.optional:
            report.absent.append(feature.name)
            block = np.zeros((frame.height, feature.inputs), np.float32)
            block[:, 1:] = isinstance(feature, Numeric)
            blocks.append(block)
            continue
        cells = _cells(frame[feature.name], source)
        if isinstance(feature, Numeric):
            blocks.append(_numeric(cells, feature, report, offending))
        else:
            blocks.append(_categorical(cells, feature, report, offending))
    y = _target(_cells(frame[schema.target.name], source), schema.target, report, offending)
    x, kept = np.concatenate(blocks, axis=1), np.arange(frame.height)
    if offending:
        offending.sort()
        lines = _lines(frame, first_line)
        shown = [f"line {lines[row]}: {what}" for row, what in offending[:SHOWN_CELLS]]
        if len(offending) > SHOWN_CELLS:
            shown.append(f"and {len(offending) - SHOWN_CELLS} more")
        if not leave_out:
            cells_word = "cell does" if len(offending) == 1 else "cells do"
            listed = "".join(f"\n  {line}" for line in shown)
            raise DataError(f"{source}: {len(offending)} {cells_word} not fit the schema:{listed}")
        kept = np.setdiff1d(kept, [row for row, _ in offending])
        report.left_out, report.unfit = frame.height - len(kept), shown
    return Encoded(x=x[kept], y=y[kept], report=report, kept=kept)


@dataclass(frozen=True)
class _Cells:
    """One column: as trimmed text, as numbers (NaN where it is none), and whether it is empty."""

    text: list[str]
    number: NDArray[np.float64]
    empty: NDArray[np.bool_]


def holds_cells(column: pl.Series) -> bool:
    """Are its values text, numbers, booleans or dates, rather than lists or bytes?"""
    return not (column.dtype.is_nested() or column.dtype in (pl.Binary, pl.Object))


def _check_columns(frame: pl.DataFrame, schema: Schema, source: str) -> None:
    optional = {feature.name for feature in schema.features if feature.optional}
    absent = [name for name in schema.names if name not in optional and name not in frame.columns]
    if not absent:
        return
    spare = [name for name in frame.columns if name not in schema.names]
    near = {name: get_close_matches(name, spare, n=1) for name in absent}
    said = ", ".join(f"{name} (did you mean {near[name][0]}?)" if near[name] else name for name in absent)
    raise DataError(f"{source}: the table lacks {said}; it has {', '.join(frame.columns[:SHOWN_COLUMNS])}")


def _lines(frame: pl.DataFrame, first_line: int) -> NDArray[np.int64]:
    """The line of each row. In CSV, which is read as text alone, a quoted cell may span lines."""
    lines = first_line + np.arange(frame.height)
    if all(dtype == pl.String for dtype in frame.dtypes):
        breaks = frame.select(pl.sum_horizontal(pl.all().str.count_matches("\n").fill_null(0))).to_series()
        lines[1:] += breaks.to_numpy().astype(np.int64).cumsum()[:-1]
    return lines


def _cells(column: pl.Series, source: str) -> _Cells:
    if not holds_cells(column):
        raise DataError(f"{source}: column {column.name} holds {column.dtype}, not text, numbers or booleans")
    # By way of text also where the file has types, so that one table means the same as CSV and as Parquet.
    text = column.cast(pl.String, strict=False).str.strip_chars().fill_null("")
    number = text.cast(pl.Float64, strict=False)
    return _Cells(
        text=text.to_list(),
        number=number.fill_null(float("nan")).to_numpy().astype(np.float64),
        empty=(text == "").to_numpy(),
    )


def _equal(cells: _Cells, value: Scalar) -> NDArray[np.bool_]:
    """Where the column equals `value`: as numbers if `value` is one (so that 1 and 1.0 agree), else as text."""
    same = np.fromiter((t == str(value) for t in cells.text), np.bool_, len(cells.text))
    if not isinstance(value, str):
        same |= cells.number == float(value)
    return same


def _missing(
    cells: _Cells, feature: Numeric | Categorical, report: EncodingReport, offending: list[tuple[int, str]]
) -> NDArray[np.bool_]:
    missing = cells.empty.copy()
    for marker in feature.missing:
        missing |= _equal(cells, marker)
    if feature.may_be_missing:
        _count(report.missing, feature.name, missing)
    else:
        why = f"{feature.name}: is empty, and the schema gives this column no `missing` marker"
        offending.extend((int(i), why) for i in np.flatnonzero(missing))
    return missing


def _count(counts: dict[str, int], name: str, where: NDArray[np.bool_]) -> None:
    if n := int(where.sum()):
        counts[name] = n


def _unread(cells: _Cells, missing: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where there is something that is no number."""
    return ~missing & ~np.isfinite(cells.number)


def _left_out(
    cells: _Cells, name: str, expected: str, where: NDArray[np.bool_], offending: list[tuple[int, str]]
) -> None:
    offending.extend((int(i), f"{name}: expected {expected}, found {cells.text[i]!r}") for i in np.flatnonzero(where))


def _scaled(
    cells: _Cells, name: str, bounds: Bounds, absent: NDArray[np.bool_], report: EncodingReport
) -> NDArray[np.float64]:
    """Position between the bounds, in [0, 1], after clamping; that of an absent value is 0."""
    low, high = bounds
    value = np.where(absent, low, cells.number)
    _count(report.clamped, name, (value < low) | (value > high))
    scaled: NDArray[np.float64] = (np.clip(value, low, high) - low) / (high - low)
    return scaled


def _numeric(
    cells: _Cells, feature: Numeric, report: EncodingReport, offending: list[tuple[int, str]]
) -> NDArray[np.float32]:
    missing = _missing(cells, feature, report, offending)
    unread = _unread(cells, missing)
    absent = missing | unread
    if feature.unfit == "missing":
        missing = _unfit_missing(feature, missing, unread, report)
    else:
        _left_out(cells, feature.name, "a number", unread, offending)
    position = _scaled(cells, feature.name, feature.bounds, absent, report)
    value = np.where(missing, 0.0, 2 * position - 1)
    return np.stack([value, missing][: feature.inputs], axis=1).astype(np.float32)


def _categorical(
    cells: _Cells, feature: Categorical, report: EncodingReport, offending: list[tuple[int, str]]
) -> NDArray[np.float32]:
    missing = _missing(cells, feature, report, offending)
    hot = np.stack([_equal(cells, category) & ~missing for category in feature.categories], axis=1)
    other = ~missing & ~hot.any(axis=1)
    if feature.unfit == "missing":
        _unfit_missing(feature, missing, other, report)
        other = np.zeros_like(other)
    elif feature.unfit == "left_out":
        known = ", ".join(str(category) for category in feature.categories)
        _left_out(cells, feature.name, f"one of {known}", other, offending)
    else:
        _count(report.other, feature.name, other)
    return np.concatenate([hot, other[:, None]], axis=1).astype(np.float32)


def _unfit_missing(
    feature: Numeric | Categorical, missing: NDArray[np.bool_], unfit: NDArray[np.bool_], report: EncodingReport
) -> NDArray[np.bool_]:
    """What is missing when what does not fit is."""
    _count(report.unfit_missing, feature.name, unfit)
    _count(report.missing, feature.name, missing | unfit)
    return missing | unfit


def _target(
    cells: _Cells, target: Classes | NumericTarget, report: EncodingReport, offending: list[tuple[int, str]]
) -> NDArray[np.int64] | NDArray[np.float32]:
    offending.extend((int(i), f"{target.name}: the target is empty") for i in np.flatnonzero(cells.empty))
    if isinstance(target, NumericTarget):
        unread = _unread(cells, cells.empty)
        _left_out(cells, target.name, "a number", unread, offending)
        return _scaled(cells, target.name, target.bounds, cells.empty | unread, report).astype(np.float32)
    index = np.full(len(cells.text), -1, np.int64)
    for i, values in enumerate(target.classes.values()):
        for value in values:
            index[_equal(cells, value)] = i
    known = ", ".join(str(v) for values in target.classes.values() for v in values)
    unknown = np.flatnonzero((index < 0) & ~cells.empty)
    offending.extend(
        (int(i), f"{target.name}: unknown class {cells.text[i]!r}; the schema knows {known}") for i in unknown
    )
    report.classes = {label: int((index == i).sum()) for i, label in enumerate(target.classes)}
    return index
