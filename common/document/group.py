"""A column by whose values evaluations compare how the model does for different people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated

from pydantic import BeforeValidator, Field

from common.document.documents import Document
from common.document.mistakes import Problem
from common.document.values import Labelled, by_label, problems_of_labels

OTHER = "(other)"  # the group of rows that are in none of those that are listed
MOST_GROUPS = 50


class Group(Document):
    """A column whose values divide rows into groups: `groups` by what stands there, or `cuts` for a number. It need not
    be a feature. What is in none of them, an empty cell above all, is a group of its own."""

    name: Annotated[str, Field(min_length=1)]  # of the column
    # From a group's name to the values that mean it; `[a, b]` is short for `{a: [a], b: [b]}`. Or `cuts`.
    groups: Annotated[Labelled | None, Field(min_length=1), BeforeValidator(by_label)] = None
    # Rising numbers: `[40, 60]` makes three groups, below 40, from 40 to below 60, and from 60. Or `groups`.
    cuts: Annotated[tuple[float, ...] | None, Field(min_length=1)] = None
    # Is it counted too how sure the model is of its predictions, or how far off they are to one side? One more count a
    # group, for which the noise of all is larger: sqrt(2) times with classes, sqrt(4 / 3) times with a number.
    calibration: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """The groups' names, `OTHER` last."""
        if self.groups is not None:
            return (*self.groups, OTHER)
        return (*between([repr(cut).removesuffix(".0") for cut in self.cuts or ()]), OTHER)

    def contradictions(self) -> Iterator[Problem]:
        if (self.groups is None) == (self.cuts is None):
            yield ("groups",), "or cuts: give exactly one of them"
            return
        if self.groups is not None:
            for key, sentence in problems_of_labels(self.groups, "group"):
                yield ("groups", *key), sentence
            if OTHER in self.groups:
                yield ("groups", OTHER), "is what rows are called that are in none of the groups"
        elif any(not a < b for a, b in pairwise(self.cuts or ())) or not all(map(math.isfinite, self.cuts or ())):
            yield ("cuts",), f"must be rising numbers (got {list(self.cuts or ())})"
        if len(self.labels) > MOST_GROUPS:
            yield ("groups" if self.groups is not None else "cuts",), f"make more than {MOST_GROUPS} groups"


def between(cuts: Sequence[str]) -> tuple[str, ...]:
    """What the parts between numbers are called, from the lowest."""
    middle = (f"{a} to below {b}" for a, b in pairwise(cuts))
    return (f"below {cuts[0]}", *middle, f"from {cuts[-1]}")
