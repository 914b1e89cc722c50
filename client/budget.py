"""One run's share of the account: planned before it starts, charged before each release.

A run releases three things about a row: roughly how many training rows there are (once), model updates (each
round), and noisy counts of the validation part (some rounds). Everything that depends on the number of rows,
the sampling rate and through it the noise multiplier and epsilon, is computed from the released number and
never from the exact one, so that it is post-processing and may be told. Only the refusal of a table that is too
small for the batch, or too large for the delta, looks at the exact number, and tells that much about it.

The count and the updates compose by simple addition of their epsilons, which holds however the second was
chosen after seeing the first (Rogers et al. 2016, arXiv:1605.08294, on adaptively chosen parameters).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from client.data import Dataset
from client.ledger import Entry, Ledger, Part, spent
from client.policy import Policy
from client.training import DPSGD, steps_per_round
from common.errors import BudgetExhausted, Refusal
from common.federation import Federation, RowPrivacy
from common.noise import NoiseSource
from common.privacy import GaussianRelease, calibrate, epsilon, epsilon_by_step, evaluation_release

LESS = 0.9  # the next smaller epsilon that is tried when a plan does not fit the account


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will release, fixed before its first round. All of it may be told."""

    rows: int  # the released row count of the training part
    sampling_rate: float
    noise_multiplier: float
    steps: int  # in each round
    rounds: int
    evaluation_noise: float
    evaluations: int
    count_epsilon: float
    delta: float

    @property
    def update(self) -> GaussianRelease:
        """One round's release."""
        return GaussianRelease(
            noise_multiplier=self.noise_multiplier, sampling_rate=self.sampling_rate, steps=self.steps
        )


class Budget:
    """The plan of one run at one site, and what of it has been charged."""

    def __init__(
        self, *, federation: Federation, dataset: Dataset, policy: Policy, ledger: Ledger, run: str, plan: Plan
    ) -> None:
        self.plan = plan
        self._federation, self._dataset, self._policy = federation, dataset, policy
        self._ledger, self._run = ledger, run
        self._checked = ledger.count()  # so many entries were there when the account last covered the plan
        entries = [e for e in ledger.entries() if e.run == run and e.mechanism == "gaussian"]
        self.rounds_charged = sum(e.part == "train" for e in entries)
        self.evaluations_charged = sum(e.part == "validation" for e in entries)
        self._attempts: dict[str, int] = {}
        for entry in entries:
            self._attempts[entry.task] = entry.attempt
        training = epsilon_by_step(plan.update, plan.delta, [plan.steps * r for r in range(plan.rounds + 1)])
        self._update_epsilon = [plan.count_epsilon + e for e in training]
        self._evaluation_epsilon = [
            epsilon([GaussianRelease(noise_multiplier=plan.evaluation_noise, steps=n)], plan.delta) if n else 0.0
            for n in range(plan.evaluations + 1)
        ]

    @property
    def epsilon(self) -> float:
        """What this run has cost a row so far, at the plan's delta."""
        return max(self._update_epsilon[self.rounds_charged], self._evaluation_epsilon[self.evaluations_charged])

    @property
    def limit(self) -> float:
        """What the federation says the whole run may cost."""
        return _row_privacy(self._federation).epsilon

    def describe(self) -> str:
        """The plan in a sentence, for the owner."""
        plan = self.plan
        return (
            f"privacy plan: {plan.rounds} rounds of {plan.steps} steps, sampling rate {plan.sampling_rate:.3f}, noise "
            f"multiplier {plan.noise_multiplier:.2f}; all of it costs a row at most epsilon "
            f"{max(self._update_epsilon[-1], self._evaluation_epsilon[-1]):.2f} at delta {plan.delta:g}"
        )

    def charge_update(self, task: str) -> DPSGD:
        """Charges one round of training, durably, and says how it is to be done.

        Raises:
            BudgetExhausted: the plan has no round left, or other runs have spent what it needs.
            LedgerError: the charge could not be written.
        """
        plan, row = self.plan, _row_privacy(self._federation)
        if self.rounds_charged >= plan.rounds:
            raise BudgetExhausted(
                f"the plan's {plan.rounds} rounds are all charged (epsilon {self.epsilon:.2f} of {row.epsilon:g})"
            )
        self._charge(task, "train", plan.update)
        self.rounds_charged += 1
        return DPSGD(
            steps=plan.steps,
            sampling_rate=plan.sampling_rate,
            clip=row.clip,
            noise_multiplier=plan.noise_multiplier,
            expected_batch_size=self._federation.training.batch_size,
        )

    def charge_evaluation(self, task: str) -> float:
        """Charges one evaluation and returns its noise multiplier. Raises as `charge_update`."""
        if self.evaluations_charged >= self.plan.evaluations:
            raise BudgetExhausted(f"the plan's {self.plan.evaluations} evaluations are all charged")
        self._charge(task, "validation", GaussianRelease(noise_multiplier=self.plan.evaluation_noise))
        self.evaluations_charged += 1
        return self.plan.evaluation_noise

    def statement(self) -> dict[str, int | float]:
        """What was released so far, enough to recompute epsilon from."""
        plan = self.plan
        return {
            "epsilon": self.epsilon,
            "delta": plan.delta,
            "noise_multiplier": plan.noise_multiplier,
            "sampling_rate": plan.sampling_rate,
            "steps": plan.steps * self.rounds_charged,
            "count_epsilon": plan.count_epsilon,
            "rows": plan.rows,
            "evaluation_noise": plan.evaluation_noise,
            "evaluations": self.evaluations_charged,
        }

    def _charge(self, task: str, part: Part, release: GaussianRelease) -> None:
        if self._ledger.count() != self._checked:  # another run has spent from the same account
            _check_account(self._federation, self._dataset, self._policy, self._ledger, self._run, self.plan)
        attempt = self._attempts.get(task, 0) + 1
        entry = _entry(self._federation, self._dataset, self._run, task, part, release)
        self._ledger.charge(Entry(**{**asdict(entry), "attempt": attempt}))
        self._attempts[task] = attempt
        self._checked = self._ledger.count()


def open_budget(
    *, federation: Federation, dataset: Dataset, policy: Policy, ledger: Ledger, noise: NoiseSource, run: str
) -> Budget:
    """Plans a run, or takes up the plan it had before a restart.

    Raises:
        Refusal: the table is too small for what the federation asks.
        BudgetExhausted: what is left of the account does not cover a plan; the message has the numbers.
    """
    check_size(federation, dataset)
    plan = _stored(ledger, run)
    if plan is None:
        plan = _make_plan(federation, dataset, policy, ledger, noise, run)
        ledger.store_plan(run, asdict(plan))
    else:
        _check_account(federation, dataset, policy, ledger, run, plan)
    return Budget(federation=federation, dataset=dataset, policy=policy, ledger=ledger, run=run, plan=plan)


def check_size(federation: Federation, dataset: Dataset) -> None:
    """Raises `Refusal` if the table is too small for a batch, or too large for the delta."""
    row, rows, batch = federation.privacy.row, len(dataset.y), federation.training.batch_size
    if batch > rows:
        raise Refusal(f"training.batch_size {batch} is larger than the training part of this table")
    if row is not None and row.delta * rows > 1:
        raise Refusal(f"privacy.row.delta {row.delta:g} is above 1 / rows: it would allow to publish a row outright")


def _stored(ledger: Ledger, run: str) -> Plan | None:
    stored: dict[str, Any] | None = ledger.plan(run)
    return Plan(**stored) if stored else None


def _make_plan(
    federation: Federation, dataset: Dataset, policy: Policy, ledger: Ledger, noise: NoiseSource, run: str
) -> Plan:
    row = _row_privacy(federation)
    left = policy.epsilon - spent(ledger.entries(), policy.delta)
    if left <= 2 * row.count_epsilon:
        raise BudgetExhausted(
            f"policy.epsilon: {policy.epsilon:g} at delta {policy.delta:g}, of which {max(left, 0):.2f} is left; "
            f"the federation asks for {row.epsilon:g}"
        )
    evaluation = evaluation_release(federation)
    rows = _released_rows(federation, dataset, ledger, noise, run)
    rate = min(1.0, federation.training.batch_size / rows)
    steps, rounds = steps_per_round(federation.training, rate), federation.training.rounds
    target = min(row.epsilon, left) - row.count_epsilon
    while True:
        plan = Plan(
            rows=rows,
            sampling_rate=rate,
            noise_multiplier=calibrate(target, row.delta, sampling_rate=rate, steps=steps * rounds),
            steps=steps,
            rounds=rounds,
            evaluation_noise=evaluation.noise_multiplier if evaluation else 0.0,
            evaluations=evaluation.steps if evaluation else 0,
            count_epsilon=row.count_epsilon,
            delta=row.delta,
        )
        try:
            _check_account(federation, dataset, policy, ledger, run, plan)
            return plan
        except BudgetExhausted:
            # Epsilons of several runs do not simply add up, so what is left is found by trying.
            target *= LESS
            if target <= row.count_epsilon:
                raise


def _released_rows(federation: Federation, dataset: Dataset, ledger: Ledger, noise: NoiseSource, run: str) -> int:
    """The training part's size with noise, to two significant digits.

    Told once for a table and its split, unless a later federation pays less for it than was paid: then the
    number that was told says more about a row than that federation's plan may.
    """
    row = _row_privacy(federation)
    for entry in ledger.entries():
        same_table = (entry.content, entry.split) == (dataset.content, dataset.split)
        if same_table and entry.value is not None and (entry.epsilon or 0.0) <= row.count_epsilon:
            told = entry.value
            break
    else:
        told = len(dataset.y) + noise.two_sided_geometric(row.count_epsilon)
        ledger.charge(
            Entry(
                part="train",
                split=dataset.split,
                run=run,
                task=f"{run}/rows",
                attempt=1,
                mechanism="geometric",
                federation=federation.fingerprint,
                content=dataset.content,
                epsilon=row.count_epsilon,
                value=told,
            )
        )
    least = federation.training.batch_size
    told = max(told, least)
    digits: int = 10 ** max(0, int(math.log10(told)) - 1)
    return max(round(told / digits) * digits, least)


def _check_account(
    federation: Federation, dataset: Dataset, policy: Policy, ledger: Ledger, run: str, plan: Plan
) -> None:
    """Raises `BudgetExhausted` unless the account covers all that the plan has not charged yet."""
    entries = ledger.entries()
    charged = [e for e in entries if e.run == run and e.mechanism == "gaussian"]
    rounds = plan.rounds - sum(e.part == "train" for e in charged)
    evaluations = plan.evaluations - sum(e.part == "validation" for e in charged)
    planned: list[Entry] = []
    if rounds > 0:
        release = GaussianRelease(
            noise_multiplier=plan.noise_multiplier,
            sampling_rate=plan.sampling_rate,
            steps=plan.steps * rounds,
        )
        planned.append(_entry(federation, dataset, run, "planned", "train", release))
    if evaluations > 0:
        release = GaussianRelease(noise_multiplier=plan.evaluation_noise, steps=evaluations)
        planned.append(_entry(federation, dataset, run, "planned", "validation", release))
    before, total = _costs(entries, planned, policy.delta)
    if total > policy.epsilon:
        raise BudgetExhausted(
            f"policy.epsilon: {policy.epsilon:g} at delta {policy.delta:g}, of which {before:.2f} is spent; with "
            f"this run it would be {total:.2f}"
        )


def _costs(entries: list[Entry], planned: Iterable[Entry], delta: float) -> tuple[float, float]:
    return spent(entries, delta), spent(entries, delta, more=planned)


def _entry(
    federation: Federation, dataset: Dataset, run: str, task: str, part: Part, release: GaussianRelease
) -> Entry:
    return Entry(
        part=part,
        split=dataset.split,
        run=run,
        task=task,
        attempt=1,
        mechanism="gaussian",
        federation=federation.fingerprint,
        content=dataset.content,
        noise_multiplier=release.noise_multiplier,
        sampling_rate=release.sampling_rate,
        steps=release.steps,
    )


def _row_privacy(federation: Federation) -> RowPrivacy:
    row = federation.privacy.row
    assert row is not None, "only a private federation has a budget"
    return row
