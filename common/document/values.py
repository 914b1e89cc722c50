"""What a value in a schema means: which cells it stands for. common/data/cells.py is the other side.

A number stands for every cell that is this number, however it is spelled: 1, 1.0, 01 and 1e0. `true` and `false` are
the numbers 1 and 0, as they are in most tables. Text stands for cells of the same text; text that is itself a number as
one is usually written ("1", "-999") stands for such numbers too, so that a quote around a number changes nothing. Text
with leading zeros is a code, and no number: "01" is the cell 01 alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from common.document.mistakes import Problem

Scalar = bool | int | float | str
Labelled = dict[str, tuple[Scalar, ...]]  # from a label to the values that mean it

TRUTH = {"true": 1.0, "True": 1.0, "TRUE": 1.0, "false": 0.0, "False": 0.0, "FALSE": 0.0}
NOT_A_NUMBER = ("nan", "NaN", "NAN")  # how tables spell a number that is missing
CODE = re.compile(r"[-+]?0[0-9]")  # how text begins that is no number to who compares text
_USUAL = re.compile(r"[-+]?(0|[1-9][0-9]*)?(\.[0-9]*)?")


@dataclass(frozen=True)
class Meaning:
    """The cells of text `text`, and those that are `number`: all of them if `any_spelling`, else not the codes."""

    text: str
    number: float | None
    any_spelling: bool


def meaning_of(value: Scalar) -> Meaning:
    """Which cells a value stands for."""
    if isinstance(value, bool):
        return Meaning(spelled(value), float(value), True)
    if not isinstance(value, str):
        return Meaning(spelled(value), float(value), True)
    if value in TRUTH:
        return Meaning(value, TRUTH[value], False)
    number = _number(value) if _USUAL.fullmatch(value) else None
    return Meaning(value, number, False)


def spelled(value: Scalar) -> str:
    """A value as it stands in a document."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def may_be_number(value: Scalar) -> bool:
    """Could a cell that is a number be what the value stands for?"""
    meaning = meaning_of(value)
    return meaning.number is not None or _number(meaning.text) is not None


def agree(one: Scalar, other: Scalar) -> bool:
    """Could one cell mean both?"""
    a, b = meaning_of(one), meaning_of(other)
    if a.text == b.text:
        return True
    return any(_stands_for(number, text) for number, text in ((a, b), (b, a)))


def by_label(value: object) -> object:
    """What a document gives for `Labelled`: `[a, b]` is short for `{a: [a], b: [b]}`."""
    if isinstance(value, list):
        if len({spelled(v) for v in value}) < len(value):
            raise ValueError("must all differ")
        return {spelled(v): (v,) for v in value}
    if isinstance(value, dict):  # past this point pydantic takes tuples for tuples only
        return {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
    return value


def problems_of_labels(labels: Mapping[str, tuple[Scalar, ...]], what: str) -> Iterator[Problem]:
    """What is wrong with the values of labels, each of which is a `what`."""
    for label, values in labels.items():
        if not values:
            yield (label,), "needs at least one value"
    for (first, some), (label, values) in combinations(labels.items(), 2):
        for value in values:
            if any(agree(value, other) for other in some):
                yield (label,), f"shares the value {spelled(value)} with {what} {first}"


def _stands_for(meaning: Meaning, other: Meaning) -> bool:
    """Does a number stand for a cell that is spelled as another value is?"""
    if meaning.number is None:
        return False
    if other.number is not None:
        return meaning.number == other.number
    code = CODE.match(other.text) is not None and not meaning.any_spelling
    return not code and meaning.number == _number(other.text)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
