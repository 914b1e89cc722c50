"""`training.augmentation` of the federation document: rows that are changed at random before a step uses them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from common.document.documents import Document
from common.document.mistakes import Problem
from common.document.numbers import Fraction, NonNegative, Whole

MOST_COPIES = 16


class Augmentation(Document):
    """Rows are changed at random each time that a step takes them. With `privacy.row` several changed copies of a row
    are averaged before its clip, so that it still counts once (De et al. 2022, arXiv:2204.13650)."""

    copies: Annotated[int, Field(ge=1, le=MOST_COPIES)] = 1  # of each row in a step; their gradients are averaged
    jitter: NonNegative = 0.0  # standard deviation of noise on numbers, where 1 is half of a column's range; clamped
    drop: Fraction = 0.0  # the chance of each column to count as missing
    shift: Whole = 0  # pixels, at most, by which an image moves each way; what comes in is the lower bound
    flip: bool = False  # is an image mirrored, left to right, every other time?
    # Beta(mixup, mixup) draws how rows are mixed two by two, with their targets; not with privacy.row.
    mixup: NonNegative = 0.0

    @property
    def changes_rows(self) -> bool:
        """Is anything of a row by itself changed?"""
        return bool(self.jitter or self.drop or self.shift or self.flip)

    @property
    def words(self) -> str:
        """It in a few words."""
        parts = [
            f"{name} {getattr(self, name):g}" for name in ("jitter", "drop", "shift", "mixup") if getattr(self, name)
        ]
        parts += ["flip"] if self.flip else []
        return f"{self.copies} {'copy' if self.copies == 1 else 'copies'} of each, {', '.join(parts) or 'by dropout'}"

    def contradictions(self) -> Iterator[Problem]:
        if not (self.changes_rows or self.mixup or self.copies > 1):
            yield (), "changes nothing; give jitter, drop, shift, flip or mixup, or leave it out"
