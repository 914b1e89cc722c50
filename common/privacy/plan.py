"""What a run will cost a row and how much noise that needs, from the federation and a number of rows alone.

A client plans its own run with this (client/account/plan.py); `cloister plan` asks it before anything runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from common.document.federation import Federation, RowPrivacy
from common.privacy.releases import GaussianRelease, calibrate, epsilon, evaluation_release

ATTEMPTS = 3  # spare ones, unless a policy says otherwise
ROUNDS_AN_ATTEMPT = 10  # for each so many rounds at most one is spare: in 3 rounds, 3 would cost 15 % more noise


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will release about a row, fixed before its first round. All of it may be told."""

    rows: int  # the released row count of the training part; 0 if none is told
    sampling_rate: float
    noise_multiplier: float
    steps: int  # in each round
    rounds: int
    evaluation_noise: float
    evaluations: int
    count_epsilon: float
    delta: float
    attempts: int = 0  # spare ones: so often a round may be charged again, by a client that died in it
    evaluation_attempts: int = 0

    @property
    def most_updates(self) -> int:
        """Rounds, and those of them that are tried again."""
        return self.rounds + self.attempts

    @property
    def most_evaluations(self) -> int:
        return self.evaluations + self.evaluation_attempts

    @property
    def update(self) -> GaussianRelease:
        """One round's release."""
        return GaussianRelease(
            noise_multiplier=self.noise_multiplier, sampling_rate=self.sampling_rate, steps=self.steps
        )

    @lru_cache(maxsize=4096)  # noqa: B019  # plans are small, and equal ones share what was computed
    def epsilon(self, *, rounds: int, evaluations: int) -> float:
        """What so much of the plan costs a row, which is in one part while the table stays as it is."""
        updates = epsilon([replace(self.update, steps=self.steps * rounds)], self.delta)
        counts = GaussianRelease(noise_multiplier=self.evaluation_noise, steps=evaluations) if evaluations else None
        return max(self.count_epsilon + updates, epsilon([counts], self.delta) if counts else 0.0)

    @property
    def total(self) -> float:
        """What all of it costs a row, at most, whenever it stops."""
        return self.epsilon(rounds=self.most_updates, evaluations=self.most_evaluations)


def row_privacy(federation: Federation) -> RowPrivacy:
    """The federation's promise about a row; only a private federation is planned."""
    row = federation.privacy.row
    assert row is not None, "only a private federation has a budget"
    return row


def plan_for(
    federation: Federation, *, rows: int, epsilon: float, evaluate: bool = True, attempts: int = ATTEMPTS
) -> Plan:
    """The plan with the least noise for which row count and updates cost at most `epsilon`.

    Args:
        rows: of the training part, as told; not used where the federation gives a sampling rate.
        evaluate: whether evaluations may leave.
        attempts: how often a client that died in a round may try it again, at most; paid for in noise. Evaluations have
            as many, if `epsilon` covers them: their noise is the federation's to choose.

    Raises:
        PrivacyError: no noise keeps to `epsilon`, or the evaluations alone cost more than the federation's.
    """
    row, training = row_privacy(federation), federation.training
    rate = row.sampling_rate or min(1.0, training.batch_size / rows)
    steps = training.steps(rate)
    attempts = spare_attempts(training.rounds, most=attempts)
    all_steps = steps * (training.rounds + attempts)
    evaluation = evaluation_release(federation) if evaluate else None
    count_epsilon = row.count_epsilon or 0.0
    return Plan(
        rows=0 if row.sampling_rate else rows,
        sampling_rate=rate,
        noise_multiplier=calibrate(epsilon - count_epsilon, row.delta, sampling_rate=rate, steps=all_steps),
        steps=steps,
        rounds=training.rounds,
        evaluation_noise=evaluation.noise_multiplier if evaluation else 0.0,
        evaluations=evaluation.steps if evaluation else 0,
        count_epsilon=count_epsilon,
        delta=row.delta,
        attempts=attempts,
        evaluation_attempts=_spare(evaluation, attempts, epsilon, row.delta) if evaluation else 0,
    )


def spare_attempts(rounds: int, *, most: int = ATTEMPTS) -> int:
    """How many of the attempts that a policy allows are planned for so many rounds."""
    return min(most, math.ceil(rounds / ROUNDS_AN_ATTEMPT))


def _spare(evaluation: GaussianRelease, most: int, limit: float, delta: float) -> int:
    """How many more evaluations keep to the limit."""
    return next(
        (n for n in range(most, 0, -1) if epsilon([replace(evaluation, steps=evaluation.steps + n)], delta) <= limit), 0
    )
