"""Third parties: dp-accounting's PLD, and Opacus' own `get_epsilon`, of which ours is taken apart."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant
from opacus.accountants import PRVAccountant, RDPAccountant

from client.account.books import Books
from client.account.budget import open_budget
from client.account.ledger import Ledger
from common.errors import Refusal
from common.privacy import noise, second_opinion
from common.privacy.accountants import ORDERS
from common.privacy.plan import Plan, plan_for
from common.privacy.releases import GaussianRelease, epsilon
from common.privacy.second_opinion import Opinion, agrees, check, check_plan, of_plan, opinion
from tests.client.account.test_budget import DATASET, GENEROUS, private, spend

SENTENCE = r"^privacy\.row: a second accountant, Opacus, does not confirm the plan's epsilon, so it is not run$"

# (noise multiplier, sampling rate, steps, delta): what runs plan, then extremes that PRV still computes
BY_PRV = [
    (0.9, 0.01, 500, 1e-5),
    (1.1, 256 / 60_000, 3000, 1e-5),
    (2.0, 0.1, 60, 1e-3),
    (0.7, 0.05, 50, 1e-6),
    (5.0, 1.0, 30, 1e-3),
    (0.1, 0.5, 10, 1e-5),  # epsilon 566
    (0.1, 1.0, 1, 1e-5),
    (2.0, 0.9999, 100, 1e-5),
    (20.0, 0.01, 200_000, 1e-6),
    (3.0, 1.0, 20, 0.5),
    (1.0, 1.0, 1, 1e-9),
    (100.0, 1.0, 1, 1e-5),  # epsilon 0.026
]
BY_RDP = [
    (2.0, 0.1, 100, 1e-10),  # delta
    (0.01, 0.5, 10, 1e-5),  # losses of 50,000
    (1.5, 0.5, 10_000, 1e-5),  # losses of 800: PRV says infinity
    (0.4, 1e-9, 1000, 1e-3),  # our own figure is RDP's
    (1.0, 1e-7, 1000, 1e-5),  # scipy warns of the mean's integral
    (500.0, 0.01, 1_000_000, 1e-5),  # a mesh that is too large for so small an epsilon
]


def ours(sigma: float, rate: float, steps: int, delta: float) -> float:
    return epsilon([GaussianRelease(noise_multiplier=sigma, sampling_rate=rate, steps=steps)], delta)


def planned(**changes: Any) -> Plan:
    return replace(plan_for(private(), rows=160, epsilon=4.0), **changes)


# The figures


@pytest.mark.parametrize("sigma, rate, steps, delta", [*BY_PRV, *BY_RDP])
def test_our_figure_agrees_with_opacus_and_figures_a_tenth_off_do_not(sigma, rate, steps, delta):
    history, right = ((sigma, rate, steps),), ours(sigma, rate, steps, delta)
    theirs = opinion(history, delta)
    assert theirs.accountant == ("PRV" if (sigma, rate, steps, delta) in BY_PRV else "RDP")
    assert agrees(right, history, delta)
    assert not agrees(math.nan, history, delta)
    assert not agrees(1.1 * theirs.high, history, delta)
    if theirs.accountant == "PRV":
        assert not agrees(0.9 * right, history, delta)
        assert not agrees(1.1 * right, history, delta)


@pytest.mark.parametrize("sigma, rate, steps, delta", BY_PRV[:5])
def test_dp_accountings_figure_lies_between_the_bounds(sigma, rate, steps, delta):
    event: dp_event.DpEvent = dp_event.GaussianDpEvent(sigma)
    accountant = pld_privacy_accountant.PLDAccountant(value_discretization_interval=1e-3)
    accountant.compose(event if rate == 1 else dp_event.PoissonSampledDpEvent(rate, event), steps)
    theirs = opinion(((sigma, rate, steps),), delta)
    assert theirs.low <= accountant.get_epsilon(delta) <= theirs.high
    assert theirs.high - theirs.low <= 0.021 * theirs.figure


@pytest.mark.parametrize("sigma, rate, steps, delta", BY_PRV[:4])
def test_the_upper_bound_is_what_opacus_returns(sigma, rate, steps, delta):
    accountant = PRVAccountant()
    accountant.history = [(sigma, rate, steps)]
    expected = accountant.get_epsilon(delta, eps_error=0.01 * ours(sigma, rate, steps, delta))
    assert opinion(((sigma, rate, steps),), delta).high == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:Optimal order")
def test_where_prv_cannot_say_it_is_opacus_rdp_that_answers_and_is_named():
    accountant = RDPAccountant()
    accountant.history = [(0.01, 0.5, 10)]
    theirs = opinion(((0.01, 0.5, 10),), 1e-5)
    assert theirs.figure == pytest.approx(accountant.get_epsilon(1e-5, alphas=list(ORDERS)))
    assert (theirs.low, str(theirs)) == (0.0, f"Opacus (RDP, where its PRV cannot say): at most {theirs.figure:.2f}")


def test_where_both_figures_are_rdps_they_must_be_equal():
    history, right = ((2.0, 0.1, 100),), ours(2.0, 0.1, 100, 1e-10)
    assert not agrees(0.99 * right, history, 1e-10)
    assert not agrees(1.01 * right, history, 1e-10)


def test_adding_a_row_may_cost_more_than_opacus_says_of_removing_it(monkeypatch):
    history = ((2.0, 0.1, 60),)
    above = 1.05 * opinion(history, 1e-3).high
    assert not agrees(above, history, 1e-3)
    monkeypatch.setattr(second_opinion, "_adding", lambda history, delta: above)  # Lebeda et al. say that it can
    assert agrees(above, history, 1e-3)


def test_nothing_released_costs_nothing():
    assert opinion((), 1e-3).high == 0.0
    assert agrees(0.0, (), 1e-3)
    assert not agrees(0.1, (), 1e-3)


def test_no_plan_takes_more_than_seconds_and_an_equal_one_nothing():
    opinion(((2.0, 0.1, 60),), 1e-3)  # Opacus is imported now
    history = ((20.0, 0.01, 1_000_000),)
    ours(*history[0], 1e-6)
    begun = time.monotonic()
    first = opinion(history, 1e-6)
    assert time.monotonic() - begun < 10  # 1 on an idle machine
    begun = time.monotonic()
    assert opinion(history, 1e-6) is first
    assert time.monotonic() - begun < 0.01


# Plans


def test_a_plan_is_confirmed_with_its_row_count_and_its_evaluations():
    plan = planned()
    check_plan(plan, limit=4.0)
    theirs = of_plan(plan, rounds=plan.most_updates, evaluations=plan.most_evaluations)
    assert (theirs.accountant, theirs.figure) == ("PRV", pytest.approx(plan.total, rel=1e-3))
    dear = planned(evaluation_noise=0.5)
    assert of_plan(dear, rounds=3, evaluations=1).figure == pytest.approx(ours(0.5, 1.0, 1, 1e-3), rel=1e-3)


@pytest.mark.parametrize("changes", [{"noise_multiplier": 0.95}, {"steps": 9}, {"evaluation_noise": 0.5}])
def test_a_plan_that_costs_more_than_the_federation_allows_is_refused(changes, caplog):
    wrong = planned(**{k: v * planned().noise_multiplier if k == "noise_multiplier" else v for k, v in changes.items()})
    with caplog.at_level(logging.ERROR, logger="cloister.client"), pytest.raises(Refusal, match=SENTENCE):
        check_plan(wrong, limit=4.0)
    assert "epsilon 4.0000" in caplog.text and "Opacus (PRV)" in caplog.text  # numbers are the owner's


@pytest.mark.parametrize("sampled", [True, False], ids=["about updates", "about evaluations"])
@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_nothing_is_charged_where_our_accountant_is_wrong(monkeypatch, factor, sampled):
    def wrong(releases: Iterable[GaussianRelease], delta: float) -> float:
        known = list(releases)
        return epsilon(known, delta) * (factor if sampled == any(r.sampling_rate < 1 for r in known) else 1)

    monkeypatch.setattr(second_opinion, "epsilon", wrong)
    second_opinion._opinion.cache_clear()
    ledger = Ledger.in_memory()
    budget = opened(ledger)
    for charge in (budget.charge_update, budget.charge_evaluation):
        with pytest.raises(Refusal, match=SENTENCE):
            charge("run/task")
    assert ledger.count() == 1  # the row count
    second_opinion._opinion.cache_clear()
    monkeypatch.undo()
    budget.charge_update("run/task")
    ledger.close()


@pytest.mark.parametrize("what", ["updates", "evaluations"])
def test_a_figure_is_checked_by_itself(what, caplog):
    check(what, ((2.0, 0.1, 60),), 1e-3, ours(2.0, 0.1, 60, 1e-3))
    with pytest.raises(Refusal, match=SENTENCE):
        check(what, ((2.0, 0.1, 60),), 1e-3, 1.0)
    assert f"the {what}: epsilon 1.0000" in caplog.text


def test_a_stored_plan_is_checked_when_it_is_taken_up_again():
    ledger = Ledger.in_memory()
    opened(ledger)
    stored = ledger.plan("run")
    assert stored is not None
    weaker = {**stored, "noise_multiplier": 0.95 * stored["noise_multiplier"]}
    ledger._db.execute("UPDATE plans SET body = ?", (json.dumps(weaker),))
    again = opened(ledger)
    for charge in (again.charge_update, again.charge_evaluation):
        with pytest.raises(Refusal, match=SENTENCE):
            charge("run/task")
    assert ledger.count() == 1  # the row count
    ledger.close()


def opened(ledger: Ledger) -> Any:
    books = Books(federation=private(), dataset=DATASET, policy=GENEROUS, ledger=ledger)
    return open_budget(books, noise=noise.seeded(1), run="run")


# What is told


def test_the_statement_and_the_owners_line_have_opacus_figure():
    ledger = Ledger.in_memory()
    budget = opened(ledger)
    said = budget.statement()
    assert said.opacus_planned_epsilon == pytest.approx(said.planned_epsilon, rel=1e-3)
    assert said.opacus_prv == 1
    assert budget.confirm().startswith("a second accountant confirms the plan; Opacus (PRV): 3.99, between 3.9")
    ledger.close()


def test_in_the_end_both_figures_are_those_of_what_was_charged():
    ledger = Ledger.in_memory()
    budget = opened(ledger)
    assert "epsilon 0.10 at delta 0.001; Opacus (PRV): 0.10" in budget.in_the_end()  # the row count
    spend(budget, rounds=2, evaluations=1)
    said = budget.in_the_end()
    theirs = float(said.split("Opacus (PRV): ")[1].split(",")[0])
    assert said.startswith(f"what was charged costs a row epsilon {budget.epsilon:.2f} at delta 0.001; ")
    assert theirs == pytest.approx(budget.epsilon, abs=0.011)
    assert budget.epsilon < 3.9  # not the plan's
    assert "DISAGREE" not in said
    ledger.close()


def test_in_the_end_a_disagreement_is_said(monkeypatch):
    ledger = Ledger.in_memory()
    budget = opened(ledger)
    spend(budget)
    wrong = Opinion(accountant="PRV", low=9.0, figure=9.1, high=9.2)
    monkeypatch.setattr(second_opinion, "opinion", lambda history, delta: wrong)
    assert budget.in_the_end().endswith("; THE TWO DISAGREE: rely on neither, and report this")
    ledger.close()
