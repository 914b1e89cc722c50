"""How a sweep's runs ended, and what a point's runs say together."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from common.model.scores import Scores
from simulations.sweeps.points import Point


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one run ended."""

    metrics: Scores = field(default_factory=dict)  # of the last model, exactly
    epsilon: dict[str, float] = field(default_factory=dict)  # by unit: row, client
    rounds: int = 0
    clients: int = 0
    seconds: float = 0.0
    error: str = ""  # why it has no model


@dataclass(frozen=True, kw_only=True)
class Result:
    """A point, and the outcomes of its runs by their seeds."""

    point: Point
    outcomes: dict[int, Outcome]

    @property
    def is_whole(self) -> bool:
        """Has every seed a model?"""
        return len(self.complete) == len(self.outcomes)

    @property
    def complete(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes.values() if not outcome.error]

    def values(self, metric: str) -> list[float]:
        """One of each run that has any."""
        return [float(outcome.metrics[metric]) for outcome in self.complete if metric in outcome.metrics]

    def mean(self, metric: str) -> float | None:
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    def deviation(self, metric: str) -> float | None:
        """Of the runs, as a sample (n - 1); None of fewer than two."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else None
