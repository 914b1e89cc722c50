"""A first schema from a table, for a human to edit."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from common import tables
from common.errors import DataError

MOST_CATEGORIES = 20

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
        DataError: the table cannot be read, has no rows, or lacks the target.
    """
    frame = tables.read_any(path)
    if frame.height == 0:
        raise DataError(f"{path.name}: the table has no rows")
    target = target or frame.columns[-1]
    if target not in frame.columns:
        raise DataError(f"{path.name}: no column {target}; there are {', '.join(frame.columns)}")
    lines = [WARNING + "schema:", "  features:"]
    lines += [f"    - {_feature(frame[name])}" for name in frame.columns if name != target]
    lines += [f"  target: {_target(frame[target])}", "  validation_fraction: 0.2", ""]
    return "\n".join(lines)


def _feature(column: pl.Series) -> str:
    numbers, texts, distinct = _describe(column)
    missing = ""
    if numbers is not None and texts:
        missing = f", missing: [{', '.join(map(_quoted, texts))}]"
    if numbers is not None and len(distinct) > 2:
        return f"{{name: {_quoted(column.name)}, type: numeric, bounds: [{numbers[0]:g}, {numbers[1]:g}]{missing}}}"
    shown = [d for d in distinct if d not in texts] if numbers is not None else distinct
    more = ""
    if len(shown) > MOST_CATEGORIES:
        more = f"  # and {len(shown) - MOST_CATEGORIES} more; leave the column out if it names a person"
        shown = shown[:MOST_CATEGORIES]
    values = ", ".join(map(_quoted, shown))
    return f"{{name: {_quoted(column.name)}, type: categorical, categories: [{values}]{missing}}}{more}"


def _target(column: pl.Series) -> str:
    numbers, texts, distinct = _describe(column)
    if numbers is not None and not texts and len(distinct) > MOST_CATEGORIES:
        return f"{{name: {_quoted(column.name)}, bounds: [{numbers[0]:g}, {numbers[1]:g}]}}"
    return f"{{name: {_quoted(column.name)}, classes: [{', '.join(map(_quoted, distinct))}]}}"


def _describe(column: pl.Series) -> tuple[tuple[float, float] | None, list[str], list[str]]:
    """Smallest and largest number (None if it is no column of numbers), what is no number, all distinct values."""
    text = column.cast(pl.String, strict=False).str.strip_chars().fill_null("")
    filled = text.filter(text != "")
    number = filled.cast(pl.Float64, strict=False)
    finite = number.filter(number.is_not_null() & number.is_finite())
    distinct = sorted(filled.unique().to_list(), key=_order)
    texts = sorted(filled.filter(number.is_null()).unique().to_list())
    if len(finite) == 0 or len(texts) > 3 or len(finite) < len(filled) / 2:
        return None, [], distinct
    low, high = float(finite.min()), float(finite.max())  # type: ignore[arg-type]
    return (low, high if high > low else low + 1.0), texts, distinct


def _order(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


def _quoted(text: str) -> str:
    """A value as YAML: numbers bare, text in quotes where it could be read as something else."""
    try:
        value = float(text)
        return str(int(value)) if value.is_integer() else text
    except ValueError:
        plain = text.replace("_", "").replace("-", "").isalnum() and not text[0].isdigit()
        reserved = text.lower() in {"true", "false", "null", "nan", "inf", "~"}
        return text if plain and not reserved else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
