"""CSV as people and programs write it: rows of text cells, each with the line on which it stands.

    separator  one of , ; tab | : the one that finds the wanted names in the first row, or cuts the rows into equally
               many fields; blanks, if none of these does; a first line `sep=;`, as Excel writes, names it
    quotes     around a cell that holds separators, quotes (doubled) or line ends; one that begins no cell is text
    blanks     around a cell, also before its quotes, are no part of it
    rows       blank lines are none, nor are rows without a single cell at the end, as Excel leaves them
    width      a row has as many fields as the first, but may lack those at its end that have no name, or have empty
               ones more

A block of rows whose quotes are as they should be and whose widths are equal is read by polars, others by Python's csv.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from common.data.cells import Mask
from common.data.text_files import pieces
from common.errors import DataError

SEPARATORS = ",;\t|"
BLANK = " "  # any number of them is one separator
SAMPLE_ROWS = 50
SHOWN_LINES = 10
LONGEST_ROW = 1 << 25  # characters; with more, a quote was not closed
SLOW_ROWS = 1 << 14  # of a block that csv reads
NAMES_SEPARATOR = re.compile(r'"?sep=(.)"?[ \t,;|]*\n', re.IGNORECASE)
LAST = "\x02last\x03"  # a row that no table has

Lines = NDArray[np.int64]


@dataclass(frozen=True)
class Beginning:
    """How a file begins: its separator, its first row, and how many lines there are before and with that row."""

    separator: str
    first: list[str]
    before: int
    height: int


def beginning(path: Path, encoding: str | None, wanted: Collection[str], *, width: int | None = None) -> Beginning:
    """Reads how a file begins.

    Args:
        wanted: names that its first row should hold.
        width: fields of a row that holds none of them.

    Raises:
        DataError: it is empty, or its first row never ends.
    """
    text = ""
    for piece in pieces(path, encoding):
        text += piece
        if text.strip() and "\n" in text.lstrip():
            break
    if not text.strip():
        raise DataError(f"{path.name}: the file is empty")
    before = len(text[: len(text) - len(text.lstrip("\n"))])
    text = text[before:]
    if (named := NAMES_SEPARATOR.match(text)) is not None:
        text = text[named.end() :]
        found = [_sampled(path, text, named.group(1))]
        before += 1
    else:
        found = [_sampled(path, text, separator) for separator in SEPARATORS]
        if not any(len(sample.rows[0]) > 1 for sample in found):
            found = [_sampled(path, text, BLANK)]
    best = max(found, key=lambda sample: sample.fits(wanted, width))
    return Beginning(best.separator, best.rows[0], before, best.height)


@dataclass(frozen=True)
class _Sample:
    separator: str
    rows: list[list[str]]
    height: int  # lines of the first row

    def fits(self, wanted: Collection[str], width: int | None) -> tuple[float, ...]:
        """How well the separator does, the more the better."""
        first = len(self.rows[0])
        named = len(set(wanted) & set(self.rows[0]))
        all_named = named == len(set(wanted)) > 0
        alike = sum(len(row) == first for row in self.rows) / len(self.rows) if first > 1 else 0.0
        return all_named, first == width, alike, named, first


def _sampled(path: Path, text: str, separator: str) -> _Sample:
    reader = _reader(chain(io.StringIO(text), ["\n", LAST]), separator)
    try:
        first = [field.strip() for field in next(reader)]
    except csv.Error:  # a cell of more than `LONGEST_ROW`
        first = [LAST]
    if LAST in first[-1]:
        raise DataError(f"{path.name}: line 1: the first row never ends; is there a quote that is not closed?")
    height = reader.line_num
    rows = [first, *(row for row in islice(reader, SAMPLE_ROWS) if row and row != [LAST])]
    return _Sample(separator, rows, height)


def _reader(lines: Iterable[str], separator: str) -> csv._reader:  # type: ignore[name-defined]  # typeshed's own name
    csv.field_size_limit(LONGEST_ROW)  # a cell may hold a whole document
    return csv.reader(lines, delimiter=separator, skipinitialspace=True)


def blocks(
    path: Path, encoding: str | None, begins: Beginning, names: Sequence[str], *, header: bool, least: int
) -> Iterator[tuple[pl.DataFrame, Lines]]:
    """The rows of a file: text cells, trimmed, and their lines, in blocks, at least one.

    Args:
        names: of its columns, each another.
        header: is the first row one?
        least: fields that a row has, of those that `names` names.

    Raises:
        DataError: rows of another width, or a quote that is never closed; with their lines.
    """
    skipped = begins.before + (begins.height if header else 0)
    stream = _Stream(_below(pieces(path, encoding), skipped), first_line=skipped + 1)
    reader = _Rows(path, begins.separator, names, least)
    waiting: list[tuple[pl.DataFrame, Lines]] = []  # rows without a cell, which are none if no others follow
    yielded = False
    for frame, lines in reader.read(stream):
        full = frame.height - _empty_at_the_end(frame)
        if reader.ragged:
            continue  # all that is still wanted is how many more there are
        if full:
            yield from waiting
            waiting = []
            yielded = True
            yield frame[:full], lines[:full]
        if full < frame.height:
            waiting.append((frame[full:], lines[full:]))
    reader.check_widths()
    if not yielded:
        yield pl.DataFrame(schema=dict.fromkeys(names, pl.String)), np.empty(0, np.int64)


def _below(text: Iterator[str], lines: int) -> Iterator[str]:
    """The text without its first lines."""
    for piece in text:
        while lines and (end := piece.find("\n") + 1):
            piece, lines = piece[end:], lines - 1
        if not lines:
            yield piece


def _empty_at_the_end(frame: pl.DataFrame) -> int:
    """How many rows at the end have not a single cell."""
    if frame.height == 0 or any(frame.row(-1)):
        return 0
    full = frame.select(pl.any_horizontal(pl.all().fill_null("") != "")).to_series().arg_true()
    return frame.height - (int(full[-1]) + 1 if len(full) else 0)


class _Stream:
    """Text that arrives in pieces, and the line at which what is left of it begins."""

    def __init__(self, text: Iterator[str], *, first_line: int) -> None:
        self._text, self.line = text, first_line
        self.ended = False
        self.held = ""

    def more(self) -> bool:
        piece = next(self._text, None)
        self.held += piece or ""
        self.ended = piece is None
        return not self.ended

    def take(self, end: int) -> str:
        taken, self.held = self.held[:end], self.held[end:]
        self.line += taken.count("\n")
        return taken

    def lines(self) -> Iterator[str]:
        """All that is left, line by line."""
        while True:
            end = self.held.rfind("\n") + 1
            yield from io.StringIO(self.take(end))
            if not self.more():
                break
        yield self.take(len(self.held))


class _Rows:
    """Rows of text to frames; rows of another width are kept for one error."""

    def __init__(self, path: Path, separator: str, names: Sequence[str], least: int) -> None:
        self._path, self._separator, self._names = path, separator, list(names)
        self._width, self._least = len(names), least
        self.ragged: list[tuple[int, int]] = []  # lines, and how many fields they have

    def check_widths(self) -> None:
        if self.ragged:
            shown = ", ".join(f"line {line} has {width}" for line, width in self.ragged[:SHOWN_LINES])
            more = f", and {len(self.ragged) - SHOWN_LINES} more" if len(self.ragged) > SHOWN_LINES else ""
            raise DataError(f"{self._path.name}: every line must have {self._width} fields; {shown}{more}")

    def read(self, stream: _Stream) -> Iterator[tuple[pl.DataFrame, Lines]]:
        while stream.more() or stream.held:
            quotes = _Quotes(stream.held, self._separator)
            if not quotes.usual:
                yield from self._by_csv(stream.lines(), stream.line)
                return
            if quotes.open and (stream.ended or len(stream.held) > LONGEST_ROW):
                raise self._unclosed(stream.line + stream.held[: quotes.last].count("\n"))
            line = stream.line
            text = stream.take(len(stream.held) if stream.ended else quotes.end)
            if text:
                yield self._block(text, line)

    def _block(self, text: str, line: int) -> tuple[pl.DataFrame, Lines]:
        """Whole rows, whose quotes are as they should be."""
        if not text.endswith("\n"):
            text += "\n"
        raw = text.encode()
        codes = np.frombuffer(raw, np.uint8)
        outside: Mask | None = None
        if '"' in text:
            outside = np.logical_not(np.bitwise_xor.accumulate(codes == ord('"')))
        marks = (codes == ord(self._separator)) | (codes == ord("\n"))
        ends = np.flatnonzero(marks if outside is None else marks & outside)
        if self._separator == BLANK or not _is_grid(codes[ends], self._width):
            blocks = list(self._by_csv(iter(io.StringIO(text)), line))
            return pl.concat([frame for frame, _ in blocks]), np.concatenate([lines for _, lines in blocks])
        frame = pl.read_csv(
            io.BytesIO(raw),
            separator=self._separator,
            has_header=False,
            quote_char=None if outside is None else '"',
            schema=dict.fromkeys(self._names, pl.String),
        ).rechunk()
        lines = line + np.arange(frame.height)
        if outside is not None:
            starts = np.append(0, ends[self._width - 1 :: self._width][:-1] + 1)
            lines = line + np.searchsorted(np.flatnonzero(codes == ord("\n")), starts)
        low = np.count_nonzero(codes <= ord(" "))  # with the ends: there are no others, or there may be blanks to trim
        known = len(ends) if self._separator == "\t" else frame.height
        return (frame if low == known and text.isascii() else _trimmed(frame)), lines

    def _by_csv(self, text: Iterator[str], line: int) -> Iterator[tuple[pl.DataFrame, Lines]]:
        rows: list[list[str]] = []
        lines: list[int] = []
        for here, row in self._numbered(text, line):
            if not row or (len(row) == 1 < self._width and not row[0].strip()):
                continue  # a blank line
            if (cells := self._fitted(row)) is None:
                self.ragged.append((here, len(row)))
            else:
                rows.append(cells)
                lines.append(here)
            if len(rows) == SLOW_ROWS:
                yield self._frame(rows), np.array(lines)
                rows, lines = [], []
        yield self._frame(rows), np.array(lines, np.int64)

    def _numbered(self, text: Iterator[str], line: int) -> Iterator[tuple[int, list[str]]]:
        """Rows, and the line on which each begins."""
        reader = _reader(chain(text, ["\n", LAST + "\n"]), self._separator)
        here = line
        try:
            for row in reader:
                if row == [LAST]:
                    return
                if row and LAST in row[-1]:
                    raise self._unclosed(here)
                yield here, row
                here = line + reader.line_num
        except csv.Error as error:  # a cell of more than `LONGEST_ROW`
            raise self._unclosed(here) from error

    def _fitted(self, row: list[str]) -> list[str] | None:
        """A row of the right width, if it can be one."""
        if len(row) == self._width:
            return row
        if len(row) > self._width:
            return None if any(map(str.strip, row[self._width :])) else row[: self._width]
        return row + [""] * (self._width - len(row)) if len(row) >= self._least else None

    def _frame(self, rows: list[list[str]]) -> pl.DataFrame:
        columns = zip(*rows, strict=True) if rows else ((),) * self._width
        made = [pl.Series(name, cells, dtype=pl.String) for name, cells in zip(self._names, columns, strict=True)]
        return _trimmed(pl.DataFrame(made))

    def _unclosed(self, line: int) -> DataError:
        return DataError(
            f"{self._path.name}: line {line}: a quote that begins a cell here is never closed, or not within "
            f"{LONGEST_ROW:,} characters"
        )


class _Quotes:
    """The quotes of a text that begins with a row: are they as they should be, and where does its last row end?"""

    def __init__(self, text: str, separator: str) -> None:
        if '"' not in text:
            self.usual, self.open, self.last, self.end = True, False, 0, text.rfind("\n") + 1
            return
        codes = np.frombuffer(("\n" + text + "\n").encode("utf-32-le"), np.uint32)
        where = np.flatnonzero(codes == ord('"'))
        opening, closing = where[::2], where[1::2]
        ends = [ord(separator), ord("\n")]
        # Between a closing and the next opening quote that follows it at once, the two are one in the cell.
        begins = np.isin(codes[opening - 1], [*ends, ord('"')])
        begins[1:] &= (codes[opening[1:] - 1] != ord('"')) | (opening[1:] - 1 == closing[: len(opening) - 1])
        begins[:1] &= codes[opening[:1] - 1] != ord('"')
        finishes = np.isin(codes[closing + 1], [*ends, ord('"')])
        self.open = len(where) % 2 == 1
        self.usual = bool(begins.all() and finishes.all())
        self.last = int(where[-1]) - 1
        inside = np.searchsorted(where, breaks := np.flatnonzero(codes[1:-1] == ord("\n")) + 1) % 2 == 1
        self.end = int(breaks[~inside][-1]) if (~inside).any() else 0


def _is_grid(marks: NDArray[np.uint8], width: int) -> bool:
    """Do line ends and separators, in their order, make rows of `width` fields, none of them blank?"""
    if len(marks) % width or width == 1:
        return False
    grid = marks.reshape(-1, width) == ord("\n")
    return bool(grid[:, -1].all() and not grid[:, :-1].any())


def _trimmed(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.all().str.strip_chars())
