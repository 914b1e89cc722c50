from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant

from client import data
from client.account.books import Books
from client.account.budget import open_budget
from client.account.ledger import Ledger
from client.account.policy import Policy
from cloister.plan import lines
from common.document import documents
from common.document.federation import Federation
from common.errors import PrivacyError
from common.privacy import forecast as forecasts
from common.privacy import noise
from common.privacy.forecast import MOST_ROUNDS, forecast, rounds_within
from common.privacy.plan import plan_for, spare_attempts
from common.privacy.releases import GaussianRelease, epsilon
from tests.support import HEART, PRIVATE, ROOT, WHOLE, document, federation, table


def private(**changes: Any) -> Federation:
    return federation(**{**PRIVATE, **changes})


def test_the_forecast_is_what_a_client_with_such_a_table_plans():
    rows = table(200)
    schema = federation().data_schema
    dataset = data.split(data.encode_rows(rows, schema, key=b"k"), schema, key=b"k", device=torch.device("cpu"))
    policy = Policy(epsilon=9.0, delta=1e-3)
    books = Books(federation=private(), dataset=dataset, policy=policy, ledger=Ledger.in_memory())
    budget = open_budget(books, noise=noise.seeded(1), run="run")
    told = forecast(private(), 200)
    assert told["training_rows"] == 150  # of which a client tells about so many
    assert budget.plan == plan_for(private(), rows=budget.plan.rows, epsilon=4.0)
    assert told["noise_multiplier"] == pytest.approx(budget.plan.noise_multiplier, rel=0.1)


def test_the_cost_is_that_of_dp_accounting():
    told = forecast(private(training__rounds=10), 200)
    accountant = PLDAccountant()
    step = PoissonSampledDpEvent(told["sampling_rate"], GaussianDpEvent(told["noise_multiplier"]))
    accountant.compose(step, told["steps"] * (told["rounds"] + told["attempts"]))
    assert told["of_which"]["updates"] == pytest.approx(accountant.get_epsilon(told["delta"]), rel=0.01)
    assert told["epsilon"] == pytest.approx(told["of_which"]["updates"] + 0.1)
    assert 0.98 * 4.0 < told["epsilon"] <= 4.0


def test_the_reverse_is_the_last_round_that_still_fits():
    plan = plan_for(private(), rows=150, epsilon=4.0)
    rounds = rounds_within(plan, 1.0, 4.0)
    assert 3 < rounds < 500
    noisy = replace(plan, noise_multiplier=1.0)
    costs = [noisy.epsilon(rounds=n + spare_attempts(n), evaluations=0) for n in (rounds, rounds + 1)]
    assert costs[0] <= 4.0 < costs[1]
    assert rounds_within(plan, 0.05, 4.0) == 0
    assert rounds_within(plan, 1e5, 4.0) == MOST_ROUNDS


@pytest.mark.parametrize(("rounds", "spare"), [(3, 1), (10, 1), (11, 2), (30, 3), (1000, 3)])
def test_few_rounds_have_few_spare_attempts(rounds, spare):
    asked = private(training__rounds=rounds)
    assert plan_for(asked, rows=150, epsilon=4.0, evaluate=False).attempts == spare
    assert plan_for(asked, rows=150, epsilon=4.0, evaluate=False, attempts=0).attempts == 0


def test_evaluations_have_no_spare_attempts_that_would_cost_more_than_the_federation_says():
    # Noise 2.3 once costs 1.6 of the 4; noise 1 costs 4.2 and is refused; between, it costs 3.9 once and more twice.
    for multiplier, spare in ((2.3, 1), (1.06, 0)):
        plan = plan_for(private(privacy__evaluation__noise=multiplier), rows=150, epsilon=4.0)
        assert (plan.evaluations, plan.evaluation_attempts) == (1, spare)
        assert plan.epsilon(rounds=0, evaluations=plan.most_evaluations) <= 4.0


def test_the_table_has_every_choice_and_more_noise_for_more_of_each():
    told = forecast(private(training__rounds=6), 400)
    table_ = {(a["rounds"], a["batch_size"]): a["noise_multiplier"] for a in told["alternatives"]}
    assert set(table_) == {(r, b) for r in (3, 6, 12) for b in (4, 8, 16)}
    assert set(table_[6, 8]) == {"2", "4", "8"}
    assert table_[6, 8]["2"] > table_[6, 8]["4"] > table_[6, 8]["8"]
    assert table_[12, 8]["4"] > table_[6, 8]["4"] > table_[3, 8]["4"]
    assert table_[6, 16]["4"] > table_[6, 8]["4"] > table_[6, 4]["4"]
    assert 1.0 < table_[6, 8]["4"] / told["noise_multiplier"] < 1.35  # RDP asks for a little more


def test_a_federation_that_gives_its_sampling_rate_needs_no_row_count():
    row = {"epsilon": 4.0, "delta": 1e-3, "clip": 1.0, "count_epsilon": None, "sampling_rate": 0.1}
    few, many = (forecast(private(privacy__row=row), rows) for rows in (20, 900))
    assert few["noise_multiplier"] == many["noise_multiplier"]
    assert few["of_which"]["row_count"] == 0.0


def test_an_epsilon_that_the_row_count_would_use_up_is_left_out_of_the_table():
    row = {"epsilon": 0.5, "delta": 1e-3, "clip": 1.0, "count_epsilon": 0.25}
    told = forecast(private(privacy__row=row, privacy__evaluation__every=0), 200)
    assert list(told["alternatives"][0]["noise_multiplier"]) == ["0.5", "1"]
    assert "rounds within epsilon 0.5 at a noise multiplier of" in lines(told)


def test_what_evaluations_cost_is_told_with_their_spare_attempts():
    told = forecast(private(training__rounds=30, privacy__evaluation={"every": 10, "noise": 5.0}), 200)
    of_six = epsilon([GaussianRelease(noise_multiplier=5.0, steps=6)], 1e-3)
    assert told["evaluations"] == {"times": 3, "attempts": 3, "noise_multiplier": 5.0, "epsilon": pytest.approx(of_six)}
    said = f"  or, if it is a validation row, {of_six:.2f} for 3 evaluations, and 3 spare attempts, at noise 5"
    assert said in lines(told)
    assert "  and 3 spare attempts at a round, for a client that dies in one" in lines(told)


def test_both_units_are_told():
    both = private(privacy__client={"epsilon": 2.0, "delta": 0.01, "clip": 1.0, "clients": 5})
    told = forecast(both, 200)
    assert told["client"]["epsilon"] == 2.0
    assert any("the server protects whole clients: epsilon 2 at delta 0.01" in line for line in lines(told))


@pytest.mark.parametrize(
    "changes, rows, said",
    [
        (WHOLE, 200, "privacy.row is null: the federation trains without noise"),
        (PRIVATE, 5, "a table of 5 rows has about 4 to train on, fewer than training.batch_size 8"),
        (PRIVATE, 2000, "privacy.row.delta 0.001 is above 1 / rows, 0.00067; no client would agree"),
    ],
)
def test_a_table_that_no_client_would_bring_is_refused(changes, rows, said):
    with pytest.raises(PrivacyError) as raised:
        forecast(federation(**changes), rows)
    assert said in str(raised.value)


def test_another_epsilon_can_be_asked_about(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_text(yaml.safe_dump(document(**PRIVATE)))
    assert forecast(forecasts.load(path, epsilon=1.9), 200)["epsilon"] <= 1.9
    assert forecasts.load(path, epsilon=None) == documents.load(path, Federation)
    for bad in (0.0, -1.0, 0.1, math.nan, math.inf):
        with pytest.raises(PrivacyError, match=r"--epsilon must be above 0 and at least twice count_epsilon, 0\.2"):
            forecasts.load(path, epsilon=bad)


def test_planning_waits_for_no_heavy_library():
    """What makes `cloister plan` answer at once: torch, opacus, flwr and scipy take seconds to load."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom common.privacy import forecast\n"
        f"forecast.forecast(forecast.load(Path({str(HEART / 'federation.yaml')!r}), epsilon=None), 199)\n"
        "print(sorted({'torch', 'opacus', 'flwr', 'scipy', 'polars'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
