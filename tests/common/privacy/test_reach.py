from __future__ import annotations

import pytest
import torch

from client.training.plain import make_optimizer
from cloister.plan import lines
from common.document import federation as federations
from common.document.federation import Federation
from common.errors import ConfigError
from common.privacy.forecast import forecast
from common.privacy.reach import ENOUGH, LEAST, reach, warning
from tests.support import PRIVATE, ROOT, WHOLE, federation


def private(**changes: object) -> Federation:
    return federation(**PRIVATE, **changes)


def carried(fed: Federation, steps: int) -> float:
    """How far the document's optimizer goes in that many steps, if every gradient is 1 and points the same way."""
    module = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.zeros_(module.weight)
    optimizer = make_optimizer(module.parameters(), fed.training)
    for _ in range(steps):
        module.weight.grad = torch.ones_like(module.weight)
        optimizer.step()
    return -module.weight.item()


@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.5, False), (0.9, False), (0.5, True), (0.9, True)])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_reach_is_how_far_steps_of_the_clips_size_go_if_all_point_one_way(momentum, nesterov, steps):
    changes = {"training__momentum": momentum, "training__nesterov": nesterov, "training__local_steps": steps}
    fed = private(**changes, privacy__row__clip=0.5)
    assert reach(fed) == pytest.approx(3 * 0.5 * carried(fed, steps))  # 3 rounds


def test_a_small_reach_is_warned_of_with_both_numbers_and_the_rate_that_mends_it():
    text = warning(private())  # 3 rounds of 2 steps at 0.1, clip 1
    assert text is not None
    assert "at most 0.6 " in text
    assert "had 30 or more" in text
    assert "raise training.learning_rate first, to about 5: it costs no privacy" in text
    assert warning(private(training__learning_rate=5.0)) is None


def test_the_warning_begins_below_the_least_reach():
    # 3 rounds of 2 steps at clip 1: the reach is 6 times the rate.
    assert warning(private(training__learning_rate=LEAST / 6)) is None
    assert warning(private(training__learning_rate=0.99 * LEAST / 6)) is not None
    assert LEAST < ENOUGH


@pytest.mark.parametrize(
    "changes",
    [
        {"training__optimizer": "adam"},
        {"strategy": {"name": "fedadam", "min_clients": 2}},
        {"strategy": {"name": "fedavgm", "min_clients": 2}},
        {"privacy__client": WHOLE["privacy"]["client"]},  # type: ignore[index]
        {"schema__target": {"name": "y", "bounds": [0, 9]}, "training__loss": "mse"},
        {"privacy": {"row": None}},
    ],
    ids=["adam", "fedadam", "fedavgm", "whole clients", "number", "no clip"],
)
def test_where_nothing_was_measured_nothing_is_said(changes):
    fed = federation(**{**PRIVATE, **changes})
    assert (reach(fed), warning(fed)) == (None, None)


def test_epochs_have_a_reach_once_a_rows_rate_is_known():
    epochs = {"training__local_steps": ..., "training__local_epochs": 1}
    fed = private(**epochs)
    assert reach(fed) is None  # how many steps an epoch has, rows say
    assert reach(fed, steps=4) == pytest.approx(3 * 4 * 0.1)
    rate = {"privacy__row__sampling_rate": 0.25, "privacy__row__count_epsilon": None}
    assert reach(private(**epochs, **rate)) == pytest.approx(3 * 4 * 0.1)  # an epoch is 1 / 0.25 steps


def test_a_plan_tells_the_reach_and_the_warning():
    # 200 rows, 150 to train on in batches of 8: 19 steps an epoch, 3 rounds at 0.1.
    told = forecast(private(training__local_steps=..., training__local_epochs=1), 200)
    assert told["reach"] == pytest.approx(5.7)
    assert lines(told)[-1] == told["warning"]
    assert told["warning"].startswith("warning: this run can hardly learn")
    enough = forecast(private(training__learning_rate=5.0), 200)
    assert (enough["reach"], enough["warning"]) == (pytest.approx(30), None)
    assert not any("warning" in line for line in lines(enough))


def test_no_federation_that_we_ship_is_warned_of():
    shipped = []
    for path in (ROOT / "simulations").rglob("*.yaml"):
        try:
            shipped.append(federations.load(path))
        except ConfigError:
            continue  # a client file
    assert {fed.name for fed in shipped} >= {"article", "heart-disease"}
    assert [fed.name for fed in shipped if warning(fed)] == []
