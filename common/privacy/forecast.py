"""What a federation would cost a row, before anything runs, and what other choices would need."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.document import federation as federations
from common.document.federation import Federation
from common.errors import PrivacyError
from common.privacy import reach
from common.privacy.plan import Plan, plan_for, row_privacy, spare_attempts
from common.privacy.releases import calibrate, client_releases

REVERSE_NOISE = (0.6, 0.8, 1.0, 1.5, 2.0, 4.0)
MOST_ROUNDS = 1_000_000


def load(path: Path, *, epsilon: float | None) -> Federation:
    """A federation file, with another epsilon for each row if one is given. Raises `ConfigError`, `PrivacyError`."""
    federation = federations.load(path)
    row = federation.privacy.row
    if epsilon is None or row is None:
        return federation
    least = 2 * (row.count_epsilon or 0.0)
    if not (least <= epsilon < math.inf and epsilon > 0):
        raise PrivacyError(f"--epsilon must be above 0 and at least twice count_epsilon, {least:g}; got {epsilon:g}")
    privacy = federation.privacy.model_copy(update={"row": row.model_copy(update={"epsilon": epsilon})})
    return federation.model_copy(update={"privacy": privacy})


def forecast(federation: Federation, rows: int) -> dict[str, Any]:
    """What the federation would cost a table of so many rows, and what other choices would need.

    Raises:
        PrivacyError: the federation is not private, or the table does not suit it.
    """
    row, training = federation.privacy.row, federation.training
    if row is None:
        raise PrivacyError("privacy.row is null: the federation trains without noise, so there is nothing to plan")
    part = round(rows * (1 - federation.data_schema.validation_fraction))
    if row.sampling_rate is None and part < training.batch_size:
        raise PrivacyError(
            f"a table of {rows} rows has about {part} to train on, fewer than training.batch_size {training.batch_size}"
        )
    if row.delta * part > 1:
        raise PrivacyError(f"privacy.row.delta {row.delta:g} is above 1 / rows, {1 / part:.2g}; no client would agree")
    plan = plan_for(federation, rows=part, epsilon=row.epsilon)
    updates = plan.epsilon(rounds=plan.most_updates, evaluations=0)
    return {
        "federation": federation.name,
        "rows": rows,
        "training_rows": part,
        "limit": row.epsilon,
        "delta": row.delta,
        "clip": row.clip,
        "rounds": plan.rounds,
        "attempts": plan.attempts,
        "steps": plan.steps,
        "sampling_rate": plan.sampling_rate,
        "noise_multiplier": plan.noise_multiplier,
        "epsilon": plan.total,
        "of_which": {"row_count": plan.count_epsilon, "updates": updates - plan.count_epsilon},
        "evaluations": {
            "times": plan.evaluations,
            "attempts": plan.evaluation_attempts,
            "noise_multiplier": plan.evaluation_noise,
            "epsilon": plan.epsilon(rounds=0, evaluations=plan.most_evaluations) if plan.evaluations else 0.0,
        },
        "client": _client(federation),
        "reverse": [
            {"noise_multiplier": noise, "rounds": rounds_within(plan, noise, row.epsilon)} for noise in REVERSE_NOISE
        ],
        "alternatives": _alternatives(federation, part),
        "reach": reach.reach(federation, steps=plan.steps),
        "warning": reach.warning(federation, steps=plan.steps),
    }


def rounds_within(plan: Plan, noise_multiplier: float, limit: float) -> int:
    """How many rounds of that noise cost a row at most `limit`; `MOST_ROUNDS` stands for that many or more."""

    def fits(rounds: int) -> bool:
        noisy = replace(plan, noise_multiplier=noise_multiplier)
        return noisy.epsilon(rounds=rounds + spare_attempts(rounds), evaluations=0) <= limit

    low, high = 0, 1
    while fits(high):
        if high >= MOST_ROUNDS:
            return MOST_ROUNDS
        low, high = high, 2 * high
    while high - low > max(1, low // 500):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _client(federation: Federation) -> dict[str, float] | None:
    whole = federation.privacy.client
    if whole is None:
        return None
    updates, _ = client_releases(federation)
    return {
        "epsilon": whole.epsilon,
        "delta": whole.delta,
        "noise_multiplier": updates.noise_multiplier,
        "sampling_rate": updates.sampling_rate,
    }


def _alternatives(federation: Federation, part: int) -> list[dict[str, Any]]:
    """The noise that other numbers of rounds, batch sizes and epsilons would need: by RDP, which is quick."""
    row, training = row_privacy(federation), federation.training
    found = []
    for rounds in _around(training.rounds):
        for batch in _around(training.batch_size):
            rate = row.sampling_rate or min(1.0, batch / part)
            steps = _with_batch(federation, batch).training.steps(rate) * (rounds + spare_attempts(rounds))
            noise = {
                f"{target:g}": calibrate(
                    target - (row.count_epsilon or 0.0), row.delta, sampling_rate=rate, steps=steps, accountant="rdp"
                )
                for target in (row.epsilon / 2, row.epsilon, row.epsilon * 2)
                if target > (row.count_epsilon or 0.0)
            }
            found.append({"rounds": rounds, "batch_size": batch, "noise_multiplier": noise})
    return found


def _with_batch(federation: Federation, batch: int) -> Federation:
    """The federation with another batch size."""
    return federation.model_copy(update={"training": federation.training.model_copy(update={"batch_size": batch})})


def _around(value: int) -> list[int]:
    return sorted({max(1, math.ceil(value / 2)), value, 2 * value})
