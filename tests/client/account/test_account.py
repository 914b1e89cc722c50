"""The one door: what the policy does not allow, or the ledger cannot hold, makes no recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from client import data
from client.account.account import Account
from client.account.books import Books
from client.account.ledger import Ledger
from client.account.policy import Policy
from common.errors import BudgetExhausted, LedgerError, Refusal
from common.privacy import noise
from tests.support import PRIVATE, federation, table

ROWS = 200
OPEN = {"epsilon": 9.0, "delta": 0.01, "without_privacy": True}


def account(policy: dict[str, Any] = {}, **changes: Any) -> Account:  # noqa: B006  never changed
    fed = federation(**changes)
    rows = data.encode_rows(table(ROWS), fed.data_schema, key=b"k")
    books = Books(
        policy=Policy(**{**OPEN, **policy}),
        ledger=Ledger.in_memory(),
        federation=fed,
        dataset=data.split(rows, fed.data_schema, key=b"k", device=torch.device("cpu")),
    )
    return Account(books, noise=noise.seeded(1))


def parts(of: Account) -> list[tuple[str, str]]:
    return [(e.mechanism, e.part) for e in of.books.ledger.entries()]


def test_a_recipe_without_privacy_is_noted_and_weighs_the_rows():
    door = account(training__local_steps=..., training__local_epochs=2)
    rows = len(door.books.dataset.y)
    recipe = door.charge_update("run", "run/train/1")
    assert parts(door) == [("none", "train")]
    # Batches of 8, the last one smaller, twice over.
    assert (recipe.private, recipe.weight, recipe.steps) == (None, rows, 2 * -(-rows // 8))
    assert door.statement("run") is None


def test_a_private_recipe_is_the_plans():
    door = account(**PRIVATE)
    recipe = door.charge_update("run", "run/train/1")
    budget = door.opened_budget("run")
    assert budget is not None and recipe.private is not None
    plan = budget.plan
    assert parts(door) == [("geometric", "train"), ("gaussian", "train")]
    assert (recipe.steps, recipe.weight) == (plan.steps, plan.rows)
    assert recipe.private.noise_multiplier == plan.noise_multiplier
    statement = door.statement("run")
    assert statement is not None and statement.epsilon == budget.epsilon > 0


@pytest.mark.parametrize("changes", [{}, PRIVATE], ids=["exact", "private"])
def test_an_evaluation_that_may_not_leave_is_refused_and_costs_nothing(changes):
    door = account({"releases": ("model", "row_count")}, **changes)
    with pytest.raises(Refusal, match=r"^policy\.releases: asked evaluation, allowed model, row_count$"):
        door.charge_evaluation("run", "run/evaluate/1")
    door.charge_update("run", "run/train/1")
    assert {part for _, part in parts(door)} == {"train"}


@pytest.mark.parametrize("changes", [{}, PRIVATE], ids=["exact", "private"])
@pytest.mark.parametrize(
    "policy, problem",
    [
        ({"max_rounds": 3}, r"^policy\.max_rounds: asked 4, allowed 3$"),
        ({"min_seconds_between_rounds": 3600}, r"^policy\.min_seconds_between_rounds: asked a round at .* UTC"),
    ],
)
def test_a_round_that_the_policy_does_not_allow_now_is_refused_with_privacy_and_without(changes, policy, problem):
    door = account(policy, **changes)
    with pytest.raises(Refusal, match=problem):
        for i in range(4):
            door.charge_update("run", f"run/train/{i}")
    assert parts(door).count(("gaussian" if changes else "none", "train")) == (3 if "max_rounds" in policy else 1)


@pytest.mark.parametrize("changes", [{}, PRIVATE], ids=["exact", "private"])
@pytest.mark.parametrize("charge", ["charge_update", "charge_evaluation"])
def test_a_charge_that_cannot_be_written_makes_no_recipe(monkeypatch, changes, charge):
    door = account(**changes)
    door.budget("run")

    def full(*_: object, **__: object) -> None:
        raise LedgerError("the disk is full")

    monkeypatch.setattr(door.books.ledger, "charge", full)
    with pytest.raises(LedgerError, match="the disk is full"):
        getattr(door, charge)("run", "run/task/1")


def test_what_is_not_planned_makes_no_recipe():
    door = account(**{**PRIVATE, "training__rounds": 1})
    door.charge_update("run", "run/train/1")
    with pytest.raises(BudgetExhausted, match=r"the plan's 1 rounds are all charged|1 rounds and \d spare attempts"):
        door.charge_update("run", "run/train/2")


def test_more_steps_than_the_policy_allows_are_refused_before_anything_is_noted():
    door = account({"max_local_steps": 5}, training__local_steps=..., training__local_epochs=9)
    with pytest.raises(Refusal, match=r"^policy\.max_local_steps: asked \d+, allowed 5$"):
        door.charge_update("run", "run/train/1")
    assert parts(door) == []
