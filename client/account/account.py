"""The one door for what leaves of a dataset: allowed by its owner's policy, written to the ledger, and only then made.

What comes out of the door is a recipe (client/training/recipe.py), and there is no other way to one. Releases without
privacy pass it too: no epsilon bounds them, but they are noted.
"""

from __future__ import annotations

from client.account.books import Books
from client.account.budget import Budget, open_budget
from client.training.recipe import Arithmetic, Recipe, Scoring
from common.errors import Refusal
from common.privacy.noise import NoiseSource
from common.privacy.statement import Statement


class Account:
    """A dataset's account in one federation."""

    def __init__(self, books: Books, *, noise: NoiseSource, arithmetic: Arithmetic = "exact") -> None:
        """`noise` is what plans and releases draw from; `arithmetic` that of private training and evaluation."""
        self.books, self.noise, self.arithmetic = books, noise, arithmetic
        self._budgets: dict[str, Budget] = {}
        self._allowed = False

    def budget(self, run: str) -> Budget | None:
        """A run's plan and what of it is charged; None if the federation trains without privacy.

        Raises:
            Refusal: the policy, what was told of the table's size or what is left of the budget does not allow the run,
                or no row is left to train on, if that may be told.
        """
        books = self.books
        if not self._allowed:
            books.policy.check(books.federation)
            self._allowed = True  # neither of them changes
        if books.federation.privacy.row is None:
            self._check_rows()
            return None
        if run not in self._budgets:
            self._budgets[run] = open_budget(books, noise=self.noise, run=run, arithmetic=self.arithmetic)
        return self._budgets[run]

    def opened_budget(self, run: str) -> Budget | None:
        """The plan and charges of a run, if it was planned since this account was opened."""
        return self._budgets.get(run)

    def charge_update(self, run: str, task: str) -> Recipe:
        """Charges one round of training, durably, and says how it is to be done.

        Raises:
            Refusal: the policy does not allow it now.
            BudgetExhausted: the plan has no round and no attempt left, or other runs have spent what it needs.
            LedgerError: the charge could not be written.
        """
        federation, rows = self.books.federation, self.books.dataset.rows
        budget = self.budget(run)
        if budget is not None:
            dpsgd = budget.charge_update(task)
            # Clients weigh the same where none of them tells how many rows it has.
            return Recipe(federation=federation, steps=dpsgd.steps, weight=float(budget.plan.rows or 1), private=dpsgd)
        steps = federation.training.steps_without_privacy(rows)
        self.books.policy.check_steps(steps)
        self.books.check_round()
        self.books.write(self.books.entry(run, task, "train", "none"))
        return Recipe(federation=federation, steps=steps, weight=float(rows), private=None)

    def charge_evaluation(self, run: str, task: str) -> Scoring:
        """Charges one evaluation and says how it is to be done. Raises as `charge_update`."""
        federation = self.books.federation
        self.books.policy.check_release("evaluation")
        budget = self.budget(run)
        if budget is not None:
            multiplier = budget.charge_evaluation(task)
            return Scoring(federation=federation, noise_multiplier=multiplier, arithmetic=self.arithmetic)
        self.books.write(self.books.entry(run, task, "validation", "none"))
        return Scoring(federation=federation, noise_multiplier=None)

    def statement(self, run: str) -> Statement | None:
        """What a run has released so far, for the server; None without privacy."""
        budget = self.budget(run)
        return None if budget is None else budget.statement()

    def close(self) -> None:
        self.books.ledger.close()

    def _check_rows(self) -> None:
        dataset = self.books.dataset
        if dataset.rows == 0:
            rows = f"all {dataset.validation_rows} rows fell into the validation part"
            raise Refusal(f"{rows}; the table is too small to train on", public="it has no rows to train on")
