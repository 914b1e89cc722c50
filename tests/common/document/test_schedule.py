"""Schedules are held against torch's, which step one optimizer."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from common.document.federation import load
from common.errors import ConfigError
from tests.support import document, federation

ROUNDS = 12
Made = Any


def factors(schedule: dict[str, Any], *, rounds: int = ROUNDS, steps: int = 1) -> list[float]:
    """Of each round, or with `over: steps` of each step."""
    training = federation(
        training__rounds=rounds, training__schedule=schedule, training__local_steps=steps, training__learning_rate=1.0
    ).training
    return [training.rate_at(number, step) for number in range(1, rounds + 1) for step in range(steps)]


def of_torch(make: Made, moments: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(moments):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


KINDS: list[tuple[dict[str, Any], Made]] = [
    ({"name": "constant"}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    ({"name": "step", "every": 5, "factor": 0.3}, lambda o: lr_scheduler.StepLR(o, 5, gamma=0.3)),
    ({"name": "exponential", "factor": 0.8}, lambda o: lr_scheduler.ExponentialLR(o, 0.8)),
    ({"name": "cosine"}, lambda o: lr_scheduler.CosineAnnealingLR(o, ROUNDS)),
    ({"name": "cosine", "final": 0.1}, lambda o: lr_scheduler.CosineAnnealingLR(o, ROUNDS, eta_min=0.1)),
    (
        {"name": "constant", "warmup": 3},
        lambda o: lr_scheduler.LinearLR(o, start_factor=1 / 4, end_factor=1.0, total_iters=3),
    ),
    (
        {"name": "cosine", "warmup": 4},
        lambda o: lr_scheduler.SequentialLR(
            o,
            [lr_scheduler.LinearLR(o, 1 / 5, 1.0, total_iters=4), lr_scheduler.CosineAnnealingLR(o, ROUNDS - 4)],
            milestones=[4],
        ),
    ),
]


@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")
@pytest.mark.parametrize("schedule, make", KINDS, ids=lambda value: value.get("name") if type(value) is dict else "")
def test_a_schedule_over_rounds_is_torchs_of_that_name(schedule, make):
    assert factors(schedule) == pytest.approx(of_torch(make, ROUNDS), abs=1e-12)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_schedule_over_rounds_is_the_same_for_all_steps_of_a_round(steps):
    found = factors({"name": "exponential"}, steps=steps)
    assert found == [rate for rate in factors({"name": "exponential"}) for _ in range(steps)]


@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")
def test_a_schedule_over_steps_goes_on_within_a_round():
    found = factors({"name": "cosine", "over": "steps", "warmup": 1}, rounds=5, steps=3)
    by_torch = of_torch(
        lambda o: lr_scheduler.SequentialLR(
            o,
            [lr_scheduler.LinearLR(o, 1 / 4, 1.0, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 12)],
            milestones=[3],
        ),
        15,
    )
    assert found == pytest.approx(by_torch, abs=1e-12)
    halved = factors({"name": "exponential", "factor": 0.5, "over": "steps"}, rounds=2, steps=2)
    assert halved == pytest.approx([1, 0.5**0.5, 0.5, 0.5**1.5])  # by a half a round


def test_a_plateaus_own_factor_is_the_servers_to_tell():
    assert factors({"name": "plateau", "metric": "f1", "warmup": 2}) == pytest.approx([1 / 3, 2 / 3] + [1.0] * 10)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"training__schedule": {"name": "linear"}}, "schedule.* linear"),
    ({"training__schedule": {"name": "step"}}, r"schedule\.every"),
    ({"training__schedule": {"name": "cosine", "factor": 0.5}}, r"schedule\.factor"),
    ({"training__schedule": {"name": "exponential", "factor": 1.0}}, "less than 1"),
    ({"training__schedule": {"name": "constant", "warmup": 3}}, r"must be less than training\.rounds, 3 \(got 3\)"),
    (
        {
            "training__schedule": {"name": "cosine", "over": "steps"},
            "training__local_steps": ...,
            "training__local_epochs": 1,
        },
        "steps needs local_steps: with local_epochs clients take different numbers of steps",
    ),
    ({"training__schedule": {"name": "plateau", "metric": "mae"}}, "must be one of accuracy, precision, recall, f1"),
    (
        {"training__schedule": {"name": "plateau", "metric": "f1"}, "privacy__evaluation": {"every": 0}},
        r"schedule\.metric is never evaluated",
    ),
    ({"strategy__schedule": {"name": "cosine", "over": "steps"}}, "must be rounds here: the server takes one step"),
    (
        {"strategy__name": "qfedavg", "training__schedule": {"name": "cosine", "over": "steps"}},
        "must be rounds with qfedavg",
    ),
    ({"strategy__average": 1.0}, r"strategy\.average must be less than 1"),
]


@pytest.mark.parametrize("changes, said", BAD, ids=[said for _, said in BAD])
def test_what_no_schedule_can_be_is_said(tmp_path, changes, said):
    path = tmp_path / "federation.yaml"
    path.write_text(json.dumps(document(**changes)))
    with pytest.raises(ConfigError, match=said):
        load(path)


def test_a_document_without_them_is_what_it_was():
    assert "schedule" not in federation().canonical and "average" not in federation().canonical
    with_both = federation(training__schedule={"name": "cosine"}, strategy__average=0.9)
    assert '"name":"cosine"' in with_both.canonical and '"average":0.9' in with_both.canonical


def test_a_schedule_can_be_put_into_a_few_words():
    both = {"name": "cosine", "over": "steps", "warmup": 1}
    assert (
        federation(training__schedule=both).training.schedule.words == "cosine at each step, after 1 round of warm-up"
    )
    step = {"name": "step", "every": 2, "warmup": 2}
    assert federation(training__schedule=step).training.schedule.words == "step, after 2 rounds of warm-up"
