from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

from common.document.federation import Federation
from common.errors import RunFailed
from common.model import mlp
from common.wire import records
from common.wire.records import (
    ARRAYS,
    BUDGET_EXHAUSTED,
    CONFIG,
    COUNTS,
    FAILED,
    LOSS,
    LOST,
    METRICS,
    PRIVACY,
    REFUSED,
    WEIGHT,
)
from server.app import execute
from server.folder.folder import RunFolder, load_model
from server.rounds import strategies
from server.rounds.events import Event
from server.rounds.loop import run_rounds
from server.rounds.run import Progress, Run
from simulations.inline import InlineGrid
from tests.server.fakes import Answer, Clients, interrupted, outcome, says, train, train_to_nan
from tests.support import PRIVATE, federation, stated


def test_each_round_moves_the_model_once_and_saves_it():
    result = outcome(federation(training__rounds=3), Clients())
    assert (result.ending.status, result.run.progress.round) == ("completed", 3)
    assert result.moved() == 3
    assert [server_round for server_round, _ in result.saved] == [1, 2, 3]
    assert result.run.progress.clients == {"1", "2", "3"}


@pytest.mark.parametrize("name", ["fedavg", "fedmedian"])
def test_what_is_frozen_stays_whatever_clients_send(name):
    start = {"sha256": "0" * 64, "frozen": [0]}
    result = outcome(federation(training__rounds=3, strategy__name=name, start=start), Clients())
    for key, array in result.run.progress.weights.items():
        moved = 0 if key.startswith("layers.0") else 3
        assert np.allclose(array, result.start[key] + moved, atol=1e-5)


def test_clients_are_told_the_run_and_the_round():
    told: list[tuple[Any, Any]] = []

    def listen(message: Message) -> Answer:
        config = message.content[CONFIG]
        told.append((config[records.RUN], config["server-round"]))
        return train(message)

    outcome(federation(training__rounds=2), Clients({1: listen}))
    assert told == [("test", 1), ("test", 2)]


def test_a_round_asks_the_fraction_and_the_same_clients_for_the_same_seed():
    def cohorts(seed: int) -> list[list[int]]:
        document = federation(training__rounds=6, training__seed=seed, strategy__fraction=0.4)
        clients = Clients()
        outcome(document, clients, nodes=range(10))
        return [clients.trained(round) for round in range(1, 7)]

    first = cohorts(0)
    assert [len(set(cohort)) for cohort in first] == [4] * 6  # 0.4 of 10
    assert len(set().union(*first)) > 4  # not the same four each round
    assert first == cohorts(0)
    assert first != cohorts(1)


@pytest.mark.parametrize("fraction, nodes, size", [(0.01, 10, 2), (0.5, 3, 2), (0.7, 10, 7), (1.0, 5, 5)])
def test_a_cohort_is_never_smaller_than_the_quorum(fraction, nodes, size):
    clients = Clients()
    outcome(federation(strategy__fraction=fraction), clients, nodes=range(nodes))
    assert len(clients.trained(1)) == size


def test_a_bad_reply_is_left_out_and_told_and_the_others_count():
    result = outcome(federation(training__rounds=2), Clients({(1, 2): train_to_nan}))
    assert result.moved() == 2
    first = result.rounds()[0]
    assert (first["clients"], first["asked"]) == (2, 3)
    (rejected,) = first["rejected"]
    assert (rejected["client"], rejected["kind"]) == ("2", "rejected")
    assert "has NaN or infinite values" in rejected["reason"]


@pytest.mark.parametrize("odd", [train_to_nan, says(FAILED, "it broke"), lambda m: None], ids=["nan", "error", "lost"])
def test_a_failed_round_leaves_the_model_as_it_was_is_told_and_the_run_goes_on(odd):
    result = outcome(federation(training__rounds=3), Clients({(2, 1): odd, (2, 2): odd}))
    assert (result.ending.status, result.run.progress.round) == ("completed", 3)
    assert result.moved() == 2
    assert [server_round for server_round, _ in result.saved] == [1, 3]
    failed = result.rounds()[1]
    assert failed["failed"].startswith("1 of at least 2 replies were admitted (")
    assert len(failed["rejected"]) == 2
    assert "failed" not in result.rounds()[2]


def test_a_round_without_any_reply_fails():
    class Silent(InlineGrid):
        def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
            yield from ()

    result = outcome(federation(), Clients(), grid=Silent(Clients(), [1, 2], run="test"))  # type: ignore[arg-type]
    assert result.rounds()[0]["failed"] == "0 of at least 2 replies were admitted (no reply in time)"
    assert result.moved() == 0


def test_an_aggregate_that_is_not_finite_is_a_failed_round():
    # Each reply is finite. A server learning rate of 1e30 goes to 5e38, above float32's 3.4e38.
    def huge(message: Message) -> Answer:
        answer = train(message)
        shape = {name: np.full_like(v, 5e8) for name, v in records.to_weights(message.content[ARRAYS]).items()}
        answer[ARRAYS] = records.from_weights(shape)
        return answer

    strategy = {"name": "fedavgm", "min_clients": 2, "server_learning_rate": 1e30}
    document = federation(training__rounds=1, strategy=strategy)
    with np.errstate(over="ignore"):
        result = outcome(document, Clients({1: huge, 2: huge, 3: huge}))
    assert result.rounds()[0]["failed"] == "aggregation gave no model, or one with NaN or infinite values"
    assert result.moved() == 0


@pytest.mark.parametrize("name", ["fedavg", "fedmedian"])  # one is summed as replies come, the other keeps them
def test_one_absurd_weight_is_left_out_and_the_round_goes_on(name):
    def heavy(message: Message) -> Answer:
        answer = train(message)
        answer[METRICS][WEIGHT] = 1e11  # type: ignore[index]
        return answer

    result = outcome(federation(training__rounds=1, strategy={"name": name, "min_clients": 2}), Clients({1: heavy}))
    (event,) = result.rounds()
    assert event["clients"] == 2
    (rejected,) = event["rejected"]
    assert "weight 1e+11 is more than 100000 times the median of this round" in rejected["reason"]
    assert result.moved() == 1


def test_too_many_failed_rounds_in_a_row_are_a_failed_run():
    document = federation(training__rounds=9, strategy__max_failed_rounds=2)
    clients = Clients({(r, n): train_to_nan for r in (2, 4, 5) for n in (1, 2, 3)})
    result = outcome(document, clients)
    # Round 2 alone is not enough: round 3 succeeds and the count begins anew.
    assert (result.ending.status, result.run.progress.round) == ("failed", 3)
    assert len(result.rounds()) == 5
    assert result.ending.reason.startswith("2 rounds in a row failed; the last: 0 of at least 2 replies were admitted")


def test_a_run_whose_last_round_failed_is_a_failed_run():
    clients = Clients({(3, n): train_to_nan for n in (1, 2, 3)})
    result = outcome(federation(training__rounds=3), clients)
    assert (result.ending.status, result.run.progress.round) == ("failed", 2)
    assert result.ending.reason.startswith("the last of 3 rounds failed: 0 of at least 2")


def test_without_a_quorum_a_run_fails_once_the_wait_is_over():
    result = outcome(federation(strategy__min_clients=4), Clients())
    assert result.ending.reason == "after 0 s, 3 of the 4 clients that a round needs are there"
    assert result.events == [{"event": "waiting", "clients": 3, "min_clients": 4, "time": 0.0}]


def test_a_round_starts_when_the_last_missing_client_comes():
    class Growing(InlineGrid):
        def get_node_ids(self) -> list[int]:
            return super().get_node_ids()[: 1 + len(events)]

    events: list[Event] = []
    document = federation(training__rounds=1, strategy__min_clients=3)
    grid = Growing(Clients(), [1, 2, 3], run="test")  # type: ignore[arg-type]
    state = mlp.weights_of(mlp.build(document))
    run = Run(federation=document, name="test", progress=Progress(weights=state), observe=events.append)
    assert run_rounds(run, grid, strategies.build(document), wait_s=None).status == "completed"
    told = [e.to_json() for e in events]
    assert [(e["event"], e["clients"]) for e in told] == [("waiting", 1), ("waiting", 2), ("round", 3)]


def test_who_refuses_is_not_asked_again_and_who_was_lost_is():
    clients = Clients({(1, 1): says(REFUSED, "policy"), (1, 2): says(LOST), (1, 3): says(FAILED)})
    result = outcome(federation(training__rounds=3), clients, nodes=range(1, 6))
    assert clients.trained(2) == clients.trained(3) == [2, 3, 4, 5]
    assert 1 not in {node for kind, _, node in clients.asked if kind == "evaluate"}
    kinds = {r["client"]: (r["kind"], r["reason"]) for r in result.rounds()[0]["rejected"]}
    assert kinds == {"1": ("refused", "policy"), "2": ("lost", "no"), "3": ("rejected", "no")}


def test_when_too_many_refuse_the_run_fails_and_says_so():
    result = outcome(federation(), Clients({1: says(REFUSED), 2: says(REFUSED)}))
    assert result.ending.status == "failed"
    assert result.ending.reason == "after 0 s, 1 of the 2 clients that a round needs are there; 1: refused, 2: refused"


@pytest.mark.parametrize("spent_in, max_failed", [(2, 3), (2, 1), (3, 3)], ids=["midway", "strict", "last round"])
def test_when_budgets_are_spent_the_run_ends_well_with_the_model_so_far(spent_in, max_failed):
    broke = {(r, n): says(BUDGET_EXHAUSTED, "spent") for r in range(spent_in, 4) for n in (1, 2)}
    document = federation(training__rounds=3, strategy__max_failed_rounds=max_failed)
    result = outcome(document, Clients(broke))
    assert (result.ending.status, result.run.progress.round) == ("budget_exhausted", spent_in - 1)
    assert (
        result.ending.reason == "the clients that are left are fewer than min_clients, because budgets are spent: 1, 2"
    )
    assert result.moved() == spent_in - 1
    assert {r["kind"] for r in result.rounds()[-1]["rejected"]} == {"budget_exhausted"}


def test_who_has_nothing_left_for_evaluations_goes_on_training():
    clients = Clients(evaluates=says(BUDGET_EXHAUSTED))
    result = outcome(federation(training__rounds=3), clients)
    assert (result.ending.status, result.run.progress.round, result.run.progress.evaluation) == ("completed", 3, None)
    assert [{r["kind"] for r in event["rejected"]} for event in result.rounds()] == [{"budget_exhausted"}] * 3


def test_evaluation_happens_on_its_rounds_only_and_sums_the_clients_counts():
    clients = Clients()
    result = outcome(federation(training__rounds=5, privacy__evaluation={"every": 2}), clients)
    # Every second round, and the last. Of 10 rows 3 + 4 are right, for each client and so for all.
    assert [e["round"] for e in result.rounds() if "evaluation" in e] == [2, 4, 5]
    assert sorted({r for kind, r, _ in clients.asked if kind == "evaluate"}) == [2, 4, 5]
    assert result.run.progress.evaluation["accuracy"] == pytest.approx(0.7)


def test_an_evaluation_that_nobody_answers_is_not_told_as_if_it_were_new():
    clients = Clients()
    clients.evaluates = lambda message: (
        Error(code=FAILED)
        if message.metadata.group_id == "2"
        else RecordDict({METRICS: MetricRecord({WEIGHT: 1.0, COUNTS: [3.0, 1.0, 2.0, 4.0]})})
    )
    result = outcome(federation(training__rounds=2), clients)
    assert ["evaluation" in event for event in result.rounds()] == [True, False]
    assert len(result.rounds()[1]["rejected"]) == 3
    assert result.run.progress.evaluation["accuracy"] == pytest.approx(0.7)  # the last there was


def test_an_evaluation_without_a_row_has_no_metrics_and_says_nothing_about_the_model():
    nothing = RecordDict({METRICS: MetricRecord({WEIGHT: 1.0, COUNTS: [0.0] * 4})})
    rule = {"metric": "accuracy", "patience": 1}
    result = outcome(
        federation(training__rounds=3, training__early_stopping=rule), Clients(evaluates=lambda message: nothing)
    )
    assert [event["evaluation"] for event in result.rounds()] == [{}, {}, {}]
    assert (result.ending.status, result.run.progress.round, result.run.progress.evaluation) == ("completed", 3, {})


def test_the_last_metrics_stay_when_no_row_is_left_to_count():
    clients = Clients()
    counts = {"1": [3.0, 1.0, 2.0, 4.0], "2": [0.0] * 4}
    clients.evaluates = lambda message: RecordDict(
        {METRICS: MetricRecord({WEIGHT: 1.0, COUNTS: counts[message.metadata.group_id]})}
    )
    result = outcome(federation(training__rounds=2), clients)
    assert result.rounds()[1]["evaluation"] == {}
    assert result.run.progress.evaluation["accuracy"] == pytest.approx(0.7)


def test_a_private_run_admits_no_loss():
    document = federation(**PRIVATE, training__rounds=1, privacy__evaluation__every=0)
    assert "metrics must be num-examples; got num-examples, train_loss" in outcome(document, Clients()).ending.reason

    def quiet(message: Message) -> RecordDict:
        answer = train(message, metrics={WEIGHT: 10.0})
        answer[PRIVACY] = ConfigRecord(dict(stated(epsilon=1.0)))
        return answer

    result = outcome(document, Clients(dict.fromkeys((1, 2, 3), quiet)))
    assert result.ending.status == "completed"
    assert result.rounds()[0]["train"] == {"loss": None}


def test_the_loss_is_the_mean_over_rows():
    weighted = {
        1: lambda message: train(message, metrics={WEIGHT: 30.0, LOSS: 1.0}),
        2: lambda message: train(message, metrics={WEIGHT: 10.0, LOSS: 0.2}),
    }
    result = outcome(federation(training__rounds=1), Clients(weighted), nodes=[1, 2])
    assert result.rounds()[0]["train"]["loss"] == pytest.approx((30 * 1.0 + 10 * 0.2) / 40)


def execute_in(folder: RunFolder, document: Federation, clients: Clients) -> dict[str, Any]:
    return execute(
        document,
        InlineGrid(clients, [1, 2, 3], run="test"),  # type: ignore[arg-type]
        folder,
        name="test",
        wait_s=0.0,
    )


def test_ctrl_c_during_a_round_stops_the_run_with_the_last_complete_rounds_model(tmp_path):
    document = federation(training__rounds=5)
    folder = RunFolder.create(document, path=tmp_path / "run")
    result = execute_in(folder, document, Clients({(3, 2): interrupted}))
    assert (result["status"], result["reason"], result["rounds"]) == ("stopped", "interrupted", 2)
    start = mlp.weights_of(mlp.build(document))
    for name, array in load_model(folder.path).items():
        assert np.allclose(array - start[name], 2, atol=1e-5)


def test_a_failed_run_says_so_in_its_result_and_keeps_the_last_good_model(tmp_path):
    document = federation(training__rounds=5, strategy__max_failed_rounds=1)
    folder = RunFolder.create(document, path=tmp_path / "run")
    with pytest.raises(RunFailed, match="1 rounds in a row failed"):
        execute_in(folder, document, Clients({(2, n): train_to_nan for n in (1, 2, 3)}))
    result = json.loads((folder.path / "result.json").read_text())
    assert (result["status"], result["rounds"]) == ("failed", 1)
    assert result["reason"].startswith("1 rounds in a row failed; the last: 0 of at least 2")
    last = json.loads((folder.path / "events.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["status"]) == ("end", "failed")
    assert all(np.isfinite(array).all() for array in load_model(folder.path).values())


def test_a_run_that_never_completes_a_round_leaves_the_model_it_started_with(tmp_path):
    document = federation(training__rounds=5)
    folder = RunFolder.create(document, path=tmp_path / "run")
    assert execute_in(folder, document, Clients({1: interrupted}))["rounds"] == 0
    for name, array in mlp.weights_of(mlp.build(document)).items():
        assert np.array_equal(load_model(folder.path)[name], array)
