"""Agnostic federated learning goes to the model that is best for the worst client."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict

from common.wire import records
from common.wire.records import ARRAYS, LOSS, METRICS, WEIGHT
from server.rounds import strategies
from tests.server.fakes import Answer, Clients, Outcome, outcome
from tests.support import federation

AT = {1: 0.0, 2: 0.0, 3: 1.0}  # where each client's loss is least: two want 0, and one wants 1


def descend(message: Message, to: float) -> Answer:
    """A step of the client whose loss is (w - to)^2 on each number of the model, on average."""
    weights = records.to_weights(message.content.array_records[ARRAYS])
    size = sum(array.size for array in weights.values())
    loss = sum(float(((array - to) ** 2).sum()) for array in weights.values()) / size
    moved = {name: (array + 0.2 * (to - array)).astype(np.float32) for name, array in weights.items()}
    metrics = MetricRecord({WEIGHT: 10.0, LOSS: loss})
    return RecordDict({ARRAYS: records.from_weights(moved), METRICS: metrics})


def run(name: str, rounds: int = 400, **changes: Any) -> Outcome:
    fed = federation(training__rounds=rounds, privacy__evaluation={"every": 0}, strategy__name=name, **changes)
    return outcome(fed, Clients({node: lambda m, to=to: descend(m, to) for node, to in AT.items()}))  # type: ignore[misc]


def settled(result: Outcome) -> float:
    """The number that all numbers of the model have come to, on average of the last rounds."""
    last = [weights for _, weights in result.saved[-200:]]
    return float(np.mean([np.mean([array.mean() for array in weights.values()]) for weights in last]))


def test_the_worst_client_is_as_well_off_as_the_others():
    # The mean of the three is least at 1/3; the largest of them at 1/2, where all three are alike.
    assert settled(run("fedavg")) == pytest.approx(1 / 3, abs=0.02)
    assert settled(run("agnostic", strategy__mixture_rate=0.3)) == pytest.approx(1 / 2, abs=0.05)


def test_without_a_rate_it_is_a_mean_in_which_clients_are_alike():
    one = run("agnostic", rounds=5, strategy__mixture_rate=0.0).run.progress.weights
    other = run("fedavg", rounds=5).run.progress.weights  # whose clients have as many rows
    assert all(np.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_a_clients_weight_grows_with_its_loss():
    result = run("agnostic", rounds=2, strategy__mixture_rate=0.5)
    start = result.start
    size = sum(array.size for array in start.values())
    losses = {n: sum(float(((a - to) ** 2).sum()) for a in start.values()) / size for n, to in AT.items()}
    first = dict(result.saved)[1]
    share = {n: math.exp(0.5 * loss) for n, loss in losses.items()}
    total = sum(share.values())
    for name, array in dict(result.saved)[2].items():
        steps = sum(share[n] / total * (first[name] + 0.2 * (to - first[name])) for n, to in AT.items())
        assert np.allclose(array, steps, atol=1e-6)


def test_the_mixture_outlives_the_server():
    result = run("agnostic", rounds=3, strategy__mixture_rate=0.5)
    memory = result.run.progress.memory
    assert sorted(memory) == ["mixture/1", "mixture/2", "mixture/3"]
    strategy = strategies.build(result.run.federation)
    strategies.restore(strategy, memory)
    assert strategies.memory(strategy) == memory


def test_a_client_that_comes_late_begins_in_the_middle():
    strategy = strategies.build(federation(strategy__name="agnostic"))
    strategies.restore(strategy, {"mixture/1": np.float64(0.0), "mixture/2": np.float64(2.0)})
    replies = []
    for node, value in ((1, 0.0), (3, 1.0)):
        content = RecordDict(
            {ARRAYS: records.from_weights({"w": np.full(1, value, np.float32)}), METRICS: MetricRecord({WEIGHT: 1.0})}
        )
        content.metric_records[METRICS][LOSS] = 0.0
        replies.append(Message(content, dst_node_id=node, message_type="train"))
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert float(arrays["w"].numpy()[0]) == pytest.approx(math.e / (1 + math.e))  # of e^0 and e^1
    assert float(strategies.memory(strategy)["mixture/2"]) == 2.0
