"""What a run will cost a row and how much noise that needs, from the federation and a number of rows alone.

A client plans its own run with this (client/account/plan.py); `cloister plan` asks it before anything runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.document import federation as federations
from common.document.federation import Federation, RowPrivacy
from common.errors import PrivacyError
from common.privacy import reach
from common.privacy.releases import GaussianRelease, calibrate, client_releases, epsilon, evaluation_release

REVERSE_NOISE = (0.6, 0.8, 1.0, 1.5, 2.0, 4.0)
MOST_ROUNDS = 1_000_000
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


def lines(forecast: dict[str, Any]) -> list[str]:
    """`forecast` for a person."""
    f = forecast
    out = [
        f"a table of {f['rows']} rows, about {f['training_rows']} to train on, in federation {f['federation']}:",
        f"  {f['rounds']} rounds of {f['steps']} steps, sampling rate {f['sampling_rate']:.3f}, "
        f"noise multiplier {f['noise_multiplier']:.2f}, clip {f['clip']:g}",
        f"  and {f['attempts']} spare attempts at a round, for a client that dies in one",
        f"  costs a row epsilon {f['epsilon']:.2f} at delta {f['delta']:g}: {f['of_which']['row_count']:.2f} for the "
        f"row count and {f['of_which']['updates']:.2f} for the updates",
    ]
    if f["evaluations"]["times"]:
        e = f["evaluations"]
        out.append(
            f"  or, if it is a validation row, {e['epsilon']:.2f} for {e['times']} evaluations, and {e['attempts']} "
            f"spare attempts, at noise {e['noise_multiplier']:g}"
        )
    if f["client"]:
        c = f["client"]
        out.append(
            f"  and the server protects whole clients: epsilon {c['epsilon']:g} at delta {c['delta']:g}, noise "
            f"multiplier {c['noise_multiplier']:.2f}, asked with probability {c['sampling_rate']:g}"
        )
    out += ["", f"rounds within epsilon {f['limit']:g} at a noise multiplier of"]
    out.append("  " + "  ".join(f"{r['noise_multiplier']:>8g}" for r in f["reverse"]))
    out.append("  " + "  ".join(f"{_rounds(r['rounds']):>8}" for r in f["reverse"]))
    out += ["", "noise multiplier needed (by RDP: a client finds a few percent less)"]
    out.append(
        f"  {'rounds':>8}{'batch':>8}"
        + "".join(f"{f'epsilon {e}':>14}" for e in f["alternatives"][0]["noise_multiplier"])
    )
    for a in f["alternatives"]:
        noise = "".join(f"{n:>14.2f}" for n in a["noise_multiplier"].values())
        out.append(f"  {a['rounds']:>8}{a['batch_size']:>8}{noise}")
    return [*out, "", f["warning"]] if f["warning"] else out


def _rounds(number: int) -> str:
    return f">= {number:.0e}".replace("e+0", "e") if number >= MOST_ROUNDS else str(number)
