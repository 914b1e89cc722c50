"""How a round trains and how a model is scored: all that is needed besides weights, rows and noise.

Only a charge makes these (client/account/account.py), so nothing is trained that was not paid for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.document.federation import Federation
from common.document.strategy import FedProx

Arithmetic = Literal["exact", "opacus"]


@dataclass(frozen=True, kw_only=True)
class DPSGD:
    """Differentially private SGD (Abadi et al. 2016, arXiv:1607.00133, algorithm 1).

    Each of `steps` steps draws rows by Poisson sampling at `sampling_rate`, clips each row's gradient to L2
    norm `clip`, adds N(0, (noise_multiplier * clip)^2 I) to the sum, and divides by `expected_batch_size`, a
    public number. In exact arithmetic all of it is on a lattice (kernel.py); Opacus' own is in floating point.
    """

    steps: int
    sampling_rate: float
    clip: float
    noise_multiplier: float
    expected_batch_size: int
    arithmetic: Arithmetic = "exact"


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What a learning rate that changes follows: the round, and what a plateau has brought it down to."""

    round: int = 1
    factor: float = 1.0  # above 0 and at most 1; only the server knows it, from evaluations


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One round of training at one site: `steps` steps as the document says, by `private` if it is not None.

    `weight` is what the update counts among others.
    """

    federation: Federation
    steps: int
    weight: float
    private: DPSGD | None
    pace: Pace = Pace()

    def learning_rate(self, step: int) -> float:
        """The optimizer's at a step of the round, counted from 0."""
        return self.federation.training.rate_at(self.pace.round, step) * self.pace.factor

    @property
    def proximal_mu(self) -> float:
        """FedProx' factor; 0 for other strategies."""
        strategy = self.federation.strategy
        return strategy.proximal_mu if isinstance(strategy, FedProx) else 0.0


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """One evaluation at one site: counts of right and wrong, with noise of `noise_multiplier`, or None exactly."""

    federation: Federation
    noise_multiplier: float | None
    arithmetic: Arithmetic = "exact"  # of private ones
