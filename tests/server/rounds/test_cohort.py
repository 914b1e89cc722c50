"""Over-selection, clients that are asked in vain, and early stopping."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict

from common.document import documents
from common.document.federation import Federation
from common.errors import ConfigError
from common.model.scores import scores_of
from common.wire import compression, records
from common.wire.records import ARRAYS, COUNTS, FAILED, LOSS, LOST, METRICS, WEIGHT
from server.rounds import cohort
from server.rounds.run import Progress, Run
from simulations.inline import InlineGrid
from tests.server.fakes import Answer, Clients, outcome, says, train
from tests.support import WHOLE, document, federation


def fed(**changes: Any) -> Federation:
    return federation(**{"privacy__evaluation": {"every": 0}, **changes})


# Over-selection


class InOrder(InlineGrid):
    """Answers in an order of its own; counts who was answered."""

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        yield from super().stream(sorted(messages, key=lambda m: -m.metadata.dst_node_id), timeout=timeout)


def test_a_round_goes_on_with_the_first_replies_when_it_asked_more_clients_than_it_needs():
    clients = Clients()
    document = fed(strategy__fraction=0.5, strategy__over_selection=0.5, training__rounds=1)
    result = outcome(document, clients, nodes=range(1, 9), grid=InOrder(clients, range(1, 9), run="t"))  # type: ignore[arg-type]
    (event,) = result.rounds()
    assert (event["asked"], event["clients"]) == (6, 4)
    assert event["rejected"] == []  # who was slower is not called late
    asked = clients.trained(1)
    assert len(asked) == 4 and result.run.progress.strikes == {}


def test_over_selection_asks_no_more_than_there_are():
    result = outcome(fed(strategy__over_selection=3.0, training__rounds=1), Clients())
    (event,) = result.rounds()
    assert (event["asked"], event["clients"]) == (3, 3)


def test_over_selection_would_break_what_privacy_for_clients_rests_on():
    with pytest.raises(documents.Mistakes, match=r"strategy\.over_selection must be 0 with privacy\.client"):
        documents.validate(document(**{**WHOLE, "strategy__over_selection": 0.5}), Federation)


# Who is asked in vain


class Mute(InlineGrid):
    """Node 3 never answers."""

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        yield from super().stream([m for m in messages if m.metadata.dst_node_id != 3], timeout=timeout)


def asked_in(result: Any, node: str) -> list[int]:
    """The rounds in which a client was late."""
    return [e["round"] for e in result.rounds() for r in e["rejected"] if (r["client"], r["kind"]) == (node, "late")]


def test_a_client_that_never_answers_is_asked_less_and_less_often():
    clients = Clients()
    result = outcome(fed(training__rounds=40), clients, grid=Mute(clients, (1, 2, 3), run="t"))  # type: ignore[arg-type]
    assert asked_in(result, "3") == [1, 2, 3, 6, 11, 20, 37]  # then after 2, 4, 8, 16 rounds of rest
    assert result.ending.status == "completed"
    assert result.moved() == 40
    late = result.rounds()[0]["rejected"][0]
    assert late == {"client": "3", "kind": "late", "reason": "no reply within 30 s"}


def test_a_client_that_answers_again_is_asked_each_round_again():
    odd = {(r, 3): says(FAILED, "broken") for r in (1, 2, 3, 6)}
    clients = Clients(odd)  # type: ignore[arg-type]
    outcome(fed(training__rounds=14), clients)
    assert [r for r in range(1, 15) if 3 in clients.trained(r)] == [1, 2, 3, 6, 11, 12, 13, 14]


def test_one_that_left_was_not_asked_in_vain():
    clients = Clients({3: says(LOST, "left")})
    result = outcome(fed(training__rounds=6), clients)
    assert all(3 in clients.trained(r) for r in range(1, 7))
    assert result.run.progress.strikes == {}


def test_who_rests_is_asked_if_the_quorum_needs_it():
    clients = Clients({(r, 3): says(FAILED, "broken") for r in range(1, 5)})
    result = outcome(fed(training__rounds=9, strategy__min_clients=3, strategy__max_failed_rounds=9), clients)
    assert all(3 in clients.trained(r) for r in range(1, 10))
    assert result.run.progress.round == 9


def test_with_privacy_for_clients_nobody_rests():
    # Whom a round asks must not depend on who was asked before.
    clients = Clients({3: says(FAILED, "broken")})
    result = outcome(federation(**WHOLE, training__rounds=8), clients)
    assert result.run.progress.strikes == {} and result.run.progress.resting == {}


def test_a_resumed_run_waits_for_those_it_had_but_not_for_ever(monkeypatch):
    run = Run(federation=fed(), name="t", progress=Progress(weights={}, present={"1", "2", "9"}), observe=print)
    monkeypatch.setattr(cohort, "LONGEST_GRACE_S", 0.3)
    started = time.monotonic()
    cohort.wait_for_those_who_were_here(run, InlineGrid(Clients(), (1, 2), run="t"))  # type: ignore[arg-type]
    assert 0.3 <= time.monotonic() - started < 5
    monkeypatch.setattr(cohort, "LONGEST_GRACE_S", 60)
    cohort.wait_for_those_who_were_here(run, InlineGrid(Clients(), (1, 2, 9), run="t"))  # type: ignore[arg-type]
    assert time.monotonic() - started < 5


# Early stopping


def stopping(**rule: Any) -> Federation:
    return federation(
        training__rounds=20,
        training__early_stopping={"metric": "accuracy", "patience": 3, **rule},
        privacy__evaluation={"every": 1},
    )


def scripted(accuracies: list[float]) -> Clients:
    """Clients whose accuracy in each round is as given, and stays at the last."""

    def evaluates(message: Message) -> Answer:
        at = accuracies[min(int(message.metadata.group_id), len(accuracies)) - 1]
        return RecordDict({METRICS: MetricRecord({WEIGHT: 1.0, COUNTS: [1000 * at, 1000 * (1 - at), 0.0, 0.0]})})

    return Clients(evaluates=evaluates)


@pytest.mark.parametrize(
    "accuracies, min_change, ends",
    [
        ([0.5, 0.6, 0.7], 0.0, 6),  # three evaluations after the best
        ([0.5, 0.5, 0.6, 0.55, 0.58, 0.61], 0.0, 9),  # better after two that were not
        ([0.5, 0.503, 0.506, 0.509], 0.01, 4),  # each better than the last, none by enough
        ([0.5, 0.504, 0.508, 0.512], 0.0, 7),
        ([0.5, 0.505, 0.51], 0.01, 6),  # by enough in the end, and the best is the mark, not the last
        ([0.9, 0.1], 0.0, 4),
    ],
)
def test_a_run_ends_when_its_metric_is_no_better_for_long_enough(accuracies, min_change, ends):
    result = outcome(stopping(min_change=min_change), scripted(accuracies))
    assert (result.ending.status, result.run.progress.round) == ("completed", ends)
    assert (
        f"early stopping after round {ends}: in 3 evaluations in a row accuracy was not better" in result.ending.reason
    )


def test_a_run_whose_metric_gets_better_and_better_has_all_its_rounds():
    result = outcome(stopping(), scripted([i / 100 for i in range(50, 90)]))
    assert (result.ending.status, result.run.progress.round, result.ending.reason) == ("completed", 20, "")


def test_of_an_error_less_is_better():
    target = {"name": "y", "bounds": [0, 10]}
    rule = {"metric": "mae", "patience": 2}
    chosen = federation(schema__target=target, training__loss="mse", training__rounds=9, training__early_stopping=rule)

    def evaluates(message: Message) -> Answer:
        error = [5.0, 4.0, 3.0, 3.0][min(int(message.metadata.group_id), 4) - 1]
        return RecordDict({METRICS: MetricRecord({WEIGHT: 1.0, COUNTS: [10.0, error, error]})})

    result = outcome(chosen, Clients(evaluates=evaluates))
    assert (result.ending.status, result.run.progress.round) == ("completed", 5)
    assert scores_of(np.array([10.0, 3.0, 3.0]), chosen.data_schema)["mae"] == result.run.progress.best


@pytest.mark.parametrize(
    "changes, problem",
    [
        (
            {"training__early_stopping": {"metric": "mae"}},
            "must be one of accuracy, precision, recall, f1 for this target",
        ),
        ({"privacy__evaluation": {"every": 0}}, "is never evaluated; set privacy.evaluation.every"),
        ({"training__early_stopping": {"metric": "luck"}}, "luck"),
    ],
)
def test_a_rule_that_can_never_work_is_a_mistake(changes, problem):
    base = {"training__early_stopping": {"metric": "accuracy"}}
    with pytest.raises(documents.Mistakes, match=problem):
        documents.validate(document(**base | changes), Federation)


# Packed updates


def packed(dtype: str, *, spoil: bool = False) -> Any:
    def answer(message: Message) -> Answer:
        start = records.to_weights(message.content.array_records[ARRAYS])
        moved = {name: array + np.float32(1) for name, array in start.items()}
        arrays = compression.pack(moved, start, dtype, np.random.default_rng(0).random)  # type: ignore[arg-type]
        if spoil:
            last = list(arrays)[-1]
            arrays[last] = np.full_like(arrays[last], np.inf if arrays[last].dtype == np.float32 else 0x7F80)
        return RecordDict({ARRAYS: records.from_weights(arrays), METRICS: MetricRecord({WEIGHT: 10.0, LOSS: 0.5})})

    return answer


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("strategy", ["fedavg", "fedmedian"])
def test_packed_updates_move_the_model_as_bare_ones_do(dtype, strategy):
    chosen = fed(wire={"dtype": dtype}, strategy__name=strategy)
    result = outcome(chosen, Clients({n: packed(dtype) for n in (1, 2, 3)}))
    assert result.ending.status == "completed"
    assert result.moved() == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_packed_update_that_is_infinite_is_rejected(dtype):
    result = outcome(
        fed(wire={"dtype": dtype}), Clients({1: packed(dtype, spoil=True), 2: packed(dtype), 3: packed(dtype)})
    )
    assert [e["clients"] for e in result.rounds()] == [2, 2, 2]
    assert {r["client"] for e in result.rounds() for r in e["rejected"]} == {"1"}


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_an_update_in_other_numbers_than_the_documents_is_rejected(dtype):
    other = {"bfloat16": "int8", "int8": "bfloat16"}[dtype]
    result = outcome(fed(wire={"dtype": dtype}), Clients({1: packed(other), 2: packed(dtype), 3: train}))
    assert result.ending.status == "failed"
    assert "1 of at least 2 replies were admitted" in result.ending.reason


def test_whole_clients_are_protected_with_packed_updates_as_well():
    result = outcome(federation(**WHOLE, wire={"dtype": "int8"}), Clients({n: packed("int8") for n in (1, 2, 3)}))
    assert result.ending.status == "completed"
    assert result.rounds()[0]["rejected"] == []


def test_a_federation_for_more_rounds_is_otherwise_the_same():
    assert fed(training__rounds=9) == fed().with_rounds(9)
    with pytest.raises(ConfigError, match=r"training\.rounds"):
        fed().with_rounds(0)
