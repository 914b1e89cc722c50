"""One private run's share of an account: its plan, and what of it has been charged."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from client.account.books import NOT_COVERED, Books
from client.account.entries import PARTS, Part
from client.account.plan import check_plan_covered, make_plan, store, stored
from client.training.recipe import DPSGD, Arithmetic
from common.errors import BudgetExhausted, LedgerError, Refusal
from common.privacy import second_opinion
from common.privacy.accountants import History
from common.privacy.noise import NoiseSource
from common.privacy.plan import Plan, row_privacy
from common.privacy.releases import GaussianRelease, epsilon
from common.privacy.second_opinion import Opinion, check_plan
from common.privacy.statement import Statement


class Budget:
    """The plan of one run at one site, and what of it has been charged."""

    def __init__(
        self,
        books: Books,
        *,
        run: str,
        plan: Plan,
        planned_for: tuple[str, str] | None,
        secure: bool,
        arithmetic: Arithmetic,
    ) -> None:
        """`planned_for` is the deal of the table that the plan was made for, if that is known. `secure` says whether
        noise is drawn from a keystream of the operating system."""
        self.plan, self._planned_for = plan, planned_for
        self._secure, self._arithmetic = secure, arithmetic
        self._books, self._run = books, run
        self._checked = books.ledger.count()  # so many entries were there when the account last covered the plan
        self._confirmed = False
        self._recount()

    @property
    def epsilon(self) -> float:
        """What this run has cost a row so far, at the plan's delta."""
        return self._cost_of(self.rounds_charged, self.evaluations_charged)

    def _cost_of(self, rounds: int, evaluations: int) -> float:
        """What so much of the plan costs a row: the larger of its two parts' costs, or their sum if the table has
        changed since the run began (client/account/entries.py `spent`)."""
        if self._one_deal:
            return self.plan.epsilon(rounds=rounds, evaluations=evaluations)
        return self.plan.epsilon(rounds=rounds, evaluations=0) + self.plan.epsilon(rounds=0, evaluations=evaluations)

    @property
    def limit(self) -> float:
        """What the federation says the whole run may cost."""
        return row_privacy(self._books.federation).epsilon

    def describe(self) -> str:
        """The plan in a sentence, for the owner."""
        plan = self.plan
        return (
            f"privacy plan: {plan.rounds} rounds of {plan.steps} steps, sampling rate {plan.sampling_rate:.3f}, noise "
            f"multiplier {plan.noise_multiplier:.2f}; all of it, with {plan.attempts} spare attempts, costs a row at "
            f"most epsilon {plan.total:.2f} at delta {plan.delta:g}"
        )

    def confirm(self) -> str:
        """Has Opacus recompute what the plan costs, once, and says for the owner what it found.

        Each charge asks for it, so nothing of a plan that is not confirmed leaves. Apart from planning, because Opacus
        takes a second to import, for which a client need not let the server wait.

        Raises:
            Refusal: the two accountants disagree.
        """
        if not self._confirmed:
            check_plan(self.plan, limit=row_privacy(self._books.federation).epsilon)
            self._confirmed = True
        return f"a second accountant confirms the plan; {self._planned_opinion()}"

    def in_the_end(self) -> str:
        """What was charged, by our accountant and by Opacus', from the ledger's entries: for the owner."""
        delta = self.plan.delta
        charged = {part: self._charged(part) for part in PARTS}
        updates, counts = (second_opinion.opinion(history, delta) for history in charged.values())
        theirs = second_opinion.together(self.plan.count_epsilon, updates, counts)
        said = f"what was charged costs a row epsilon {self.epsilon:.2f} at delta {delta:g}; {theirs}"
        agree = all(second_opinion.agrees(self._cost(history), history, delta) for history in charged.values())
        return said if agree else f"{said}; THE TWO DISAGREE: rely on neither, and report this"

    def charge_update(self, task: str) -> DPSGD:
        """Charges one round of training, durably, and says how it is to be done.

        Raises:
            Refusal: it is too early for a round, or Opacus does not confirm the plan.
            BudgetExhausted: the plan has no round and no attempt left, or other runs have spent what it needs.
            LedgerError: the charge could not be written.
        """
        self.confirm()
        plan, row = self.plan, row_privacy(self._books.federation)
        self._books.check_round()
        self._check_planned(task, "train")
        self._charge(task, "train", plan.update)
        return DPSGD(
            steps=plan.steps,
            sampling_rate=plan.sampling_rate,
            clip=row.clip,
            noise_multiplier=plan.noise_multiplier,
            expected_batch_size=self._books.federation.training.batch_size,
            arithmetic=self._arithmetic,
        )

    def charge_evaluation(self, task: str) -> float:
        """Charges one evaluation and returns its noise multiplier. Raises as `charge_update`."""
        self.confirm()
        self._check_planned(task, "validation")
        self._charge(task, "validation", GaussianRelease(noise_multiplier=self.plan.evaluation_noise))
        return self.plan.evaluation_noise

    def statement(self) -> Statement:
        """What was released so far, enough to recompute epsilon from."""
        plan, opacus = self.plan, self._planned_opinion()
        return Statement(
            epsilon=self.epsilon,
            planned_epsilon=plan.total if self._one_deal else row_privacy(self._books.federation).epsilon,
            delta=plan.delta,
            noise_multiplier=plan.noise_multiplier,
            sampling_rate=plan.sampling_rate,
            steps=plan.steps * self.rounds_charged,
            count_epsilon=plan.count_epsilon,
            rows=plan.rows,
            evaluation_noise=plan.evaluation_noise,
            evaluations=self.evaluations_charged,
            secure_noise=self._secure,
            exact_arithmetic=self._arithmetic == "exact",
            opacus_planned_epsilon=opacus.figure,
            opacus_prv=opacus.accountant == "PRV",
        )

    def _planned_opinion(self) -> Opinion:
        return second_opinion.of_plan(self.plan, rounds=self.plan.most_updates, evaluations=self.plan.most_evaluations)

    def _charged(self, part: Part) -> History:
        """What the ledger says this run has been charged in one part."""
        steps: Counter[tuple[float, float]] = Counter()
        for entry in self._books.ledger.entries():
            if (entry.run, entry.part, entry.mechanism) == (self._run, part, "gaussian"):
                steps[entry.gaussian.noise_multiplier, entry.gaussian.sampling_rate] += entry.gaussian.steps
        return tuple((*kind, n) for kind, n in sorted(steps.items()))

    def _cost(self, history: History) -> float:
        releases = [GaussianRelease(noise_multiplier=s, sampling_rate=q, steps=n) for s, q, n in history]
        return epsilon(releases, self.plan.delta)

    def _recount(self) -> None:
        """Reads from the ledger what this run has been charged."""
        entries = [
            e for e in self._books.ledger.entries() if e.run == self._run and e.mechanism in ("gaussian", "geometric")
        ]
        self._tasks: dict[Part, Counter[str]] = {
            part: Counter(e.task for e in entries if e.part == part and e.mechanism == "gaussian") for part in PARTS
        }
        # The row count was told of the table that the plan was made for, by this run or an earlier one.
        before = {e.deal for e in entries} | ({self._planned_for} if self._planned_for else set())
        self._one_deal = before <= {self._books.deal}

    @property
    def rounds_charged(self) -> int:
        """Attempts at rounds: one that was tried twice counts twice."""
        return self._tasks["train"].total()

    @property
    def evaluations_charged(self) -> int:
        """Attempts at evaluations."""
        return self._tasks["validation"].total()

    def _check_planned(self, task: str, part: Part) -> None:
        """Raises `BudgetExhausted` if the plan has nothing left for this task. A spare attempt is for a task that was
        charged before, by a client that died before it had answered."""
        plan, tasks = self.plan, self._tasks[part]
        what, planned, spare = "rounds", plan.rounds, plan.attempts
        if part == "validation":
            what, planned, spare = "evaluations", plan.evaluations, plan.evaluation_attempts
        no_round = task not in tasks and len(tasks) >= planned
        if no_round or tasks.total() >= planned + spare:
            used = f" and {spare} spare attempts" if spare and not no_round else ""
            raise BudgetExhausted(
                f"the plan's {planned} {what}{used} are all charged (epsilon {self.epsilon:.2f} of {self.limit:g})"
            )

    def _check_parts(self, part: Part) -> None:
        """Raises `BudgetExhausted` if, once the table has changed, both parts together would pass what the federation
        says a row may cost."""
        limit = row_privacy(self._books.federation).epsilon
        rounds, evaluations = self.rounds_charged + (part == "train"), self.evaluations_charged + (part != "train")
        if not self._one_deal and (cost := self._cost_of(rounds, evaluations)) > limit:
            raise BudgetExhausted(
                f"the table has changed since run {self._run} began here, so the costs of its two parts are added: "
                f"they would be {cost:.2f}, and the federation allows {limit:g}",
                public=NOT_COVERED,
            )

    def _charge(self, task: str, part: Part, release: GaussianRelease) -> None:
        self._check_parts(part)
        count = self._books.ledger.count()
        if count != self._checked:  # another run has spent from the same account
            check_plan_covered(self._books, self._run, self.plan)
        attempt = self._tasks[part][task] + 1
        entry = self._books.gaussian(self._run, task, part, release)
        try:
            self._books.write(replace(entry, attempt=attempt), after=count)
        except LedgerError:
            self._recount()  # it may be charged, though nothing is released
            raise
        self._tasks[part][task] = attempt
        self._checked = count + 1


def open_budget(books: Books, *, noise: NoiseSource, run: str, arithmetic: Arithmetic = "exact") -> Budget:
    """Plans a run, or takes up the plan it had before a restart.

    Raises:
        Refusal: the released row count is too large for the delta, the policy wants more noise or fewer steps, or the
            run was planned here for another federation.
        BudgetExhausted: what is left of the account does not cover a plan; the message has the numbers.
    """
    known = stored(books.ledger, run)
    if known is None:
        plan = make_plan(books, noise, run)
        store(books, run, plan)
    else:
        plan = known.plan
        if known.federation != books.federation.fingerprint:
            raise Refusal(f"run {run} was planned here for another federation than {books.federation.fingerprint}")
        check_plan_covered(books, run, plan)
    books.policy.check_noise(plan.noise_multiplier)
    books.policy.check_steps(plan.steps)
    planned_for = known.deal if known else None
    return Budget(books, run=run, plan=plan, planned_for=planned_for, secure=noise.hardened, arithmetic=arithmetic)
