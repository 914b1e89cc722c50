"""Tables from files, in blocks of rows: CSV (common/data/csv_files.py), with or without a header, and Parquet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from common.data import csv_files
from common.data.cells import POINT, Decimals, holds_cells, tidy
from common.data.csv_files import Beginning
from common.data.text_files import most_lines
from common.document.schema import Schema
from common.errors import DataError

PARQUET = (".parquet", ".pq")
BLOCK_CELLS = 1 << 20  # of Parquet, and of a table that is in memory


@dataclass(frozen=True)
class FileFormat:
    """What an owner says of a CSV file that the file itself does not. None is what it seems to be."""

    encoding: str | None = None
    decimal: Literal[".", ","] | None = None


AS_IT_SEEMS = FileFormat()


@dataclass(frozen=True)
class Block:
    """Some rows, tidied (common/data/cells.py), and where each stands: its line in CSV, its number in Parquet."""

    frame: pl.DataFrame
    lines: NDArray[np.int64]  # [rows]


@dataclass(frozen=True)
class Table:
    """A file's columns, all of them, unencoded. CSV cells are text: what they mean is the schema's to say."""

    source: str
    types: Mapping[str, pl.DataType]  # of its columns by their names, as the file has them
    most_rows: int  # it has no more
    blocks: Callable[[], Iterator[Block]]  # at least one; raises `DataError` at a row that cannot be read
    first_line: int = 1  # where the first row stands
    decimals: Decimals = POINT
    names_itself: bool = True  # are the columns' names the file's own, and not the schema's?
    unnamed: frozenset[str] = frozenset()  # columns that have no name in the file
    doubled: frozenset[str] = frozenset()  # columns whose name stands twice in the file
    note: str = ""  # what was assumed of the file, for whoever gave it

    @property
    def columns(self) -> list[str]:
        return list(self.types)

    @property
    def frame(self) -> pl.DataFrame:
        """All of it at once. Columns that hold no cells are not there."""
        return pl.concat([block.frame for block in self.blocks()])


def of_frame(frame: pl.DataFrame, *, first_line: int = 1, source: str = "table") -> Table:
    """A table that is in memory."""
    kept = [name for name, dtype in frame.schema.items() if holds_cells(dtype)]
    step = _rows_of_a_block(kept)

    def blocks() -> Iterator[Block]:
        lines = _lines(frame, first_line)
        for start in range(0, max(1, frame.height), step):
            yield Block(tidy(frame.select(kept).slice(start, step)), lines[start : start + step])

    return Table(source, frame.schema, frame.height, blocks, first_line)


def read(path: Path, schema: Schema, form: FileFormat = AS_IT_SEEMS, *, with_target: bool = True) -> Table:
    """Opens a table; without `with_target` its target's column need not be there.

    A first row that holds every required name of the schema is a header. Otherwise the file has none, and the
    schema's `columns` name what it holds; where they cannot, a row with some of the names is a header too.

    Raises:
        DataError: the file is missing, empty or unreadable, or its columns cannot be told.
    """
    if path.suffix.lower() in PARQUET:
        return _parquet(path)
    required = [name for name in (schema.names if with_target else schema.feature_names) if name not in schema.optional]
    width = len(schema.columns) if schema.columns is not None else None
    begins = csv_files.beginning(path, form.encoding, required, width=width)
    named = [name for name in required if name in begins.first]
    folded = {name.casefold() for name in begins.first}
    like = [name for name in required if name.casefold() in folded]
    no_header = len(begins.first) == width
    columns, note = schema.columns, ""
    if not with_target and columns is not None and len(begins.first) == len(columns) - 1:
        no_header, columns = True, tuple(name for name in columns if name != schema.target.name)
        note = (
            f"warning: {path.name}: no header, and one column fewer than the schema's `columns`: it is read as one "
            f"that lacks the target, {schema.target.name}"
        )
    if named == required or (like and not no_header):
        _check_header(path, begins, schema.names)
        return _csv(path, begins, form, begins.first, header=True)
    if no_header and columns is not None:
        return replace(_csv(path, begins, form, columns, header=False), note=note)
    names = ", ".join(required)
    if schema.columns is None:
        raise DataError(
            f"{path.name}: the first line does not name {names}; a file without a header needs `columns` in the "
            "federation's schema"
        )
    raise DataError(
        f"{path.name}: the first line neither names {names} nor has the {len(schema.columns)} fields of the "
        f"schema's `columns` (it has {len(begins.first)})"
    )


def read_any(path: Path, form: FileFormat = AS_IT_SEEMS) -> Table:
    """Opens a table that no schema describes yet; CSV must have a header."""
    if path.suffix.lower() in PARQUET:
        return _parquet(path)
    begins = csv_files.beginning(path, form.encoding, ())
    return _csv(path, begins, form, begins.first, header=True)


def _parquet(path: Path) -> Table:
    try:
        file = pl.scan_parquet(path)
        types = file.collect_schema()
        rows = int(file.select(pl.len()).collect().item())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, pl.exceptions.PolarsError) as error:
        raise _no_parquet(path, error) from error
    kept = [name for name, dtype in types.items() if holds_cells(dtype)]
    step = _rows_of_a_block(kept)

    def blocks() -> Iterator[Block]:
        for start in range(0, max(1, rows), step):
            try:
                frame = file.select(kept).slice(start, step).collect()
            except (OSError, pl.exceptions.PolarsError) as error:
                raise _no_parquet(path, error) from error
            yield Block(tidy(frame), 1 + start + np.arange(frame.height))

    return Table(path.name, types, rows, blocks)


def _rows_of_a_block(columns: Sequence[str]) -> int:
    return max(1, BLOCK_CELLS // max(1, len(columns)))


def _no_parquet(path: Path, error: Exception) -> DataError:
    return DataError(f"{path.name}: cannot be read as Parquet: {str(error).splitlines()[0]}")


def _csv(path: Path, begins: Beginning, form: FileFormat, names: Sequence[str], *, header: bool) -> Table:
    columns = _different(names)
    least = len(names) if not header else max((i + 1 for i, name in enumerate(names) if name), default=len(names))
    first_line = 1 + begins.before + (begins.height if header else 0)

    def blocks() -> Iterator[Block]:
        for frame, lines in csv_files.blocks(path, form.encoding, begins, columns, header=header, least=least):
            yield Block(frame, lines)

    times = Counter(names)
    mark = form.decimal or ("," if begins.separator == ";" else ".")
    return Table(
        path.name,
        dict.fromkeys(columns, pl.String()),
        most_lines(path),
        blocks,
        first_line,
        Decimals(mark, declared=form.decimal is not None),
        names_itself=header,
        unnamed=frozenset(new for new, name in zip(columns, names, strict=True) if not name),
        doubled=frozenset(new for new, name in zip(columns, names, strict=True) if times[name] > 1),
    )


def _check_header(path: Path, begins: Beginning, used: Sequence[str]) -> None:
    """Raises `DataError` if a column that is used stands twice."""
    twice = [name for name, times in Counter(begins.first).items() if times > 1 and name and name in used]
    if twice:
        raise DataError(
            f"{path.name}: line {1 + begins.before}: column names must differ, found {', '.join(twice)} twice"
        )


def _different(names: Sequence[str]) -> list[str]:
    """Names of which each is another, for columns that nothing can ask for by name: a, b, a (2)."""
    different: dict[str, None] = {}
    for name in names:
        number, new = 1, name
        while new in different:
            number += 1
            new = f"{name} ({number})"
        different[new] = None
    return list(different)


def _lines(frame: pl.DataFrame, first_line: int) -> NDArray[np.int64]:
    """The line of each row. In a table of text alone, as from CSV, a quoted cell may span lines."""
    lines = first_line + np.arange(frame.height)
    if frame.height and all(dtype == pl.String for dtype in frame.dtypes):
        breaks = frame.select(pl.sum_horizontal(pl.all().str.count_matches("\n").fill_null(0))).to_series()
        lines[1:] += breaks.to_numpy().astype(np.int64).cumsum()[:-1]
    return lines
