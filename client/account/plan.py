"""What a run will release about a row, fixed before its first round so that all of it fits the budget.

A run releases three things: roughly how many training rows there are (once), model updates (each round), and noisy
counts of the validation part (some rounds). Everything that depends on the number of rows, the sampling rate and
through it the noise multiplier and epsilon, is computed from the released number and never from the exact one, so
that it is post-processing and may be told. So is a refusal: no exact number of rows decides one.

The count and the updates compose by simple addition of their epsilons, which holds however the second was chosen
after seeing the first (Rogers et al. 2016, arXiv:1605.08294, on adaptively chosen parameters).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from client.account.books import NOT_COVERED, Books, Charges
from client.account.entries import Entry, Part, spent
from common.errors import BudgetExhausted, Refusal
from common.privacy.noise import NoiseSource
from common.privacy.plan import Plan, plan_for, row_privacy
from common.privacy.releases import GaussianRelease, evaluation_release

SMALLEST_EPSILON = 0.01  # no plan is made for less
LESS = 0.9  # the next smaller epsilon that is tried when a plan does not fit the account
FINE = 1.005  # between one that fits and one that does not, the search stops at this ratio


def make_plan(books: Books, noise: NoiseSource, run: str) -> Plan:
    """Calibrates a run's noise once, so that all of it costs at most the federation's epsilon and what is left.

    Raises:
        BudgetExhausted: too little is left for any plan; the message has the numbers, for the owner.
        Refusal: the released row count is too large for the federation's delta.
    """
    federation, policy = books.federation, books.policy
    row = row_privacy(federation)
    left = policy.epsilon - spent(books.ledger.entries(), policy.delta)
    count_epsilon = row.count_epsilon or 0.0
    if left <= max(2 * count_epsilon, SMALLEST_EPSILON):
        raise BudgetExhausted(
            f"policy.epsilon: {policy.epsilon:g} at delta {policy.delta:g}, of which {max(left, 0):.2f} is left; "
            f"the federation asks for {row.epsilon:g}",
            public=NOT_COVERED,
        )
    evaluate = "evaluation" in policy.releases
    if evaluate and (evaluation := evaluation_release(federation)):
        # What cannot be planned is refused before anything is told: their noise is the federation's to choose.
        books.check_covered([books.gaussian(run, "planned", "validation", evaluation)])
    told = 0
    if row.sampling_rate is None:
        count = _released_rows(books, noise, run)
        if row.delta * count > 1:
            raise Refusal(
                f"privacy.row.delta {row.delta:g} is above 1 / rows, of which about {count} were told: it would allow "
                "to publish a row outright"
            )
        told = _shown(count, least=federation.training.batch_size)

    def fitting(updates: float) -> Plan:
        plan = plan_for(
            federation, rows=told, epsilon=count_epsilon + updates, evaluate=evaluate, attempts=policy.attempts
        )
        try:
            check_plan_covered(books, run, plan)
        except BudgetExhausted:
            if not plan.evaluation_attempts:
                raise
            plan = replace(plan, evaluation_attempts=0)  # rather than more noise in the updates
            check_plan_covered(books, run, plan)
        return plan

    # The account's figure is not the plan's: it holds at half of delta, and those of several runs do not simply add up.
    # So what fits is found by trying.
    target = high = min(row.epsilon, left) - count_epsilon
    while True:
        try:
            plan = fitting(target)
            break
        except BudgetExhausted:
            target, high = LESS * target, target
            if target <= max(count_epsilon, SMALLEST_EPSILON):
                raise
    while high / target > FINE:
        middle = math.sqrt(target * high)
        try:
            plan, target = fitting(middle), middle
        except BudgetExhausted:
            high = middle
    return plan


def _released_rows(books: Books, noise: NoiseSource, run: str) -> int:
    """The training part's size with noise.

    Told once for a table and its split, unless a later federation pays less for it than was paid: then the
    number that was told says more about a row than that federation's plan may.
    """
    dataset, count_epsilon = books.dataset, row_privacy(books.federation).count_epsilon
    assert count_epsilon is not None, "only asked where the federation pays for a count"
    known = books.ledger.entries()
    for entry in known:
        same_table = (entry.content, entry.split) == (dataset.content, dataset.split)
        if same_table and entry.value is not None and (entry.epsilon or 0.0) <= count_epsilon:
            return entry.value
    count = books.entry(run, f"{run}/rows", "train", "geometric", epsilon=count_epsilon)
    books.check_covered([count])
    told = dataset.rows + noise.two_sided_geometric(count_epsilon)
    books.write(replace(count, value=told), after=len(known))
    return told


def _shown(count: int, *, least: int) -> int:
    """A count to two significant digits, and not less than a batch."""
    told = max(count, least)
    digits: int = 10 ** max(0, int(math.log10(told)) - 1)
    return max(round(told / digits) * digits, least)


@dataclass(frozen=True)
class StoredPlan:
    """A plan, and what it was made for."""

    plan: Plan
    federation: str  # the document's fingerprint
    deal: tuple[str, str] | None  # of the table (client/account/entries.py `deal`); None in older plans


def store(books: Books, run: str, plan: Plan) -> None:
    """Keeps a run's plan, so that a restart goes on with the noise that was calibrated."""
    made_for = {"federation": books.federation.fingerprint, "deal": books.deal}
    books.ledger.store_plan(run, {**asdict(plan), **made_for})


def stored(ledger: Charges, run: str) -> StoredPlan | None:
    """A run's plan, if the run was ever planned here."""
    body: dict[str, Any] | None = ledger.plan(run)
    if body is None:
        return None
    federation, dealt = body.pop("federation"), body.pop("deal", None)
    return StoredPlan(Plan(**body), federation, (dealt[0], dealt[1]) if dealt else None)


def check_plan_covered(books: Books, run: str, plan: Plan) -> None:
    """Raises `BudgetExhausted` unless the account covers all that the plan has not charged yet."""
    rest = remaining(plan, [e for e in books.ledger.entries() if e.run == run])
    books.check_covered([books.gaussian(run, "planned", part, release) for part, release in rest])


def remaining(plan: Plan, charged: Iterable[Entry]) -> list[tuple[Part, GaussianRelease]]:
    """What of a plan its run's entries have not charged yet."""
    times = Counter(e.part for e in charged if e.mechanism == "gaussian")
    rest: list[tuple[Part, GaussianRelease]] = []
    if (rounds := plan.most_updates - times["train"]) > 0:
        rest.append(("train", replace(plan.update, steps=plan.steps * rounds)))
    if (evaluations := plan.most_evaluations - times["validation"]) > 0:
        rest.append(("validation", GaussianRelease(noise_multiplier=plan.evaluation_noise, steps=evaluations)))
    return rest
