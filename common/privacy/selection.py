"""What it costs a row to choose among runs that were trained on it, such as by their settings.

Whoever trains k models and keeps the best has released something of all k. Two ways to account for that:

    all         the releases of all k runs together
    tournament  a random number K of runs, geometric with mean k, each with settings drawn anew, and only the best is
                kept (Papernot and Steinke 2022, arXiv:2110.03620, theorem 2 with eta = 1). If one run costs a row at
                most rho(a) in Rényi divergence of order a, the best costs at most, for any second order b,

                    rho(a) + 2 (1 - 1/b) rho(b) + 2 log(k) / b + log(k) / (a - 1)

                which grows with the logarithm of k: of few runs it is more than all of them cost. What runs are
                compared by is part of a run: scores on private rows carry noise and are charged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from common.document.federation import Federation
from common.privacy.accountants import ORDERS, Floats, converted, divergences
from common.privacy.plan import plan_for, row_privacy
from common.privacy.releases import GaussianRelease, epsilon


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """What choosing among `runs` would cost a row, each of which costs at most `one`."""

    runs: int
    one: float
    all: float
    tournament: float
    delta: float

    @property
    def words(self) -> str:
        """It as a sentence."""
        return (
            f"If these rows were private, choosing among the {self.runs} points would have its own price. All "
            f"{self.runs} runs together cost a row epsilon {self.all:.3g} at delta {self.delta:g}, where one costs "
            f"{self.one:.3g}; a private tournament of {self.runs} runs on average costs {self.tournament:.3g} "
            "(Papernot and Steinke 2022), if the scores that it compares are as private."
        )


def choosing(federations: Sequence[Federation], *, rows: int) -> Choosing | None:
    """Among federations, each of which is one run; None if there is nothing to choose, or one is not private by row.

    Args:
        rows: that a client trains on, about.
    """
    if len(federations) < 2 or any(each.privacy.row is None for each in federations):
        return None
    delta = max(row_privacy(each).delta for each in federations)
    plans = [plan_for(each, rows=rows, epsilon=row_privacy(each).epsilon) for each in federations]
    runs = [replace(plan.update, steps=plan.steps * plan.rounds) for plan in plans]
    counts = [plan.count_epsilon for plan in plans]
    return Choosing(
        runs=len(runs),
        one=max(epsilon([run], delta) + count for run, count in zip(runs, counts, strict=True)),
        all=epsilon(runs, delta) + max(counts),  # rows are counted once
        tournament=tournament(runs, delta, mean=len(runs)) + max(counts),
        delta=delta,
    )


def tournament(runs: Sequence[GaussianRelease], delta: float, *, mean: float) -> float:
    """The epsilon of the best of a random number of runs, `mean` on average, each of which is one of `runs`."""
    each: Floats = np.max([divergences(((r.noise_multiplier, r.sampling_rate, r.steps),)) for r in runs], axis=0)
    order = np.array(ORDERS, dtype=float)
    second = float(np.min(2 * (1 - 1 / order) * each + 2 * np.log(mean) / order))
    return converted(each + second + np.log(mean) / (order - 1), delta)
