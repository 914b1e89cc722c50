from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from torch.optim.lr_scheduler import ReduceLROnPlateau

from client.app import pace_of
from client.training.recipe import Pace
from common.document.schedule import Plateau
from common.errors import Refusal
from common.wire.identity import node_id
from common.wire.records import CONFIG, COUNTS, METRICS, RATE, ROUND, WEIGHT
from server.rounds.plateau import Patience, after
from tests.server.fakes import Answer, Clients, outcome, train
from tests.support import federation


@pytest.mark.parametrize("metric, mode", [("accuracy", "max"), ("mse", "min")])
@pytest.mark.parametrize("patience, factor, least", [(1, 0.5, 0.01), (3, 0.3, 0.2)])
def test_the_rate_falls_when_torchs_would(metric, mode, patience, factor, least):
    schedule = Plateau(name="plateau", metric=metric, patience=patience, factor=factor, least=least)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    # Torch's patience is how many it bears, and ours how many it takes.
    theirs = ReduceLROnPlateau(optimizer, mode, factor, patience - 1, threshold=0.0, min_lr=least)  # type: ignore[arg-type]
    watch, found, expected = Patience(), [], []
    for value in np.random.default_rng(4).integers(0, 6, 40) / 6:
        watch = after(watch, schedule, float(value))
        theirs.step(float(value))
        found.append(watch.factor)
        expected.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx(expected)
    assert found[-1] < 1


def test_what_is_better_by_less_than_the_least_change_is_not_better():
    schedule = Plateau(name="plateau", metric="accuracy", patience=2, min_change=0.1)
    watch = after(after(Patience(), schedule, 0.5), schedule, 0.59)
    assert watch == Patience(best=0.5, stale=1)
    assert after(watch, schedule, 0.625) == Patience(best=0.625)
    assert after(watch, schedule, 0.59) == Patience(best=0.5, factor=0.5)


PLATEAU = {"name": "plateau", "metric": "accuracy", "patience": 1}


def rising(figures: list[list[float]]) -> Any:
    """Evaluations with these counts, one after another."""
    left = iter(figures)
    last: dict[str, list[float]] = {}

    def evaluates(message: Message) -> Answer:
        if message.metadata.group_id not in last:
            last[message.metadata.group_id] = next(left)
        return RecordDict({METRICS: MetricRecord({WEIGHT: 1.0, COUNTS: last[message.metadata.group_id]})})

    return evaluates


def test_clients_are_told_to_what_the_rate_has_fallen():
    told: list[Any] = []

    def listen(message: Message) -> Answer:
        told.append(message.content.config_records[CONFIG].get(RATE))
        return train(message)

    good, better = [4.0, 1.0, 1.0, 4.0], [5.0, 0.0, 0.0, 5.0]
    fed = federation(training__rounds=5, training__schedule=PLATEAU)
    outcome(fed, Clients({1: listen}, evaluates=rising([good, good, better, good, good])))
    assert told == [None, None, 0.5, 0.5, 0.25]


def test_the_servers_step_falls_as_well():
    worse = [[4.0, 1.0, 1.0, 4.0]] * 4
    result = outcome(
        federation(training__rounds=4, strategy__schedule=PLATEAU), Clients(evaluates=rising(worse))
    )  # whose clients go a step of 1
    assert result.moved() == pytest.approx(1 + 1 + 0.5 + 0.25)


@pytest.mark.parametrize("name", ["fedavg", "fedmedian", "fedprox"])
def test_a_schedule_of_the_server_takes_a_part_of_each_step(name):
    cosine = {"name": "cosine", "warmup": 1}
    result = outcome(federation(training__rounds=3, strategy__name=name, strategy__schedule=cosine), Clients())
    assert result.moved() == pytest.approx(0.5 + 1 + 0.5, abs=1e-3)


def test_an_adaptive_step_is_that_of_a_smaller_eta():
    once = {"training__rounds": 1, "strategy__name": "fedadam"}
    whole = outcome(federation(**once, strategy__eta=0.02), Clients()).moved()
    warm = {"name": "constant", "warmup": 1}
    begun = outcome(
        federation(**once | {"training__rounds": 2}, strategy__eta=0.04, strategy__schedule=warm), Clients()
    )
    (first, _) = (dict(begun.saved)[n] for n in (1, 2))
    step = float(first["layers.0.bias"][0] - begun.start["layers.0.bias"][0])
    assert step == pytest.approx(whole, abs=1e-3)


@pytest.mark.parametrize("forgetting", [0.5, 0.9])
def test_what_is_kept_and_scored_is_the_rounds_average_and_training_goes_on_from_the_last(forgetting):
    scored: list[float] = []

    def evaluates(message: Message) -> Answer:
        arrays = message.content.array_records["arrays"]
        scored.append(float(arrays["layers.0.bias"].numpy()[0]))
        return RecordDict({METRICS: MetricRecord({WEIGHT: 1.0, COUNTS: [1.0, 0.0, 0.0, 1.0]})})

    fed = federation(training__rounds=4, strategy__average=forgetting)
    result = outcome(fed, Clients(evaluates=evaluates), nodes=[1, 2])
    assert result.moved() == 4  # the last round's weights
    start = float(result.start["layers.0.bias"][0])
    averages = [
        sum(forgetting ** (n - i) * i for i in range(1, n + 1)) / sum(forgetting ** (n - i) for i in range(1, n + 1))
        for n in range(1, 5)
    ]
    assert scored[::2] == pytest.approx([start + moved for moved in averages], abs=1e-5)
    kept = result.run.progress.model["layers.0.bias"][0]
    assert float(kept) == pytest.approx(start + averages[-1], abs=1e-5)


def test_a_model_that_is_no_average_is_not_sent_to_be_kept():
    told: list[Any] = []

    def listen(message: Message) -> Answer:
        told.append(message.content.config_records[CONFIG].get("complete-rounds"))
        return train(message)

    outcome(federation(training__rounds=2, strategy__average=0.5), Clients({1: listen}))
    outcome(federation(training__rounds=2), Clients({1: listen}))
    assert told == [None, None, 0, 1]


def test_qfedavg_divides_updates_by_the_rate_that_made_them():
    # Clients that move in proportion to their rate look alike to it, whatever the rate.
    def goes(message: Message) -> Answer:
        step = {1: 1.0, 2: 0.5}[int(message.metadata.group_id)]
        answer = train(message)
        assert isinstance(answer, RecordDict)
        for name, array in message.content.array_records["arrays"].items():
            answer.array_records["arrays"][name] = type(array)((array.numpy() + np.float32(step)).astype(np.float32))
        return answer

    halved = {"name": "exponential", "factor": 0.5}
    fed = federation(training__rounds=2, strategy__name="qfedavg", training__schedule=halved, strategy__q=0.1)
    result = outcome(fed, Clients({1: goes, 2: goes, 3: goes}))
    first, second = (dict(result.saved)[n]["layers.0.bias"][0] for n in (1, 2))
    start = float(result.start["layers.0.bias"][0])
    # Li et al. 2020 (arXiv:1905.10497), algorithm 2, where clients are equal: F^q L u / (q F^(q-1) |L u|^2 + L F^q).
    size = sum(array.size for array in result.start.values())
    for moved, rate, went in ((float(first) - start, 0.1, 1.0), (float(second - first), 0.05, 0.5)):
        loss, lipschitz, q = 0.5, 1 / rate, 0.1
        norm = (lipschitz * went) ** 2 * size
        expected = loss**q * lipschitz * went / (q * loss ** (q - 1) * norm + lipschitz * loss**q)
        assert moved == pytest.approx(expected, rel=1e-3)


def message_with(**config: Any) -> Message:
    content = RecordDict({CONFIG: ConfigRecord(config)})
    return Message(content, dst_node_id=node_id("a"), message_type="train")


SCHEDULED = federation(training__rounds=5, training__schedule={"name": "cosine"})
PATIENT = federation(training__rounds=5, training__schedule=PLATEAU)


def test_a_client_takes_a_rounds_pace_from_its_message():
    assert pace_of(message_with(**{ROUND: 3}), SCHEDULED) == Pace(round=3)
    assert pace_of(message_with(**{ROUND: 5, RATE: 0.25}), PATIENT) == Pace(round=5, factor=0.25)
    assert pace_of(message_with(**{ROUND: 99, RATE: 7.0}), federation()) == Pace()  # whose rate is one


@pytest.mark.parametrize(
    "fed, config",
    [
        (SCHEDULED, {}),
        (SCHEDULED, {ROUND: 0}),
        (SCHEDULED, {ROUND: 6}),
        (SCHEDULED, {ROUND: "1"}),
        (SCHEDULED, {ROUND: 1, RATE: 0.5}),
        (PATIENT, {ROUND: 1, RATE: 0.0}),
        (PATIENT, {ROUND: 1, RATE: -0.5}),
        (PATIENT, {ROUND: 1, RATE: 1.5}),
        (PATIENT, {ROUND: 1, RATE: float("nan")}),
        (PATIENT, {ROUND: 1, RATE: "0.5"}),
    ],
)
def test_a_pace_outside_the_documents_schedule_is_refused(fed, config):
    with pytest.raises(Refusal, match="the learning rate's schedule has no"):
        pace_of(message_with(**config), fed)
