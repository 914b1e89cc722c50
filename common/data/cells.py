"""What a cell means: a number, a truth value, a text, or nothing. One rule for features, targets, markers, partitions
and drafts, and the same for CSV, where every cell is text, as for tables with types.

    nothing       an empty cell, a null, or NaN: a number that is missing, however it is spelled
    number        whatever is written as a decimal number, with or without blanks around it
    truth value   true and false (also True, TRUE, ...), which are the numbers 1 and 0
    text          the rest; also numbers with leading zeros, where a schema lists such codes as text

Which cells a value of a schema stands for is in common/document/values.py. What a cell means never depends on another
cell, so adding a row changes the meaning of none.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from common.document import values
from common.document.values import NOT_A_NUMBER, TRUTH, Scalar, meaning_of

Mask = NDArray[np.bool_]

BLANKS = " '\u00a0\u202f"  # what may stand between groups of digits, beside a point or a comma
CODE = f"^{values.CODE.pattern}"


@dataclass(frozen=True)
class Decimals:
    """How numbers with a decimal comma, or with groups of digits, are read.

    After a point, commas group digits: 1,234.5. After a comma, points do: 1.234,5. Then 1.234 could be either; it is
    1.234, unless the comma was `declared`.
    """

    mark: Literal[".", ","] = "."
    declared: bool = False

    def read(self, text: pl.Series) -> pl.Series:
        """The numbers that are written so, float64; null where a cell is none."""
        mark, group = (r"\.", ",") if self.mark == "." else (",", r"\.")
        fits = text.str.contains(rf"^[+-]?[0-9]{{1,3}}([{group}{BLANKS}][0-9]{{3}})+({mark}[0-9]*)?$")
        if self.mark == ",":
            fits |= text.str.contains(r"^[+-]?([0-9]+,[0-9]*|,[0-9]+)([eE][+-]?[0-9]+)?$")
        digits = text.str.replace_all(rf"[{group}{BLANKS}]", "").str.replace(",", ".", literal=True)
        return digits.cast(pl.Float64, strict=False).set(~fits, None)


POINT = Decimals()


@dataclass(frozen=True)
class Cells:
    """One column, as `tidy` leaves it."""

    column: pl.Series
    decimals: Decimals = POINT

    @cached_property
    def text(self) -> pl.Series:
        """As text; "" where there is nothing."""
        column = self.column.fill_nan(None) if self.column.dtype.is_float() else self.column
        return column.cast(pl.String).fill_null("")

    @cached_property
    def number(self) -> NDArray[np.float64]:
        """As numbers, float64 [rows]; NaN where a cell is none."""
        if self.has_numbers:
            number: NDArray[np.float64] = self.column.cast(pl.Float64).fill_null(np.nan).to_numpy()
            return number
        if not self.is_text:
            return np.full(len(self.column), np.nan)
        read = self.text.cast(pl.Float64, strict=False)
        if self.decimals.declared:  # 1.234 may be 1234
            read = self.decimals.read(self.text).fill_null(read) if self.decimals.mark == "," else read
        number = read.fill_null(np.nan).to_numpy().copy()
        unread = (read.is_null() & (self.text != "")).arg_true()
        if len(unread):
            rest = self.text.gather(unread)
            truth = rest.replace_strict(TRUTH, default=None, return_dtype=pl.Float64)
            number[unread.to_numpy()] = truth.fill_null(self.decimals.read(rest)).fill_null(np.nan).to_numpy()
        return number

    @property
    def is_text(self) -> bool:
        return self.column.dtype == pl.String

    @property
    def has_numbers(self) -> bool:
        """Is it typed, as numbers or truth values?"""
        return self.column.dtype.is_numeric() or self.column.dtype == pl.Boolean

    def empty(self, but: Collection[Scalar] = ()) -> Mask:
        """Where there is nothing. Texts of `but` are something, even if they spell a number that is missing."""
        if not self.is_text:
            column = self.column.fill_nan(None) if self.column.dtype.is_float() else self.column
            return column.is_null().to_numpy()
        empty: Mask = (self.text == "").to_numpy()
        for spelling in NOT_A_NUMBER:
            if spelling not in but:
                empty = empty | (self.text == spelling).to_numpy()
        return empty

    def means(self, value: Scalar) -> Mask:
        """Where a cell is what a value of a schema stands for."""
        meaning = meaning_of(value)
        same: Mask = np.zeros(len(self.column), np.bool_)
        if not self.has_numbers:
            same = (self.text == meaning.text).to_numpy()
        if meaning.number is not None:
            equal = self.number == meaning.number
            if not meaning.any_spelling and self.is_text:
                equal &= ~self.text.str.contains(CODE).to_numpy()
            same = same | equal
        return same

    def names(self) -> pl.Series:
        """One text for each meaning: 1 for 1, 1.0 and 1e0, and true for True."""
        number = pl.Series(self.number).fill_nan(None)
        number = number.set(~number.is_finite().fill_null(False), None)
        shortest = number.cast(pl.String).str.strip_suffix(".0")
        if self.is_text:
            truth = self.text.replace_strict({word: word.lower() for word in TRUTH}, default=None)
            code = self.text.str.contains(CODE)
            return truth.fill_null(shortest.set(code, None)).fill_null(self.text)
        return self.text if self.column.dtype == pl.Boolean else shortest.fill_null(self.text)


def holds_cells(dtype: pl.DataType) -> bool:
    """Are values of this type text, numbers, truth values or dates, rather than lists, bytes or durations?"""
    return not (dtype.is_nested() or dtype in (pl.Binary, pl.Object, pl.Duration))


def could_be(value: Scalar, dtype: pl.DataType) -> bool:
    """Could a cell of a column of this type be what a value of a schema stands for?"""
    number = meaning_of(value).number
    if dtype == pl.Boolean:
        return number in (0.0, 1.0)
    if dtype.is_integer():
        return number is not None and number.is_integer()
    if dtype.is_numeric():
        return number is not None
    return not dtype.is_temporal() or isinstance(value, str)


def tidy(frame: pl.DataFrame) -> pl.DataFrame:
    """A table with text trimmed, and few types: text, truth values, integers, float64, dates and times.

    Numbers of other types become those that they are written as: 0.1 as float32 is not 0.1, but stands for it.
    Columns that hold no cells stay as they are.
    """
    return frame.with_columns(_tidied(pl.col(name), dtype) for name, dtype in frame.schema.items())


def _tidied(column: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    if not holds_cells(dtype):
        return column
    if dtype.is_decimal() or (dtype.is_float() and dtype != pl.Float64):
        return column.cast(pl.String).cast(pl.Float64)
    if dtype in (pl.String, pl.Categorical, pl.Enum, pl.Null, pl.Int128, pl.UInt128):
        return column.cast(pl.String).str.strip_chars()
    return column
