"""Suggested settings make documents that hold, whose plans keep to epsilon, and whose noise is what the rule says."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import yaml

from common.document import federation as federations
from common.document.federation import Federation
from common.errors import ConfigError
from common.privacy.forecast import forecast
from common.privacy.suggestion import changed, suggest
from tests.support import PRIVATE, WHOLE, document, federation

NUMBER = {"schema__target": {"name": "y", "bounds": [0, 10]}, "training__loss": "mse"}
CLASSES = {"schema__target": {"name": "y", "classes": [0, 1]}}
TEN = {"schema__target": {"name": "y", "classes": list(range(10))}}


def protected(limit: float, **changes: Any) -> dict[str, Any]:
    row = {"epsilon": limit, "delta": 1e-6, "clip": 1.0, "count_epsilon": 0.01}
    return document(privacy={"row": row, "evaluation": {"every": 3, "noise": 3.0}}, **changes)


def loaded(tmp_path, value: dict[str, Any], changes: Any = None) -> Federation:
    path = tmp_path / "federation.yaml"
    path.write_text(yaml.safe_dump(value))
    return federations.load(path, changes=changes)


@pytest.mark.parametrize("target", [CLASSES, TEN, NUMBER], ids=["two", "ten", "number"])
def test_the_document_with_them_is_valid_and_its_plan_keeps_to_epsilon(tmp_path, target):
    for rows, clients, limit in itertools.product((2, 40, 3_000, 200_000), (1, 4, 1_000), (0.1, 1.0, 8.0)):
        value = protected(limit, **target)
        found = suggest(loaded(tmp_path, value), rows=rows, clients=clients)
        told = forecast(loaded(tmp_path, value, found.changes), rows)
        assert 0.9 * limit < told["epsilon"] <= limit
        assert told["of_which"]["row_count"] == 0.0 and told["warning"] is None
        assert len(found.reasons) == len(found.changes)


def test_each_reason_begins_with_its_value_and_what_it_was_measured_on_is_said():
    found = suggest(federation(**PRIVATE), rows=200, clients=4)
    said = dict(re.match(r"([\w.]+) is (\S+): ", reason).groups() for reason in found.reasons)
    assert said["training.batch_size"] == "150"  # three quarters of 200 rows
    assert said["model.hidden"] == "[32]"
    assert list(said) == [".".join(key) for key in found.changes]
    assert found.measured.startswith(
        "Measured on the hospitals, the digits, breast cancer and wine, and tried on iris,"
    )


def test_the_noise_of_an_output_is_that_of_the_plan():
    """With noise s x clip in the sum of 37 rows of each of 16 clients, 30 steps of rate r add up to
    sqrt(30) x r x s x clip / (37 x sqrt(16)) in each weight; five inputs of size 1/2 make sqrt(5) / 2 of it."""
    fed = federation(**PRIVATE)
    found = suggest(fed, rows=50, clients=16)
    told = forecast(changed(fed, found.changes), 50)
    assert fed.layer_sizes[0] == 5 and told["training_rows"] == 38
    rate = found.changes["training", "learning_rate"]
    noise = math.sqrt(30) * rate * told["noise_multiplier"] * told["clip"] / (38 * 4) * math.sqrt(5) / 2
    assert found.reach is not None
    assert noise == pytest.approx(found.noise_per_reach * found.reach, rel=0.05)  # the rate has two digits
    assert rate * told["clip"] * 30 == pytest.approx(found.reach, rel=0.05)


def test_more_clients_or_rows_let_a_run_reach_further_up_to_a_limit():
    fed = federation(privacy={"row": {"epsilon": 1.0, "delta": 1e-3, "clip": 1.0}, "evaluation": {"every": 0}})
    reach = [suggest(fed, rows=20, clients=clients).reach for clients in (1, 4, 16, 64, 10_000)]
    assert reach == sorted(reach) and reach[0] == 15.0 and reach[-1] == 60.0
    assert 15.0 < reach[2] < reach[3] < 60.0
    assert reach[3] == pytest.approx(2 * reach[2])  # noise falls as the root of the number of clients


def test_noise_takes_the_hidden_layer_away():
    quiet = suggest(federation(**PRIVATE), rows=400, clients=10)
    noisy = suggest(federation(**PRIVATE), rows=8, clients=2)
    assert quiet.changes["model", "hidden"] == [32] and noisy.changes["model", "hidden"] == []
    assert quiet.noise_per_reach < 1 / 15 < noisy.noise_per_reach


def test_a_client_s_clip_is_its_share_of_the_reach_and_its_evaluations_leave_room():
    fed = federation(**WHOLE)
    found = suggest(fed, rows=200, clients=9)
    after = changed(fed, found.changes)
    assert found.reach is not None and after.privacy.client is not None
    assert after.privacy.client.clip * 30 == pytest.approx(found.reach, rel=0.05)
    assert len(after.evaluation_rounds) == 1
    assert after.training.batch_size == 300  # twice what a client trains on, so that no step is of a few rows left over
    assert found.changes["training", "local_steps"] == 4 and ("privacy", "row", "clip") not in found.changes


def test_without_privacy_nothing_of_it_is_set_and_an_existing_model_keeps_its_layers():
    fed = federation(start={"sha256": "0" * 64}, training__momentum=0.9, training__schedule={"name": "cosine"})
    found = suggest(fed, rows=20, clients=3)
    assert found.reach is None and not any("privacy" in key for key in found.changes)
    assert ("model", "hidden") not in found.changes
    after = changed(fed, found.changes)
    assert after.training.momentum == 0.0 and after.training.schedule is None
    assert after.training.batch_size == 32


def test_evaluations_that_cost_too_much_become_one(tmp_path):
    value = protected(0.5, **CLASSES)
    found = suggest(loaded(tmp_path, value), rows=100, clients=4)
    told = forecast(loaded(tmp_path, value, found.changes), 100)
    assert told["evaluations"]["times"] == 1 and told["evaluations"]["epsilon"] <= 0.5


def test_what_was_not_measured_is_said():
    both = {**PRIVATE["privacy"], "client": WHOLE["privacy"]["client"]}
    found = suggest(federation(privacy=both, strategy__name="fedadam"), rows=200, clients=9)
    assert [caveat.partition(",")[0] for caveat in found.caveats] == [
        "strategy fedadam takes steps of its own",
        "both units at once were not measured: each rule is used as if the other's noise were its own",
    ]


@pytest.mark.parametrize(("rows", "clients"), [(0, 3), (3, 0), (10**9 + 1, 3)])
def test_no_rows_no_clients_and_too_many_rows_are_refused(rows, clients):
    with pytest.raises(ConfigError) as raised:
        suggest(federation(**PRIVATE), rows=rows, clients=clients)
    said = f"for 1 to 1,000,000,000 rows, and at least 1 client (got {rows:,} and {clients})"
    assert said in str(raised.value.problems)
