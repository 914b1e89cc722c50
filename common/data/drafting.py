"""A first schema from a table, for a human to edit.

It proposes numbers for numbers, short lists for columns of few values, and leaves out, with a note, what is no feature
as it stands: dates, identifiers, free text, columns without values or without a name. A value that occurs once is never
shown: it may be one person's. Bounds are rounded outwards, but an extreme row shows in them all the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import yaml
from numpy.typing import NDArray

from common.data import tables
from common.data.cells import CODE, Cells, Mask, holds_cells
from common.data.tables import AS_IT_SEEMS, FileFormat, Table
from common.document.values import Scalar, agree
from common.errors import DataError

MOST_CATEGORIES = 50
MOST_CLASSES = 20  # of a target of numbers; with more it is a number
FEW_CLASSES = 4  # that it may have even if one occurs once
MOST_MARKERS = 3  # different cells that are no number, in a column of numbers
FEW_ROWS = 5  # in which numbers may follow each other by chance
MANY_ROWS = 20  # in which a measured number would occur twice
EMPTY = '""'  # an empty cell, as YAML
PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
DATE = (
    r"^([0-9]{4}[-/.][0-9]{1,2}[-/.][0-9]{1,2}|[0-9]{1,2}[-/.][0-9]{1,2}[-/.][0-9]{2,4})([ T].*)?$|^[0-9]{1,2}:[0-9]{2}"
)
# What is written where a value is missing; it says nothing about anyone, so it may be shown.
MARKERS = frozenset(("?", "-", "--", ".", "na", "n/a", "#n/a", "nan", "null", "none", "nil", "missing", "unknown"))

WARNING = """\
# A first draft, for a human to edit.
# The bounds and categories below were READ FROM THE DATA: they are not private, and one extreme row shows in
# them. Replace them by what is known of the field before this document leaves the building.
"""


def draft(path: Path, *, target: str | None = None, form: FileFormat = AS_IT_SEEMS) -> str:
    """The `schema:` part of a federation document, as YAML with a warning on top.

    Args:
        target: the column to predict; by default the last that is not left out.

    Raises:
        DataError: the table cannot be read, has no rows, or no column for a feature; or the target is not there, or
            cannot be one.
    """
    table = tables.read_any(path, form)
    frame = table.frame
    if frame.height == 0:
        raise DataError(f"{path.name}: the table has no rows")
    if target is not None and target not in frame.columns:
        raise DataError(f"{path.name}: no column {target}; there are {', '.join(table.columns)}")
    seen = {name: _describe(table, frame, name) for name in table.columns}
    usable = [name for name, column in seen.items() if not column.left_out]
    if target is None and not usable:
        raise DataError(f"{path.name}: no column is left for a target: {_reasons(seen.values())}")
    target = target or usable[-1]
    features = [column for name, column in seen.items() if name != target]
    if all(column.left_out for column in features):
        raise DataError(
            f"{path.name}: no column is left for a feature, beside the target {target}: {_reasons(features)}"
        )
    lines = [WARNING + "schema:", "  features:", *(f"    {_feature(column)}" for column in features)]
    lines += [*_target(seen[target], path.name), "  validation_fraction: 0.2", ""]
    return "\n".join(lines)


@dataclass(frozen=True)
class _Column:
    """What a column holds."""

    name: str
    left_out: str = ""  # why it is no feature; then nothing else is known of it
    bounds: tuple[float, float] | None = None  # of a column of numbers
    values: tuple[str, ...] = ()  # those that occur more than once, as YAML
    different: int = 0
    markers: tuple[str, ...] = ()  # cells that mean missing, as YAML
    unfit: bool = False  # are there cells that are neither number nor marker?
    unclear: int = 0  # rows in which a target would be missing
    note: str = ""


def _describe(table: Table, frame: pl.DataFrame, name: str) -> _Column:
    if not name.strip() or name in table.unnamed:
        return _Column(name, "which has no name")
    if name in table.doubled:
        return _Column(name, "whose name stands twice")
    dtype = table.types[name]
    if not holds_cells(dtype):
        return _Column(name, f"which holds {dtype}")
    cells = Cells(frame[name], table.decimals)
    names, empty = cells.names(), cells.empty()
    marked = cells.text.str.to_lowercase().is_in(list(MARKERS)).to_numpy() & ~empty
    filled = names.filter(pl.Series(~empty & ~marked))
    if not len(filled):
        return _Column(name, "which has no values")
    if dtype.is_temporal() or filled.str.contains(DATE).mean() > 0.5:  # type: ignore[operator]  # of booleans, never None
        return _Column(name, "which holds dates or times; make a number of them, such as an age or a year")
    markers = [_text(text) for text in cells.text.filter(pl.Series(marked)).unique().sort()]
    markers += [EMPTY] if empty.any() else []
    unclear = int((empty | marked).sum())
    number = cells.number[~empty & ~marked]
    finite = np.isfinite(number)
    others = filled.filter(pl.Series(~finite)).unique()
    codes = filled.str.contains(CODE).any()
    if not codes and len(others) <= MOST_MARKERS and finite.sum() >= len(filled) / 2:
        return _of_numbers(name, filled, number, finite, tuple(markers), unclear)
    return _of_texts(name, filled, tuple(markers), unclear)


def _of_numbers(
    name: str, filled: pl.Series, number: NDArray[np.float64], finite: Mask, markers: tuple[str, ...], unclear: int
) -> _Column:
    """A column of numbers, and of few other cells."""
    numbers, others = number[finite], _often(filled.filter(pl.Series(~finite)))
    once = set(filled.filter(pl.Series(~finite)).unique()) - set(others)
    different = len(np.unique(numbers))
    all_whole = bool((numbers == np.floor(numbers)).all())
    note = ""
    if all_whole and different == len(numbers) >= FEW_ROWS:
        if np.ptp(numbers) + 1 == len(numbers):
            return _Column(name, "which numbers the rows")
        if len(numbers) > MANY_ROWS:
            note = "each row has another: leave the column out if it names a row or a person"
    return _Column(
        name,
        bounds=_rounded(float(numbers.min()), float(numbers.max())),
        values=_written(_often(filled.filter(pl.Series(finite)))),
        different=different,
        markers=(*map(_text, others), *markers),
        unfit=bool(once),
        unclear=unclear,
        note=note,
    )


def _of_texts(name: str, filled: pl.Series, markers: tuple[str, ...], unclear: int) -> _Column:
    often, different = _often(filled), filled.n_unique()
    if len(often) > MOST_CATEGORIES or len(often) < different / 2 or not often:
        return _Column(name, f"which has {different} different texts: an identifier, or free text")
    note = ""
    if different > len(often):
        note = f"and {different - len(often)} more, of one row each, which will be counted as other"
    return _Column(name, values=_written(often), different=different, markers=markers, unclear=unclear, note=note)


def _often(cells: pl.Series) -> list[str]:
    """The values that occur more than once, numbers first."""
    counts = cells.value_counts(name="times")
    values = counts.filter(pl.col("times") > 1)[cells.name].to_list()
    return sorted(values, key=lambda cell: (0, float(cell), cell) if _is_number(cell) else (1, 0.0, cell))


def _feature(column: _Column) -> str:
    if column.left_out:
        return f"# left out: column {_text(column.name)}, {column.left_out}"
    name, missing = f"name: {_text(column.name)}", ""
    if column.markers:
        missing = f", missing: [{', '.join(column.markers)}]"
    note = f"  # {column.note}" if column.note else ""
    if column.bounds is not None and not 2 == column.different == len(column.values):
        unfit = ", unfit: missing" if column.unfit else ""
        return f"- {{{name}, type: numeric, bounds: {_bounds(column.bounds)}{missing}{unfit}}}{note}"
    return f"- {{{name}, type: categorical, categories: [{', '.join(column.values)}]{missing}}}{note}"


def _target(column: _Column, source: str) -> Iterable[str]:
    if column.left_out:
        raise DataError(f"{source}: column {column.name}, {column.left_out}, cannot be the target")
    if column.unclear:
        yield f"  # rows without a target: {column.unclear}; take them out of the table"
    name = f"name: {_text(column.name)}"
    if column.bounds is not None and (column.different > MOST_CLASSES or _is_measured(column)):
        yield f"  target: {{{name}, bounds: {_bounds(column.bounds)}}}"
        return
    if len(column.values) < 2:
        raise DataError(
            f"{source}: column {column.name} cannot be the target: it needs at least two different values that occur "
            "more than once"
        )
    yield f"  target: {{{name}, classes: [{', '.join(column.values)}]}}"


def _is_measured(column: _Column) -> bool:
    """Do its numbers differ too much for a few classes in few rows?"""
    return column.different > FEW_CLASSES and column.different > len(column.values)


def _reasons(columns: Iterable[_Column]) -> str:
    said = [f"{_text(column.name)}, {column.left_out}" for column in columns if column.left_out]
    return "; ".join(said) or "the table has one column"


def _rounded(low: float, high: float) -> tuple[float, float]:
    """Bounds around both, to two digits of their distance."""
    if low == high:
        return low, low + 1.0
    step = 10.0 ** (math.floor(math.log10(high - low)) - 1)
    digits = -round(math.log10(step))
    down, up = round(math.floor(low / step) * step, digits), round(math.ceil(high / step) * step, digits)
    return min(down, low), max(up, high)


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def _written(cells: list[str]) -> tuple[str, ...]:
    """Values as YAML, one for each meaning. Beside codes with leading zeros numbers are text as well."""
    codes = any(map(re.compile(CODE).match, cells))
    written: dict[str, Scalar] = {}
    for cell in cells:
        value: Scalar = cell
        if cell in ("true", "false"):
            value = cell == "true"
        elif _is_number(cell) and not codes:
            value = float(cell)
        if not any(agree(value, other) for other in written.values()):
            written[_text(cell) if isinstance(value, str) else cell] = value
    return tuple(written)


def _bounds(bounds: tuple[float, float]) -> str:
    return f"[{_number(bounds[0])}, {_number(bounds[1])}]"


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")


def _text(text: str) -> str:
    """Text as YAML: in quotes unless it is a plain word."""
    if PLAIN.fullmatch(text) and text.lower() not in {"true", "false", "null", "nan", "inf"}:
        return text
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=math.inf).strip()
