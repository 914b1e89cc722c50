"""What a computation took: energy, and the greenhouse gas of making it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from common.model.scores import Scores


@dataclass(frozen=True, kw_only=True)
class Energy:
    """`joules` of electricity, and `grams` of CO2-equivalent that its generation gave off."""

    joules: float
    grams: float

    @classmethod
    def total(cls, parts: Iterable[Energy]) -> Energy:
        """Of several; nothing at all for none."""
        found = list(parts)
        return cls(joules=math.fsum(e.joules for e in found), grams=math.fsum(e.grams for e in found))

    @classmethod
    def of(cls, told: Mapping[str, float]) -> Energy:
        """As `told` has it."""
        return cls(joules=told["joules"], grams=told["grams"])

    def part(self, share: float) -> Energy:
        """A share of it."""
        return Energy(joules=self.joules * share, grams=self.grams * share)

    @property
    def told(self) -> dict[str, float]:
        """As it stands in JSON."""
        return asdict(self)

    def per_point(self, scores: Scores | None) -> Energy | None:
        """For each percentage point of accuracy that was reached; None without an accuracy, or with one of 0."""
        accuracy = (scores or {}).get("accuracy")
        return self.part(1 / (100 * accuracy)) if accuracy else None

    def __str__(self) -> str:
        return f"{amount(self.joules, 'J')}, {amount(self.grams, 'g')} CO2e"


def sum_of(*parts: Energy | None) -> Energy | None:
    """Of those that are known; None if none is."""
    known = [part for part in parts if part is not None]
    return Energy.total(known) if known else None


def amount(value: float, unit: str) -> str:
    """A figure for a person: `1.2 kJ`."""
    for factor, prefix in ((1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value * 1e6:.3g} \N{MICRO SIGN}{unit}" if value else f"0 {unit}"
