"""A first schema from a table, for a human to edit."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import yaml

from common import tables
from common.encoding import holds_cells
from common.errors import DataError

MOST_CATEGORIES = 20
MOST_MARKERS = 3  # different cells that are no number, in a column of numbers
EMPTY = '""'  # an empty cell, as YAML
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")

WARNING = """\
# A first draft, for a human to edit.
# The bounds and categories below were READ FROM THE DATA: they are not private, and one extreme row shows in
# them. Replace them by what is known of the field before this document leaves the building.
"""


def draft(path: Path, *, target: str | None = None) -> str:
    """The `schema:` part of a federation document, as YAML with a warning on top.

    Args:
        target: the column to predict; the last one by default.

    Raises:
        DataError: the table cannot be read, has no rows, lacks the target, or has one value only in it.
    """
    frame = tables.read_any(path)
    if frame.height == 0:
        raise DataError(f"{path.name}: the table has no rows")
    target = target or frame.columns[-1]
    if target not in frame.columns:
        raise DataError(f"{path.name}: no column {target}; there are {', '.join(frame.columns)}")
    lines = [WARNING + "schema:", "  features:"]
    lines += [f"    {_feature(frame[name])}" for name in frame.columns if name != target]
    lines += [f"  target: {_target(frame[target], path.name)}", "  validation_fraction: 0.2", ""]
    return "\n".join(lines)


@dataclass(frozen=True)
class _Column:
    """What a column holds. Cells that are empty, or no number in a column of numbers, seem to mean missing."""

    bounds: tuple[float, float] | None  # None if it is no column of numbers
    values: list[str]  # the different values, as YAML
    missing: list[str]  # likewise


def _feature(column: pl.Series) -> str:
    if not column.name or not (seen := _describe(column)).values:
        return f"# left out: column {_text(column.name)}, which has no {'values' if column.name else 'name'}"
    missing = f", missing: [{', '.join(seen.missing)}]" if seen.missing else ""
    name = f"name: {_text(column.name)}"
    if seen.bounds is not None and len(seen.values) > 2:
        return f"- {{{name}, type: numeric, bounds: {_bounds(seen.bounds)}{missing}}}"
    more = ""
    if len(seen.values) > MOST_CATEGORIES:
        more = f"  # and {len(seen.values) - MOST_CATEGORIES} more; leave the column out if it names a person"
    values = ", ".join(seen.values[:MOST_CATEGORIES])
    return f"- {{{name}, type: categorical, categories: [{values}]{missing}}}{more}"


def _target(column: pl.Series, source: str) -> str:
    seen = _describe(column)
    name = f"name: {_text(column.name)}"
    if seen.bounds is not None and set(seen.missing) <= {EMPTY} and len(seen.values) > MOST_CATEGORIES:
        return f"{{{name}, bounds: {_bounds(seen.bounds)}}}"
    classes = [*seen.values, *(value for value in seen.missing if value != EMPTY)]
    if len(classes) < 2:
        raise DataError(f"{source}: column {column.name} cannot be the target: it needs at least two different values")
    return f"{{{name}, classes: [{', '.join(classes)}]}}"


def _describe(column: pl.Series) -> _Column:
    if not holds_cells(column):
        return _Column(bounds=None, values=[], missing=[])
    text = column.cast(pl.String, strict=False).str.strip_chars().fill_null("")
    filled = text.filter(text != "")
    number = filled.cast(pl.Float64, strict=False)
    is_number = (number.is_not_null() & number.is_finite()).fill_null(False)
    finite, others = number.filter(is_number), filled.filter(~is_number).unique()
    missing = [EMPTY] if len(filled) < len(text) else []
    if len(finite) == 0 or len(others) > MOST_MARKERS or len(finite) < len(filled) / 2:
        return _Column(bounds=None, values=_written(filled), missing=missing)
    numbers = finite.to_numpy()
    low, high = float(numbers.min()), float(numbers.max())
    bounds = (low, high if high > low else low + 1.0)
    return _Column(bounds=bounds, values=_written(filled.filter(is_number)), missing=_written(others) + missing)


def _written(cells: pl.Series) -> list[str]:
    """The different values as YAML, numbers first."""
    ordered = sorted(
        cells.unique().to_list(), key=lambda cell: (0, float(cell), cell) if _is_number(cell) else (1, 0.0, cell)
    )
    return list(dict.fromkeys(_number(float(cell)) if _is_number(cell) else _text(cell) for cell in ordered))


def _is_number(cell: str) -> bool:
    return NUMBER.fullmatch(cell) is not None and math.isfinite(float(cell))


def _bounds(bounds: tuple[float, float]) -> str:
    return f"[{_number(bounds[0])}, {_number(bounds[1])}]"


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")


def _text(text: str) -> str:
    """Text as YAML: in quotes unless it is a plain word."""
    if PLAIN.fullmatch(text) and text.lower() not in {"true", "false", "null", "nan", "inf"}:
        return text
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=math.inf).strip()
