"""What a model's outputs are for: a head for each target."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Head:
    """The outputs of one target, which stand one after another with those of the others: `width` of them, and how much
    its loss weighs."""

    loss: str
    width: int
    weight: float


Loss = str | tuple[Head, ...]  # of one target, or of several
