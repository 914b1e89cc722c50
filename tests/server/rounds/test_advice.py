from __future__ import annotations

import math

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict

from common.wire import records
from common.wire.compression import pack
from common.wire.records import ARRAYS, FAILED, LOSS, METRICS, WEIGHT
from server.rounds.advice import on_divergence
from tests.server.fakes import Answer, Clients, outcome, says, train, train_to_nan
from tests.support import PRIVATE, WHOLE, federation


def huge(message: Message) -> Answer:
    """A model whose entries are finite, beyond all bounds, and another size at each client."""
    answer = train(message)
    far = 2e9 * (1 + message.metadata.dst_node_id)
    state = records.to_weights(message.content[ARRAYS])
    answer[ARRAYS] = records.from_weights({name: np.full_like(array, far) for name, array in state.items()})
    return answer


@pytest.mark.parametrize(
    "changes, cause",
    [
        ({}, "without privacy.row no clip bounds a step"),
        ({"training__optimizer": "adam"}, "each step moves every weight by about 40"),
        (PRIVATE | {"privacy__row__clip": 0.5}, "a step is learning_rate x privacy.row.clip, 20, and noise"),
    ],
    ids=["plain", "adam", "private"],
)
def test_advice_on_divergence_names_the_rate_its_cause_and_a_tenth(changes, cause):
    text = on_divergence(federation(**{**changes, "training__learning_rate": 40.0}))
    assert "training.learning_rate 40 is likely too large" in text
    assert cause in text
    assert text.endswith("try a tenth, 4")


def test_forty_clients_that_diverge_are_told_of_once_a_run_and_in_its_failure():
    result = outcome(federation(), Clients({n: train_to_nan for n in range(40)}), nodes=range(40))
    said = on_divergence(federation())
    assert [event.get("advice") for event in result.rounds()] == [said, None, None]
    assert result.ending.reason.count("training diverged") == 1
    assert result.ending.reason.endswith(said)


def test_a_run_that_recovers_fails_of_something_else_without_the_advice():
    clients = Clients({(1, 1): train_to_nan} | {(r, n): says(FAILED) for r in (2, 3, 4) for n in (1, 2, 3)})
    result = outcome(federation(training__rounds=9), clients)
    assert "advice" in result.rounds()[0]
    assert result.ending.reason.startswith("3 rounds in a row failed")
    assert "diverged" not in result.ending.reason


def test_under_client_privacy_no_advice_tells_who_was_asked():
    result = outcome(federation(**WHOLE), Clients({2: train_to_nan}))
    assert result.run.progress.round == 3
    assert all("advice" not in event for event in result.rounds())


def test_a_failed_round_tells_the_first_few_reasons():
    result = outcome(federation(training__rounds=1), Clients({n: huge for n in range(40)}), nodes=range(40))
    assert result.rounds()[0]["failed"].count("has an entry of size") == 3
    assert "and 37 more reasons" in result.rounds()[0]["failed"]
    assert "training diverged" in result.rounds()[0]["advice"]


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e31])
def test_a_loss_beyond_all_bounds_is_divergence_too(loss):
    def diverged(message: Message) -> Answer:
        return train(message, metrics={WEIGHT: 1.0, LOSS: loss})

    assert "training diverged" in outcome(federation(), Clients({1: diverged})).rounds()[0]["advice"]


def test_other_faults_of_a_reply_are_not_divergence():
    def light(message: Message) -> Answer:
        return train(message, metrics={WEIGHT: math.nan, LOSS: 0.5})

    (event, *_) = outcome(federation(), Clients({1: light, 2: says(FAILED)})).rounds()
    assert len(event["rejected"]) == 2
    assert "advice" not in event


def test_a_packed_update_that_is_not_finite_is_divergence():
    def packed(message: Message) -> Answer:
        state = records.to_weights(message.content[ARRAYS])
        far = {name: np.full_like(array, np.inf) for name, array in state.items()}
        arrays = records.from_weights(pack(far, state, "int8", lambda n: np.ones(n)))
        return RecordDict({ARRAYS: arrays, METRICS: MetricRecord({WEIGHT: 1.0, LOSS: 0.5})})

    result = outcome(federation(wire__dtype="int8"), Clients(dict.fromkeys((1, 2, 3), packed)))
    assert "got inf" in result.rounds()[0]["rejected"][0]["reason"]
    assert "advice" in result.rounds()[0]
