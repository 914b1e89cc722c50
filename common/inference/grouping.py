"""Rows of a table in groups, by any of its columns: each value a group, or numbers by where they are cut."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.data.cells import Cells
from common.data.encoding import check_column, group_of, missing_of
from common.data.tables import Table
from common.document.group import Group, between
from common.document.schema import Schema
from common.errors import ConfigError

EMPTY = "(empty)"


class Groups(Protocol):
    """How a table's rows fall into groups."""

    @property
    def column(self) -> str: ...

    @property
    def name(self) -> str:
        """What the groups are told by."""

    def groups(self, cells: Cells, schema: Schema) -> NDArray[np.object_]:
        """The group of each row, as text."""

    def ordered(self, groups: Iterable[str]) -> list[str]:
        """Groups in the order in which a reader looks for them."""


@dataclass(frozen=True)
class Declared:
    """The groups that a federation's schema declares, in its order."""

    group: Group

    @property
    def column(self) -> str:
        return self.group.name

    @property
    def name(self) -> str:
        return self.group.name

    def groups(self, cells: Cells, schema: Schema) -> NDArray[np.object_]:
        return np.array(self.group.labels, object)[group_of(cells, schema, self.group)]

    def ordered(self, groups: Iterable[str]) -> list[str]:
        names = set(groups)
        return [label for label in self.group.labels if label in names]


@dataclass(frozen=True)
class Grouping:
    """A column whose values divide a table's rows into groups, by themselves or (numbers) by where they are cut."""

    column: str
    cuts: tuple[str, ...] = ()  # numbers as they were given

    @classmethod
    def parse(cls, text: str, table: Table) -> Grouping:
        """`sex`, or `age:40,60` for below 40, from 40 to below 60, and from 60. Raises `ConfigError` or `DataError`."""
        name, colon, cuts = text.rpartition(":")
        if text in table.types or not colon:
            name, cuts = text, ""
        check_column(table, name, asked=f"--by {text}")
        made = cls(name, tuple(cut.strip() for cut in cuts.split(",")) if cuts else ())
        places = made.places
        if any(not a < b for a, b in pairwise(places)) or not all(map(math.isfinite, places)):
            raise ConfigError([f"--by {text}: after the colon expected rising numbers, as in {name}:40,60"])
        return made

    @property
    def name(self) -> str:
        """How it was asked for."""
        return f"{self.column}:{','.join(self.cuts)}" if self.cuts else self.column

    @property
    def places(self) -> list[float]:
        """The cuts as numbers; NaN for one that is none."""
        found = []
        for cut in self.cuts:
            try:
                found.append(float(cut))
            except ValueError:
                found.append(math.nan)
        return found

    @property
    def parts(self) -> tuple[str, ...]:
        """The groups between the cuts, from the lowest."""
        if not self.cuts:
            return ()
        return between(self.cuts)

    def groups(self, cells: Cells, schema: Schema) -> NDArray[np.object_]:
        """The group of each row, as text. What the schema calls missing is empty."""
        feature = next((feature for feature in schema.features if feature.name == self.column), None)
        empty = cells.empty() if feature is None else missing_of(cells, feature)
        if not self.cuts:
            return np.where(empty, EMPTY, cells.names().to_numpy())
        parts = np.array(self.parts, object)[np.searchsorted(self.places, cells.number, "right")]
        return np.where(np.isfinite(cells.number) & ~empty, parts, EMPTY)

    def ordered(self, groups: Iterable[str]) -> list[str]:
        """Groups as a reader looks for them: parts in order, numbers by size, texts by name; what is empty last."""
        names = set(groups)

        def by_value(name: str) -> tuple[bool, float, str]:
            try:
                return False, float(name), name
            except ValueError:
                return True, 0.0, name

        found = [name for name in self.parts if name in names]
        found += sorted(names - {*self.parts, EMPTY}, key=by_value)
        return found + [EMPTY] * (EMPTY in names)
