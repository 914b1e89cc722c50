"""What a run costs is recomputed here with dp-accounting, from the ledger's entries and nothing else."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant

from client import data
from client.account.books import Books
from client.account.budget import Budget, open_budget
from client.account.entries import Entry, Part, spent
from client.account.ledger import Ledger
from client.account.policy import Policy
from client.data import Dataset
from common.document.federation import Federation
from common.errors import BudgetExhausted, LedgerError, PrivacyError, Refusal
from common.privacy import noise
from common.privacy.noise import NoiseSource
from common.privacy.releases import epsilon_of_adaptive
from tests.support import PRIVATE, federation, table

DELTA = 1e-3
ROUNDS = 3


def owner(**rules: Any) -> Policy:
    """A policy without spare attempts, so that figures are those of the rounds alone."""
    return Policy(**{"attempts": 0, **rules})


GENEROUS = owner(epsilon=100.0, delta=DELTA)


def private(**changes: Any) -> Federation:
    """Epsilon 4, delta 1e-3, 3 rounds of 2 steps, one evaluation."""
    return federation(**{**PRIVATE, **changes})


def dataset_of(frame: pl.DataFrame | None = None, *, key: bytes = b"k") -> Dataset:
    schema = federation().data_schema
    rows = data.encode_rows(table(200) if frame is None else frame, schema, key=key)
    return data.split(rows, schema, key=key, device=torch.device("cpu"))


DATASET = dataset_of()


def opened(
    ledger: Ledger,
    *,
    run: str = "run",
    federation: Federation | None = None,
    dataset: Dataset = DATASET,
    policy: Policy = GENEROUS,
    source: NoiseSource | None = None,
) -> Budget:
    books = Books(federation=federation or private(), dataset=dataset, policy=policy, ledger=ledger)
    return open_budget(books, noise=source or noise.seeded(1), run=run)


def spend(budget: Budget, *, rounds: int = ROUNDS, evaluations: int = 1) -> None:
    for i in range(rounds):
        budget.charge_update(f"train/{i}")
    for i in range(evaluations):
        budget.charge_evaluation(f"evaluate/{i}")


def recomputed(entries: Iterable[Entry], part: Part, delta: float = DELTA) -> float:
    """One part's epsilon: that of its counts, and dp-accounting's for its Gaussian releases, at `delta`."""
    mine = [e for e in entries if e.part == part]
    steps: Counter[tuple[float | None, float | None]] = Counter()
    for entry in mine:
        if entry.mechanism == "gaussian":
            steps[entry.noise_multiplier, entry.sampling_rate] += entry.steps or 0
    accountant = pld_privacy_accountant.PLDAccountant(value_discretization_interval=1e-3)
    for (sigma, rate), n in steps.items():
        event: dp_event.DpEvent = dp_event.GaussianDpEvent(sigma)
        accountant.compose(event if rate == 1 else dp_event.PoissonSampledDpEvent(rate, event), n)
    pure = sum(e.epsilon or 0.0 for e in mine if e.mechanism == "geometric")
    return pure + float(accountant.get_epsilon(delta))


# One run


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__batch_size": 100},
        {"training__local_steps": ..., "training__local_epochs": 2, "training__rounds": 5},
        {"privacy": {"row": {"epsilon": 0.8, "delta": DELTA, "clip": 1.0}, "evaluation": {"every": 0}}},
        {"privacy": {"row": {"epsilon": 4.0, "delta": DELTA, "clip": 1.0}, "evaluation": {"noise": 2.0}}},
    ],
)
def test_a_whole_run_costs_what_the_federation_allows_and_no_more(changes):
    ledger, asked = Ledger.in_memory(), private(**changes)
    budget = opened(ledger, federation=asked)
    limit = asked.privacy.row.epsilon
    spend(budget, rounds=asked.training.rounds, evaluations=len(asked.evaluation_rounds))
    costs = [recomputed(ledger.entries(), part) for part in ("train", "validation")]
    assert 0.97 * limit - 0.01 <= costs[0] <= limit  # the noise is no larger than need be, either
    assert costs[1] <= limit
    assert max(costs) <= budget.epsilon + 1e-3
    assert budget.epsilon == pytest.approx(max(costs), rel=0.01, abs=0.011)
    assert budget.epsilon <= budget.limit == limit
    ledger.close()


def test_after_each_release_the_stated_epsilon_is_that_of_the_ledger():
    ledger = Ledger.in_memory()
    budget = opened(ledger)
    assert budget.epsilon == pytest.approx(0.1)  # the row count
    for i in range(ROUNDS):
        budget.charge_update(f"train/{i}")
        expected = recomputed(ledger.entries(), "train")
        assert expected - 1e-3 <= budget.epsilon <= 1.01 * expected + 0.011
    before = budget.epsilon
    budget.charge_evaluation("evaluate/3")
    # Noise 3 on one evaluation costs 0.7, less than training has cost: the parts are disjoint.
    assert recomputed(ledger.entries(), "validation") < before
    assert budget.epsilon == before
    ledger.close()


def test_the_dearer_part_is_what_is_stated():
    ledger = Ledger.in_memory()
    noisy = {"row": {"epsilon": 4.0, "delta": DELTA, "clip": 1.0}, "evaluation": {"every": 1, "noise": 2.0}}
    budget = opened(ledger, federation=private(privacy=noisy))
    budget.charge_evaluation("evaluate/1")
    budget.charge_evaluation("evaluate/2")
    assert budget.epsilon == pytest.approx(recomputed(ledger.entries(), "validation"), abs=0.011)
    ledger.close()


def test_what_is_to_be_done_is_what_was_charged():
    ledger = Ledger.in_memory()
    budget = opened(ledger)
    dpsgd = budget.charge_update("train/1")
    sigma = budget.charge_evaluation("evaluate/1")
    update, counts = (e for e in ledger.entries() if e.mechanism == "gaussian")
    assert (update.part, counts.part) == ("train", "validation")
    assert (dpsgd.noise_multiplier, dpsgd.sampling_rate, dpsgd.steps) == (
        update.noise_multiplier,
        update.sampling_rate,
        update.steps,
    )
    assert (dpsgd.clip, dpsgd.expected_batch_size, dpsgd.steps) == (1.0, 8, 2)
    assert (sigma, counts.sampling_rate, counts.steps) == (counts.noise_multiplier, 1.0, 1)
    assert sigma == 3.0
    assert {e.federation for e in ledger.entries()} == {private().fingerprint}
    assert {(e.content, e.split) for e in ledger.entries()} == {(DATASET.content, DATASET.split)}
    ledger.close()


def test_the_statement_is_enough_to_recompute_epsilon_from():
    ledger = Ledger.in_memory()
    budget = opened(ledger)
    spend(budget, rounds=2, evaluations=0)
    said = budget.statement()
    accountant = pld_privacy_accountant.PLDAccountant(value_discretization_interval=1e-3)
    one_step = dp_event.PoissonSampledDpEvent(said.sampling_rate, dp_event.GaussianDpEvent(said.noise_multiplier))
    accountant.compose(one_step, int(said.steps))
    expected = said.count_epsilon + accountant.get_epsilon(said.delta)
    assert said.epsilon == pytest.approx(expected, abs=0.011)
    assert (said.steps, said.evaluations) == (4, 0)
    ledger.close()


def test_the_plan_is_described_to_the_owner():
    ledger = Ledger.in_memory()
    said = opened(ledger).describe()
    assert re.match(r"privacy plan: 3 rounds of 2 steps, sampling rate 0\.0\d\d, noise multiplier", said)
    assert said.endswith("at delta 0.001")
    assert 3.9 < float(said.split("at most epsilon ")[1].split()[0]) <= 4.0
    ledger.close()


def test_nothing_more_is_released_than_was_planned():
    ledger = Ledger.in_memory()
    budget = opened(ledger)
    spend(budget)
    before = ledger.count()
    with pytest.raises(BudgetExhausted, match=r"the plan's 3 rounds are all charged \(epsilon [34]\.\d\d of 4\)"):
        budget.charge_update("train/4")
    with pytest.raises(BudgetExhausted, match="the plan's 1 evaluations are all charged"):
        budget.charge_evaluation("evaluate/4")
    assert ledger.count() == before
    ledger.close()


def test_a_task_that_is_tried_again_is_charged_again():
    ledger = Ledger.in_memory()
    budget = opened(ledger)
    for _ in range(2):
        budget.charge_update("run/train/1")
    entries = [e for e in ledger.entries() if e.task == "run/train/1"]
    assert [e.attempt for e in entries] == [1, 2]
    assert budget.rounds_charged == 2
    ledger.close()


def test_a_round_that_is_tried_again_takes_a_spare_attempt_and_none_of_the_rounds():
    asked = private(training__rounds=11, privacy__evaluation={"every": 1, "noise": 6.0})
    policy = Policy(epsilon=9.0, delta=DELTA, attempts=2)
    ledger = Ledger.in_memory()

    def restarted() -> Budget:
        return opened(ledger, federation=asked, policy=policy)

    for i in range(11):  # a client that dies in each of two rounds, and in two evaluations, after it was charged
        for _ in range(2 if i < 2 else 1):
            restarted().charge_update(f"run/train/{i}")
            restarted().charge_evaluation(f"run/evaluate/{i}")
    budget = restarted()
    assert len({e.task for e in ledger.entries() if e.mechanism == "gaussian"}) == 2 * 11
    assert (budget.rounds_charged, budget.evaluations_charged) == (11 + 2, 11 + 2)
    with pytest.raises(BudgetExhausted, match="the plan's 11 rounds and 2 spare attempts are all charged"):
        budget.charge_update("run/train/2")
    with pytest.raises(BudgetExhausted, match="the plan's 11 evaluations and 2 spare attempts are all charged"):
        budget.charge_evaluation("run/evaluate/2")
    # All of it was planned, and is paid for: by dp-accounting, too.
    assert budget.epsilon == budget.plan.total <= 4.0
    assert 3.9 < recomputed(ledger.entries(), "train") <= 4.0
    assert recomputed(ledger.entries(), "validation") <= 4.0
    ledger.close()


def test_a_tight_account_has_room_for_the_spare_attempts_of_a_plan():
    asked, ledger = private(training__rounds=11), Ledger.in_memory()
    budget = opened(ledger, federation=asked, policy=Policy(epsilon=4.0, delta=DELTA, attempts=1))
    for i in (0, *range(11)):
        budget.charge_update(f"run/train/{i}")
    assert 3.9 < spent(ledger.entries(), DELTA) <= 4.0
    ledger.close()


def test_spare_evaluations_that_the_account_has_no_room_for_are_not_planned_and_cost_no_noise():
    # Three evaluations at noise 3.3 are like one at 1.91, and four like one at 1.65: 1.57 and 1.84 at half of delta.
    found = {}
    for multiplier in (3.3, 30.0):
        asked = private(training__rounds=11, privacy__evaluation={"every": 4, "noise": multiplier})
        plan = opened(Ledger.in_memory(), federation=asked, policy=Policy(epsilon=1.75, delta=DELTA, attempts=1)).plan
        found[multiplier] = plan.evaluation_attempts, plan.noise_multiplier
    assert [spare for spare, _ in found.values()] == [0, 1]
    assert found[3.3][1] == found[30.0][1]


def test_a_spare_attempt_is_no_further_round():
    ledger, policy = Ledger.in_memory(), Policy(epsilon=9.0, delta=DELTA)
    budget = opened(ledger, policy=policy)
    spend(budget)
    for again in (budget, opened(ledger, policy=policy)):
        with pytest.raises(BudgetExhausted, match=r"the plan's 3 rounds are all charged"):
            again.charge_update("train/4")
        with pytest.raises(BudgetExhausted, match=r"the plan's 1 evaluations are all charged"):
            again.charge_evaluation("evaluate/4")
    ledger.close()


def test_a_plan_that_was_stored_before_there_were_spare_attempts_has_none():
    ledger = Ledger.in_memory()
    opened(ledger)
    ((stored,),) = ledger._db.execute("SELECT body FROM plans")
    older = {k: v for k, v in json.loads(stored).items() if not k.endswith("attempts")}
    ledger._db.execute("UPDATE plans SET body = ?", (json.dumps(older),))
    assert opened(ledger, policy=Policy(epsilon=9.0, delta=DELTA)).plan.attempts == 0
    ledger.close()


def test_a_charge_that_cannot_be_written_does_not_count_and_gives_nothing_away():
    ledger = Ledger.in_memory()
    budget = opened(ledger)
    ledger._db.execute("PRAGMA query_only = ON")
    with pytest.raises(LedgerError, match="cannot be written, so nothing is released"):
        budget.charge_update("train/1")
    assert budget.rounds_charged == 0
    ledger.close()


# A restart


def test_a_restart_in_the_middle_goes_on_where_it_was(tmp_path: Path):
    ledger = Ledger(tmp_path / "t.ledger")
    before = opened(ledger)
    before.charge_update("train/1")
    before.charge_update("train/2")
    said = before.statement()
    ledger.close()

    ledger = Ledger(tmp_path / "t.ledger")
    after = opened(ledger, source=noise.seeded(2))
    assert after.plan == before.plan
    assert after.statement() == said
    assert sum(e.mechanism == "geometric" for e in ledger.entries()) == 1
    after.charge_update("train/2")
    assert [e.attempt for e in ledger.entries() if e.task == "train/2"] == [1, 2]
    with pytest.raises(BudgetExhausted, match="3 rounds are all charged"):
        after.charge_update("train/3")
    assert recomputed(ledger.entries(), "train") <= 4.0
    ledger.close()


def test_a_crash_between_count_and_plan_tells_the_count_once():
    ledger = Ledger.in_memory()
    first = opened(ledger)
    ledger._db.execute("DELETE FROM plans")
    again = opened(ledger, source=noise.seeded(2))
    assert again.plan == first.plan
    assert ledger.count() == 1
    ledger.close()


def test_a_policy_that_was_tightened_refuses_the_rest_of_a_run():
    ledger = Ledger.in_memory()
    spend(opened(ledger), rounds=1, evaluations=0)
    with pytest.raises(BudgetExhausted, match=r"policy\.epsilon: 3 at delta 0\.001, of which \d\.\d\d is spent; with"):
        opened(ledger, policy=owner(epsilon=3.0, delta=DELTA))
    ledger.close()


# Several runs


def test_a_first_run_that_may_spend_the_whole_account_needs_little_more_noise():
    # Its plan is at delta; the account, in which others may follow, is at half of it.
    generous = opened(Ledger.in_memory()).plan
    ledger, policy = Ledger.in_memory(), owner(epsilon=4.0, delta=DELTA)
    budget = opened(ledger, policy=policy)
    assert 1.0 < budget.plan.noise_multiplier / generous.noise_multiplier < 1.06
    spend(budget)
    assert 3.95 < spent(ledger.entries(), DELTA) <= 4.0
    assert recomputed(ledger.entries(), "train", DELTA / 2) <= 4.0
    roomy = opened(Ledger.in_memory(), policy=owner(epsilon=4.6, delta=DELTA)).plan
    assert roomy.noise_multiplier == generous.noise_multiplier
    ledger.close()


def test_a_second_federation_is_calibrated_to_what_is_left():
    ledger, policy = Ledger.in_memory(), owner(epsilon=9.0, delta=DELTA)
    first = opened(ledger, policy=policy)
    spend(first)
    second = opened(ledger, run="second", federation=private(name="second"), policy=policy)
    assert second.plan.noise_multiplier > first.plan.noise_multiplier
    spend(second)
    assert recomputed(ledger.entries(), "train") <= spent(ledger.entries(), DELTA) <= 9.0
    ledger.close()


def test_a_run_that_was_planned_for_another_federation_is_refused():
    ledger = Ledger.in_memory()
    opened(ledger)
    with pytest.raises(Refusal, match=r"^run run was planned here for another federation than [0-9a-f]{64}$"):
        opened(ledger, federation=private(training__rounds=300))
    ledger.close()


def test_a_federation_for_which_nothing_is_left_is_refused_with_the_numbers():
    ledger, policy = Ledger.in_memory(), owner(epsilon=4.6, delta=DELTA)
    spend(opened(ledger, policy=policy))
    said = r"^policy\.epsilon: 4\.6 at delta 0\.001, of which 0\.0\d is left; the federation asks for 4$"
    with pytest.raises(BudgetExhausted, match=said):
        opened(ledger, run="second", policy=policy)
    ledger.close()


def test_evaluations_that_the_account_does_not_cover_are_refused_with_the_numbers():
    # 20 evaluations at noise 6.5 are like one at 6.5 / sqrt(20) = 1.45 and cost 2.0; 40 of them in two runs cost 4.0.
    ledger, policy = Ledger.in_memory(), owner(epsilon=2.5, delta=DELTA)
    many = {"row": {"epsilon": 3.5, "delta": DELTA, "clip": 1.0}, "evaluation": {"every": 1, "noise": 6.5}}
    asked = private(privacy=many, training__rounds=20)
    spend(opened(ledger, federation=asked, policy=policy), rounds=1, evaluations=20)
    with pytest.raises(BudgetExhausted, match=r"of which [12]\.\d\d is spent; with this run it would be 4\.\d\d$"):
        opened(ledger, run="second", federation=asked, policy=policy)
    ledger.close()


def test_runs_that_take_turns_cannot_spend_together_what_each_could_alone():
    # A server may open as many runs as it likes before it asks any for an update.
    ledger, policy = Ledger.in_memory(), owner(epsilon=5.0, delta=DELTA)
    budgets = [opened(ledger, run=f"run-{i}", policy=policy) for i in range(3)]
    refused = 0
    for i in range(ROUNDS):
        for budget in budgets:
            try:
                budget.charge_update(f"train/{i}")
            except BudgetExhausted as error:
                assert "with this run it would be" in str(error)
                refused += 1
    assert refused
    assert recomputed(ledger.entries(), "train") <= 5.0
    ledger.close()


def test_a_run_goes_on_beside_another_if_the_account_covers_both():
    ledger = Ledger.in_memory()
    budgets = [opened(ledger, run=run) for run in ("a", "b")]
    for i in range(ROUNDS):
        for budget in budgets:
            budget.charge_update(f"train/{i}")
    assert [b.rounds_charged for b in budgets] == [3, 3]
    ledger.close()


# The row count


class Adding(NoiseSource):
    """Adds a given number to the row count."""

    def __init__(self, number: int) -> None:
        super().__init__(bytes, hardened=False)
        self.number = number
        self.asked: list[float] = []

    def two_sided_geometric(self, epsilon: float) -> int:
        self.asked.append(epsilon)
        return self.number


def counts_of(ledger: Ledger) -> list[Entry]:
    return [e for e in ledger.entries() if e.mechanism == "geometric"]


def test_the_row_count_is_released_once_for_a_table():
    ledger = Ledger.in_memory()
    first = opened(ledger, run="a")
    second = opened(ledger, run="b", federation=private(name="b"), source=noise.seeded(99))
    assert len(counts_of(ledger)) == 1
    assert counts_of(ledger)[0].epsilon == 0.1
    assert first.plan.rows == second.plan.rows
    ledger.close()


def test_another_table_or_another_split_is_counted_anew():
    ledger = Ledger.in_memory()
    for i, dataset in enumerate([DATASET, dataset_of(table(260)), replace(DATASET, split="other")]):
        opened(ledger, run=f"{i}", dataset=dataset)
    assert len(counts_of(ledger)) == 3
    ledger.close()


@pytest.mark.parametrize("first, second, releases", [(0.1, 1.0, 1), (1.0, 0.1, 2), (0.1, 0.1, 1)])
def test_a_count_told_at_a_higher_price_is_not_passed_off_at_a_lower(first, second, releases):
    def asking(count_epsilon: float) -> Federation:
        row = {"epsilon": 4.0, "delta": DELTA, "clip": 1.0, "count_epsilon": count_epsilon}
        return private(privacy={"row": row, "evaluation": {"every": 0}})

    ledger = Ledger.in_memory()
    opened(ledger, run="a", federation=asking(first))
    opened(ledger, run="b", federation=asking(second))
    assert [e.epsilon for e in counts_of(ledger)] == [first, second][:releases]
    ledger.close()


def test_the_count_gets_the_noise_that_its_epsilon_asks_for():
    ledger, source = Ledger.in_memory(), Adding(5)
    opened(ledger, source=source)
    assert source.asked == [0.1]
    assert counts_of(ledger)[0].value == len(DATASET.y) + 5
    ledger.close()


def telling(count: int) -> NoiseSource:
    return Adding(count - len(DATASET.y))


@pytest.mark.parametrize(
    "told, rows", [(-50, 8), (0, 8), (3, 8), (8, 8), (99, 99), (104, 100), (147, 150), (1049, 1000), (98_765, 99_000)]
)
def test_the_told_number_has_two_digits_and_is_never_less_than_a_batch(told, rows):
    ledger = Ledger.in_memory()
    strict = {"epsilon": 4.0, "delta": 1e-6, "clip": 1.0}
    budget = opened(ledger, federation=private(privacy__row=strict), source=telling(told))
    assert budget.plan.rows == budget.statement().rows == rows
    assert budget.plan.sampling_rate == min(1.0, 8 / rows)
    ledger.close()


def test_rounding_to_two_digits_does_not_go_below_a_batch():
    ledger = Ledger.in_memory()
    assert opened(ledger, federation=private(training__batch_size=104), source=telling(103)).plan.rows == 104
    ledger.close()


@pytest.mark.parametrize("epochs", [{}, {"training__local_steps": ..., "training__local_epochs": 1}])
def test_tables_of_different_size_that_tell_the_same_number_tell_the_same_of_all(epochs):
    said = []
    for rows in (120, 300):
        dataset, ledger = dataset_of(table(rows)), Ledger.in_memory()
        told = Adding(150 - len(dataset.y))
        budget = opened(ledger, dataset=dataset, federation=private(**epochs), source=told)
        steps = [budget.charge_update("train/1"), budget.charge_update("train/2")]
        budget.charge_evaluation("evaluate/2")
        said.append((budget.statement(), budget.plan, steps, budget.describe()))
        ledger.close()
    assert said[0] == said[1]


# Tables that are too small


@pytest.mark.parametrize("rows", [7, 1, 0])
def test_a_table_smaller_than_a_batch_is_planned_like_one_of_a_batch(rows):
    # A refusal would say that there are fewer rows, which nobody has paid for.
    ledger = Ledger.in_memory()
    small = opened(ledger, dataset=replace(DATASET, x=DATASET.x[:rows], y=DATASET.y[:rows]), source=Adding(0))
    assert (small.plan.rows, small.plan.sampling_rate) == (8, 1.0)
    ledger.close()


@pytest.mark.parametrize("exact, told, fits", [(900, 1100, False), (1100, 900, True)])
def test_a_delta_is_judged_by_the_count_that_was_told_and_not_by_the_exact_one(exact, told, fits):
    ledger, dataset = Ledger.in_memory(), dataset_of(table(round(exact / 0.75)))
    source = Adding(told - len(dataset.y))
    if fits:
        assert opened(ledger, dataset=dataset, source=source).plan.rows == told
    else:
        said = r"^privacy\.row\.delta 0\.001 is above 1 / rows, of which about 1100 were told: it would allow"
        with pytest.raises(Refusal, match=said):
            opened(ledger, dataset=dataset, source=source)
    assert [e.mechanism for e in ledger.entries()] == ["geometric"]  # the refusal follows from what was paid for
    ledger.close()


def test_evaluations_that_cost_too_much_are_refused_before_the_count_is_told():
    ledger = Ledger.in_memory()
    loud = {"row": {"epsilon": 4.0, "delta": DELTA, "clip": 1.0}, "evaluation": {"every": 1, "noise": 0.5}}
    with pytest.raises(PrivacyError, match=r"3 evaluations at noise 0\.5 cost .* evaluate less often"):
        opened(ledger, federation=private(privacy=loud))
    assert ledger.count() == 0
    ledger.close()


def test_a_table_of_a_whole_batch_is_taken():
    ledger, rows = Ledger.in_memory(), len(DATASET.y)
    budget = opened(ledger, federation=private(training__batch_size=rows), source=Adding(0))
    assert budget.plan.sampling_rate == pytest.approx(1.0, abs=0.05)
    ledger.close()


# A federation that needs no row count

UNCOUNTED = {"privacy__row": {"epsilon": 4.0, "delta": DELTA, "clip": 1.0, "count_epsilon": None, "sampling_rate": 0.1}}


def test_with_a_given_sampling_rate_no_count_is_told_and_all_epsilon_goes_to_the_updates():
    ledger = Ledger.in_memory()
    budget = opened(ledger, federation=private(**UNCOUNTED))
    spend(budget)
    assert [e.mechanism for e in ledger.entries()] == ["gaussian"] * 4
    assert {e.sampling_rate for e in ledger.entries() if e.part == "train"} == {0.1}
    assert (budget.plan.rows, budget.plan.count_epsilon) == (0, 0.0)
    assert 3.9 < budget.epsilon <= 4.0
    assert budget.epsilon == pytest.approx(recomputed(ledger.entries(), "train"), rel=0.01)


def test_then_nothing_depends_on_the_tables_size():
    plans = [
        opened(Ledger.in_memory(), federation=private(**UNCOUNTED), dataset=dataset_of(table(rows)), source=source).plan
        for rows, source in ((20, noise.seeded(1)), (200, noise.seeded(2)))
    ]
    assert plans[0] == plans[1]
    small = dataset_of(table(6))  # fewer training rows than the batch size, which is only a divisor here
    assert opened(Ledger.in_memory(), federation=private(**UNCOUNTED), dataset=small).plan == plans[0]


# The owner's rules that need a plan


def test_a_plan_with_less_noise_than_the_policy_wants_is_refused():
    needed = opened(Ledger.in_memory()).plan.noise_multiplier
    just, more = (owner(epsilon=100.0, delta=DELTA, min_noise_multiplier=needed * f) for f in (0.99, 1.01))
    opened(Ledger.in_memory(), federation=private(privacy__evaluation__noise=9.0), policy=just)
    with pytest.raises(Refusal, match=rf"^policy\.min_noise_multiplier: asked {needed:.3g}, allowed at least"):
        opened(Ledger.in_memory(), federation=private(privacy__evaluation__noise=9.0), policy=more)


def test_epochs_that_are_more_steps_than_the_policy_wants_are_refused():
    epochs = private(training__local_steps=..., training__local_epochs=2)
    steps = opened(Ledger.in_memory(), federation=epochs).plan.steps
    opened(Ledger.in_memory(), federation=epochs, policy=owner(epsilon=9.0, delta=DELTA, max_local_steps=steps))
    with pytest.raises(Refusal, match=rf"^policy\.max_local_steps: asked {steps}, allowed {steps - 1}$"):
        opened(Ledger.in_memory(), federation=epochs, policy=owner(epsilon=9.0, delta=DELTA, max_local_steps=steps - 1))


def test_once_the_table_has_changed_the_parts_costs_are_added():
    # A corrected cell makes another row of a person's, which may be dealt to the other part: that person pays for both.
    update = Entry(
        part="train",
        split="s",
        run="one",
        task="1",
        attempt=1,
        mechanism="gaussian",
        federation="f",
        content="before",
        noise_multiplier=2.0,
        sampling_rate=0.1,
        steps=10,
    )
    counts = replace(update, part="validation", noise_multiplier=3.0, sampling_rate=1.0, steps=1)
    alone = [spent([e], DELTA) for e in (update, counts)]
    assert spent([update, counts], DELTA) == max(alone)
    after = [replace(counts, content="after"), replace(counts, split="t")]
    for other in after:
        assert spent([update, other], DELTA) > max(alone)
        # By dp-accounting, as if both were of one part.
        together = recomputed([update, replace(other, part="train")], "train", DELTA / 2)
        assert spent([update, other], DELTA) == pytest.approx(together, rel=2e-3)
    refusal = replace(update, content="", split="", mechanism="refusal", part="validation")
    assert spent([update, counts, refusal], DELTA) == max(alone)


def test_a_run_whose_table_changes_pays_for_both_parts_and_says_so():
    ledger = Ledger.in_memory()
    spend(opened(ledger), rounds=2, evaluations=0)
    same = opened(ledger)
    spend(same, rounds=0, evaluations=1)
    before, changed = same.statement(), opened(ledger, dataset=replace(DATASET, content="another"))
    after = changed.statement()
    parts = [changed.plan.epsilon(rounds=2, evaluations=0), changed.plan.epsilon(rounds=0, evaluations=1)]
    assert before.epsilon == max(parts)
    assert after.epsilon == pytest.approx(sum(parts))
    assert after.planned_epsilon == 4.0 >= before.planned_epsilon
    assert after.epsilon >= spent(ledger.entries(), DELTA) - 1e-9
    with pytest.raises(
        BudgetExhausted, match=r"the table has changed since run run began here, .* federation allows 4"
    ):
        changed.charge_update("train/9")  # both parts would cost more than the federation says
    ledger.close()


@pytest.mark.parametrize("told_by", ["run", "an earlier run", "run, planned by an older client"])
def test_a_table_that_changes_between_the_row_count_and_the_first_round_is_another_deal(told_by):
    # The count was of the training part of the old table, in which a row of the new validation part may have been.
    ledger = Ledger.in_memory()
    opened(ledger, run=told_by.partition(",")[0])
    opened(ledger)
    if "older" in told_by:
        ((kept,),) = ledger._db.execute("SELECT body FROM plans")
        without = {k: v for k, v in json.loads(kept).items() if k != "deal"}
        ledger._db.execute("UPDATE plans SET body = ?", (json.dumps(without),))
    assert len(counts_of(ledger)) == 1
    changed = opened(ledger, dataset=replace(DATASET, content="another"))
    assert changed.statement().planned_epsilon == 4.0
    changed.charge_evaluation("evaluate/1")
    both = changed.plan.count_epsilon + changed.plan.epsilon(rounds=0, evaluations=1)
    assert changed.statement().epsilon == pytest.approx(both)
    assert changed.statement().epsilon >= spent(ledger.entries(), 2 * DELTA) - 1e-9
    ledger.close()


def test_counts_cannot_be_bought_for_what_a_run_that_was_stopped_had_planned():
    row = {"epsilon": 4.0, "delta": DELTA, "clip": 1.0, "count_epsilon": None, "sampling_rate": 0.1}
    ledger, policy = Ledger.in_memory(), Policy(epsilon=4.0, delta=DELTA)
    first = opened(ledger, federation=private(training__rounds=30, privacy__row=row), policy=policy)
    for i in range(3):
        first.charge_update(f"train/{i}")
    for n, price in enumerate((1.3, 0.6, 0.3, 0.1)):
        another = private(
            name=f"{n}", privacy__row={"epsilon": 4.0, "delta": DELTA, "clip": 1.0, "count_epsilon": price}
        )
        with contextlib.suppress(BudgetExhausted):
            opened(ledger, run=f"{n}", federation=another, dataset=replace(DATASET, content=f"{n}"), policy=policy)
    entries = ledger.entries()
    pure = sum(e.epsilon or 0 for e in entries if e.mechanism == "geometric")
    updates = [e.gaussian for e in entries if e.mechanism == "gaussian"]
    assert spent(entries, DELTA) == pytest.approx(pure + epsilon_of_adaptive(updates, DELTA / 2)) and pure > 0
    assert spent(entries, DELTA) <= 4.0
    ledger.close()


def test_evaluations_that_the_account_will_not_cover_are_refused_before_a_count_is_told():
    dear = private(privacy__evaluation={"every": 3, "noise": 0.85})  # 3.84 at delta, 4.09 at half of it
    ledger = Ledger.in_memory()
    with pytest.raises(
        BudgetExhausted, match=r"policy\.epsilon: 4 at delta 0\.001, of which 0\.00 is spent; with this run"
    ):
        opened(ledger, federation=dear, policy=Policy(epsilon=4.0, delta=DELTA))
    assert ledger.count() == 0
    ledger.close()


def test_one_authoritys_federations_may_be_held_to_less_than_all_together_whatever_they_are_called():
    ledger, policy = Ledger.in_memory(), owner(epsilon=100.0, delta=DELTA, federation_epsilon=9.0)
    ledger.authority = "one"
    spend(opened(ledger, run="first", policy=policy))
    spend(opened(ledger, run="second", policy=policy))
    with pytest.raises(BudgetExhausted, match=r"^policy\.federation_epsilon: 9 at delta 0\.001, of which \d\.\d+ is"):
        for i in range(9):
            spend(opened(ledger, run=f"more-{i}", federation=private(name=f"name-{i}"), policy=policy))
    assert 8 < spent(ledger.entries(), DELTA) <= 9.0
    ledger.authority = "another"
    opened(ledger, run="other", policy=policy)
    ledger.authority = ""  # without TLS nobody knows who asks
    with pytest.raises(BudgetExhausted, match=r"^policy\.federation_epsilon"):
        opened(ledger, run="unknown", policy=policy)


def test_what_one_federation_may_cost_is_told_at_a_delta_of_its_own():
    ledger = Ledger.in_memory()
    at_less = opened(ledger, policy=owner(epsilon=100.0, delta=1e-5, federation_epsilon=4.0, federation_delta=DELTA))
    spend(at_less)
    assert spent(ledger.entries(), DELTA) <= 4.0 < spent(ledger.entries(), 1e-5)


def test_a_run_that_is_refused_has_not_been_charged_its_row_count():
    ledger, policy = Ledger.in_memory(), owner(epsilon=100.0, delta=DELTA, federation_epsilon=4.0)
    spend(opened(ledger, policy=policy))
    before = ledger.count()
    for i in range(3):  # a table that changes would be counted anew each time
        with pytest.raises(BudgetExhausted, match=r"^policy\.federation_epsilon: 4 at delta"):
            opened(ledger, run=f"more-{i}", policy=policy, dataset=dataset_of(table(200, seed=i + 5)))
    assert ledger.count() == before


def test_a_count_that_another_federation_paid_for_is_not_free():
    ledger, policy = Ledger.in_memory(), owner(epsilon=100.0, delta=DELTA, federation_epsilon=9.0)
    opened(ledger)
    (count,) = counts_of(ledger)
    second = private(name="second")
    with pytest.raises(BudgetExhausted):
        for i in range(9):
            spend(opened(ledger, run=f"{i}", federation=second, policy=policy))
    assert counts_of(ledger) == [count]
    used = [e for e in ledger.entries() if e.federation == second.fingerprint or e == count]
    assert 8.9 < spent(used, DELTA) <= 9.0


def test_a_charge_that_was_written_but_whose_head_was_not_is_counted(monkeypatch):
    ledger = Ledger.in_memory()
    budget = opened(ledger)
    charge = ledger.charge

    def fails(*args: Any, **kwargs: Any) -> None:
        charge(*args, **kwargs)
        raise LedgerError("the ledger's head cannot be written")

    monkeypatch.setattr(ledger, "charge", fails)
    with pytest.raises(LedgerError):
        budget.charge_update("train/1")
    monkeypatch.undo()
    assert budget.rounds_charged == 1
    spend(budget, rounds=ROUNDS - 1)
    with pytest.raises(BudgetExhausted):
        budget.charge_update("train/last")


def test_a_round_that_comes_too_early_is_refused_and_not_charged(monkeypatch):
    ledger = Ledger.in_memory()
    budget = opened(ledger, policy=owner(epsilon=9.0, delta=DELTA, min_seconds_between_rounds=3600))
    budget.charge_update("train/1")
    with pytest.raises(Refusal, match=r"^policy\.min_seconds_between_rounds: asked a round at .* UTC, allowed from"):
        budget.charge_update("train/2")
    assert sum(e.mechanism == "gaussian" for e in ledger.entries()) == 1
    budget.charge_evaluation("evaluate/1")  # the rule is about rounds

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(hours=1)

    monkeypatch.setattr("client.account.books.datetime", Later)
    budget.charge_update("train/2")
