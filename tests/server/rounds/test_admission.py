from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from hypothesis import given
from hypothesis import strategies as st

from client.account.ledger import Ledger
from common.model.update import Updates
from common.wire import records
from common.wire.identity import identify_process
from common.wire.records import (
    ARRAYS,
    BUDGET_EXHAUSTED,
    COUNTS,
    FAILED,
    GRAMS,
    JOULES,
    LOSS,
    METRICS,
    PRIVACY,
    REFUSED,
    WEIGHT,
)
from server.rounds.admission import Admission, faults_of, reach_of
from simulations.inline import InlineGrid
from tests.client.account.test_budget import opened
from tests.support import stated

STATE = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)}
ROUND = 4
identify_process("admission")


def request(node: int, *, round: int = ROUND) -> Message:
    return Message(RecordDict(), dst_node_id=node, message_type="train", group_id=str(round))


def update(value: float = 1.0, **changes: Any) -> dict[str, Any]:
    """Arrays like STATE, full of `value`; `changes` replaces some, `...` leaves one out."""
    arrays: dict[str, Any] = {name: np.full_like(array, value) for name, array in STATE.items()} | changes
    return {name: array for name, array in arrays.items() if array is not ...}


def content(
    arrays: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    statement: dict[str, Any] | None = None,
) -> RecordDict:
    """What a client answers; a good answer by default."""
    result = RecordDict(
        {
            ARRAYS: records.from_weights(update() if arrays is None else arrays),
            METRICS: MetricRecord({WEIGHT: 10.0, LOSS: 0.5} if metrics is None else metrics),
        }
    )
    if statement is not None:
        result[PRIVACY] = ConfigRecord(statement)
    return result


def reply(node: int = 1, answer: RecordDict | Error | None = None, *, round: int = ROUND) -> Message:
    return Message(content() if answer is None else answer, reply_to=request(node, round=round))


class Sorted(Admission):
    """An admission that keeps what it admitted."""

    def __init__(self, replies: Iterable[Message], **rules: Any) -> None:
        super().__init__(**rules)
        self.admitted = [reply for reply in replies if self.take(reply)]


def with_energy(joules: Any, grams: Any) -> RecordDict:
    return content(metrics={WEIGHT: 10.0, LOSS: 0.5, JOULES: joules, GRAMS: grams})


@pytest.mark.parametrize(
    "joules, grams, reason",
    [
        (-1.0, 0.5, "metric joules must be at least 0, got -1"),
        (2.0, -0.5, "metric grams must be at least 0, got -0.5"),
        (math.nan, 0.5, "metric joules is NaN or infinite"),
        (2.0, math.inf, "metric grams is NaN or infinite"),
        (1e31, 0.5, "metric joules is larger than 1e\\+30"),
        ([2.0], 0.5, "metric joules has the wrong size"),
    ],
)
def test_energy_is_finite_and_not_negative(joules, grams, reason):
    expected = {WEIGHT, LOSS, JOULES, GRAMS}
    told = [reply(1, with_energy(joules, grams)), reply(2, with_energy(0.0, 0))]
    found = Sorted(told, asked={1, 2}, server_round=ROUND, metrics=expected, sent=STATE)
    assert [message.metadata.src_node_id for message in found.admitted] == [2]
    assert re.search(reason, found.rejected[0].reason)
    assert not found.rejected[0].diverged


def test_energy_that_is_not_asked_for_is_not_admitted_nor_a_reply_without_what_is():
    found = admit_training([reply(1, with_energy(2.0, 0.5))])
    assert "metrics must be num-examples, train_loss; got grams, joules" in found.rejected[0].reason
    expected = {WEIGHT, LOSS, JOULES, GRAMS}
    found = Sorted([reply(1)], asked={1}, server_round=ROUND, metrics=expected, sent=STATE)
    assert "metrics must be grams, joules, num-examples, train_loss" in found.rejected[0].reason


def admit_training(replies: Iterable[Message], *, asked: Iterable[int] = (1, 2, 3)) -> Sorted:
    return Sorted(replies, asked=set(asked), server_round=ROUND, metrics={WEIGHT, LOSS}, sent=STATE)


def admit_evaluation(metrics: dict[str, Any]) -> Sorted:
    answer = RecordDict({METRICS: MetricRecord(metrics)})
    return Sorted([reply(1, answer)], asked={1}, server_round=ROUND, metrics={WEIGHT, COUNTS}, counts=4)


def only_rejection(admission: Sorted) -> tuple[int, str]:
    """The code and reason of the one reply, which was not admitted."""
    assert admission.admitted == []
    (rejection,) = admission.rejected
    assert rejection.node_id == 1
    return rejection.code, rejection.reason


def test_good_replies_are_admitted_as_they_are():
    replies = [reply(1), reply(3), reply(2)]
    admission = admit_training(replies)
    assert admission.admitted == replies
    assert (admission.rejected, admission.statements) == ([], {})


def test_a_node_that_was_not_asked_is_rejected():
    assert only_rejection(admit_training([reply(1)], asked=[2, 3])) == (
        0,
        "answers a task that round 4 did not give it",
    )


@pytest.mark.parametrize("round", [3, 5])
def test_an_answer_to_another_round_is_rejected(round):
    assert "round 4 did not give it" in only_rejection(admit_training([reply(1, round=round)]))[1]


def test_a_second_reply_of_a_client_is_rejected_and_the_first_stays():
    first, second = reply(1), reply(1, content(update(9.0)))
    admission = admit_training([first, second])
    assert admission.admitted == [first]
    assert [r.reason for r in admission.rejected] == ["answered this round already"]


def test_a_client_whose_first_reply_was_bad_has_had_its_say():
    admission = admit_training([reply(1, content({})), reply(1)])
    assert admission.admitted == []
    assert admission.rejected[1].reason == "answered this round already"


@pytest.mark.parametrize("code", [REFUSED, BUDGET_EXHAUSTED, FAILED, 2])
def test_an_error_is_a_failure_with_its_code_and_reason(code):
    answer = Error(code=code, reason="no more than 5 rounds")
    assert only_rejection(admit_training([reply(1, answer)])) == (code, "no more than 5 rounds")


def test_an_error_without_code_or_reason_is_a_failure_and_not_a_refusal():
    # 0 is Flower's code for an unknown error; a refusal would keep the client out for good.
    assert only_rejection(admit_training([reply(1, Error(code=0))])) == (FAILED, "no reason given")


@pytest.mark.parametrize(
    "arrays, reason",
    [
        (update(b=...), "arrays must be w, b; got w"),
        (update(extra=np.zeros(1, np.float32)), "arrays must be w, b; got w, b, extra"),
        ({}, "arrays must be w, b; got none"),
        (dict(reversed(update().items())), "arrays must be w, b; got b, w"),
        (update(w=np.zeros((3, 2), np.float32)), "array w must be float32 [2, 3], got float32 [3, 2]"),
        (update(w=np.zeros(6, np.float32)), "array w must be float32 [2, 3], got float32 [6]"),
        (update(b=np.zeros((3, 1), np.float32)), "array b must be float32 [3], got float32 [3, 1]"),
        (update(b=np.zeros(3, np.float64)), "array b must be float32 [3], got float64 [3]"),
        (update(b=np.zeros(3, np.int32)), "array b must be float32 [3], got int32 [3]"),
        (update(b=np.array([0, math.nan, 0], np.float32)), "array b has NaN or infinite values"),
        (update(w=np.full((2, 3), -math.inf, np.float32)), "array w has NaN or infinite values"),
    ],
)
def test_arrays_that_are_not_like_the_models_are_rejected(arrays, reason):
    assert only_rejection(admit_training([reply(1, content(arrays))])) == (0, reason)


def array(data: bytes) -> Array:
    return Array("float32", (3,), "numpy.ndarray", data)


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, b=value)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "broken",
    [
        array(b""),
        array(b"rubbish"),
        array(b"\x93NUMPY\x01\x00"),
        array(b"PK\x03\x04"),
        array(saved(STATE["b"])),
        Array("float32", (3,), "torch", STATE["b"].tobytes()),
    ],
    ids=["nothing", "rubbish", "cut off", "broken archive", "archive", "other kind"],
)
def test_an_array_that_cannot_be_read_is_rejected_and_stops_nothing(broken):
    answer = content()
    answer[ARRAYS]["b"] = broken
    admission = admit_training([reply(1, answer), reply(2)])
    assert [(r.node_id, r.reason) for r in admission.rejected] == [(1, "array b cannot be read")]
    assert [m.metadata.src_node_id for m in admission.admitted] == [2]


@given(st.binary(max_size=80))
def test_no_bytes_in_an_array_stop_the_server(data):
    answer = content()
    answer[ARRAYS]["b"] = array(b"\x93NUMPY" + data)
    assert only_rejection(admit_training([reply(1, answer)]))[0] == 0


@pytest.mark.parametrize("names", [[], ["weights"], [ARRAYS, "more"]])
def test_there_is_one_record_of_arrays(names):
    answer = content()
    del answer[ARRAYS]
    for name in names:
        answer[name] = records.from_weights(update())
    assert only_rejection(admit_training([reply(1, answer)])) == (
        0,
        f"expected one record of arrays called arrays, got {names}",
    )


@pytest.mark.parametrize("names", [[], ["figures"], [METRICS, "more"]])
def test_there_is_one_record_of_metrics(names):
    answer = content()
    del answer[METRICS]
    for name in names:
        answer[name] = MetricRecord({WEIGHT: 1.0, LOSS: 0.5})
    assert only_rejection(admit_training([reply(1, answer)])) == (
        0,
        f"expected one record of metrics called metrics, got {names}",
    )


@pytest.mark.parametrize(
    "metrics, reason",
    [
        ({WEIGHT: 1.0}, "metrics must be num-examples, train_loss; got num-examples"),
        ({LOSS: 1.0}, "metrics must be num-examples, train_loss; got train_loss"),
        ({}, "metrics must be num-examples, train_loss; got none"),
        ({WEIGHT: 1.0, LOSS: 0.5, "age": 71.0}, "metrics must be num-examples, train_loss; got age, "),
        ({WEIGHT: 1.0, LOSS: math.nan}, "metric train_loss is NaN or infinite"),
        ({WEIGHT: math.inf, LOSS: 0.5}, "metric num-examples is NaN or infinite"),
        ({WEIGHT: 10**400, LOSS: 0.5}, "metric num-examples is NaN or infinite"),
        ({WEIGHT: 1.0, LOSS: [0.5, 0.5]}, "metric train_loss has the wrong size"),
        ({WEIGHT: [1.0], LOSS: 0.5}, "metric num-examples has the wrong size"),
        ({WEIGHT: 0.99, LOSS: 0.5}, "weight num-examples must be from 1 to 1e+12, got 0.99"),
        ({WEIGHT: 0.0, LOSS: 0.5}, "weight num-examples must be from 1 to 1e+12, got 0.0"),
        ({WEIGHT: 0, LOSS: 0.5}, "weight num-examples must be from 1 to 1e+12, got 0"),
        ({WEIGHT: -3.0, LOSS: 0.5}, "weight num-examples must be from 1 to 1e+12, got -3.0"),
        ({WEIGHT: 1e300, LOSS: 0.5}, "weight num-examples must be from 1 to 1e+12, got 1e+300"),
    ],
)
def test_metrics_other_than_those_expected_are_rejected(metrics, reason):
    code, given_reason = only_rejection(admit_training([reply(1, content(metrics=metrics))]))
    assert code == 0
    assert given_reason.startswith(reason)


def test_counts_of_an_evaluation_are_admitted_negative_ones_too():
    # Noise may make a count negative.
    assert len(admit_evaluation({WEIGHT: 1.0, COUNTS: [3.0, -0.5, 0.0, 7.0]}).admitted) == 1


@pytest.mark.parametrize(
    "counts, reason",
    [
        ([1.0, 2.0, 3.0], "metric counts has the wrong size"),
        ([1.0] * 5, "metric counts has the wrong size"),
        ([], "metric counts has the wrong size"),
        (4.0, "metric counts has the wrong size"),
        ([1.0, math.nan, 0.0, 0.0], "metric counts is NaN or infinite"),
        ([10**400, 0, 0, 0], "metric counts is NaN or infinite"),
    ],
)
def test_counts_of_another_size_or_not_finite_are_rejected(counts, reason):
    assert only_rejection(admit_evaluation({WEIGHT: 1.0, COUNTS: counts})) == (0, reason)


def test_a_private_clients_statement_is_kept():
    known = stated(opacus_planned_epsilon=4.0, opacus_prv=1, secure_noise=1, exact_arithmetic=1)
    older = stated()  # of a client that tells no figure of Opacus
    admission = admit_training([reply(1, content(statement=known)), reply(2, content(statement=older))])
    assert {node: s.to_wire() for node, s in admission.statements.items()} == {
        1: known,
        2: {**older, "secure_noise": 0, "exact_arithmetic": 0},
    }


@pytest.mark.parametrize(
    "statement, reason",
    [
        (stated(epsilon=-0.1), "the privacy statement's epsilon is -0.1; it is from 0 to 4"),
        (stated(epsilon=4.1), "the privacy statement's epsilon is 4.1; it is from 0 to 4"),
        (stated(planned_epsilon=9.0), "the privacy statement's planned_epsilon is 9; it is from 0 to 4"),
        (stated(delta=2.0), "the privacy statement's delta is 2; it is from 0 to 1"),
        (stated(steps=-1), "the privacy statement's steps is -1; it is from 0 to 1e+15"),
        (stated(secure_noise=7), "the privacy statement's secure_noise is 7; it is from 0 to 1"),
        ({**stated(), "\x1b[2J": 0.0}, "the privacy statement has ' [2J', which no client states"),
        ({k: v for k, v in stated().items() if k != "steps"}, "the privacy statement lacks steps"),
        (
            {},
            "the privacy statement lacks epsilon, planned_epsilon, delta, noise_multiplier, sampling_rate, steps, "
            "count_epsilon, rows, evaluation_noise, evaluations",
        ),
        (None, "a private client must state what it has released, and this reply does not"),
    ],
)
def test_a_statement_that_is_missing_or_cannot_be_true_is_rejected_and_not_kept(statement, reason):
    answer = reply(1, content(statement=statement))
    rules = {"asked": {1}, "server_round": ROUND, "metrics": {WEIGHT, LOSS}, "private": True, "limit": 4.0}
    admission = Sorted([answer], **rules, sent=STATE)
    assert only_rejection(admission) == (0, reason)
    assert admission.statements == {}


def test_every_number_that_a_client_states_is_known():
    ledger = Ledger.in_memory()
    said = opened(ledger).statement()
    ledger.close()
    answer = reply(1, content(statement=said.to_wire()))
    rules = {"asked": {1}, "server_round": ROUND, "metrics": {WEIGHT, LOSS}, "private": True, "limit": 4.0}
    admission = Sorted([answer], **rules, sent=STATE)
    assert admission.admitted == [answer] and admission.statements == {1: said}


@pytest.mark.parametrize("value", ["much", math.nan, math.inf, True, [1.0], b"1", 10**400])
def test_a_statement_that_is_not_all_finite_numbers_is_rejected(value):
    admission = admit_training([reply(1, content(statement={**stated(), "epsilon": value}))])
    assert only_rejection(admission) == (0, "the privacy statement's epsilon is not a finite number")
    assert admission.statements == {}


def test_what_a_rejected_reply_says_was_released_still_counts_as_released():
    admission = admit_training([reply(1, content(update(math.nan), statement=stated()))])
    assert admission.admitted == []
    assert admission.statements[1].epsilon == 1.5


def test_a_statement_from_a_client_that_was_not_asked_is_ignored():
    assert admit_training([reply(1, content(statement=stated()))], asked=[2]).statements == {}


NAN_AMONG_GOOD = [update(1.0), update(math.nan), update(4.0)]


def test_one_nan_reply_is_left_out_and_the_mean_of_the_others_stands():
    replies = [reply(node, content(arrays)) for node, arrays in enumerate(NAN_AMONG_GOOD, start=1)]
    aggregate, _ = FedAvg().aggregate_train(ROUND, admit_training(replies).admitted)
    assert aggregate is not None
    assert np.array_equal(aggregate["w"].numpy(), np.full((2, 3), 2.5))  # (1 + 4) / 2


# What Flower does without us. If one of these fails, a Flower release has mended it.


def test_flowers_own_fedavg_lets_one_nan_reply_make_the_global_model_nan():
    replies = [reply(node, content(arrays)) for node, arrays in enumerate(NAN_AMONG_GOOD, start=1)]
    aggregate, _ = FedAvg().aggregate_train(ROUND, replies)
    assert aggregate is not None
    assert np.isnan(aggregate["w"].numpy()).all()


def test_flowers_own_loop_ends_a_run_without_one_valid_reply_as_a_success_with_an_empty_model():
    def refuse(message: Message, context: object) -> Message:
        return Message(Error(code=REFUSED, reason="no"), reply_to=message)

    grid = InlineGrid(refuse, [1, 2, 3], run="flower")
    result = FedAvg().start(grid, records.from_weights(STATE), num_rounds=2)
    assert isinstance(result.arrays, ArrayRecord)
    assert len(result.arrays) == 0
    assert result.train_metrics_clientapp == {}


def test_a_private_client_that_does_not_say_what_it_released_is_rejected():
    silent, open_ = reply(1), reply(2, content(statement=stated()))
    metrics = {WEIGHT, LOSS}
    admission = Sorted([silent, open_], asked={1, 2}, server_round=ROUND, metrics=metrics, private=True, sent=STATE)
    assert admission.admitted == [open_]
    assert [(r.node_id, r.reason) for r in admission.rejected] == [
        (1, "a private client must state what it has released, and this reply does not")
    ]


def test_a_reason_is_one_printable_line_whatever_the_reply_was_called():
    for name in ("\ud800", "\x1b[2J\n", "x" * 9999):
        answer = content(metrics={WEIGHT: 1.0, name: 0.5})
        _, reason = only_rejection(admit_training([reply(1, answer)]))
        assert reason.isprintable() and len(reason) < 310


@pytest.mark.parametrize("loss", [1.1e30, -1.1e30, 1.7e308])
def test_a_metric_whose_sums_could_overflow_is_rejected(loss):
    _, reason = only_rejection(admit_training([reply(1, content(metrics={WEIGHT: 1.0, LOSS: loss}))]))
    assert reason == f"metric {LOSS} is larger than 1e+30"


@pytest.mark.parametrize("wrong", [1.1e9, -1.1e9, 3e38])
def test_an_entry_far_beyond_the_model_that_was_sent_is_rejected(wrong):
    answer = content(update(b=np.array([0, wrong, 0], np.float32)))
    _, reason = only_rejection(admit_training([reply(1, answer)]))
    assert reason == f"array b has an entry of size {abs(wrong):.3g}; at most 1e+09 fits the model"


def test_how_large_an_entry_may_be_follows_the_model_that_was_sent():
    large = {"w": np.full((2, 3), -100.0, np.float32), "b": np.zeros(3, np.float32)}
    rules = {"asked": {1, 2}, "server_round": ROUND, "metrics": {WEIGHT, LOSS}, "sent": large}
    admission = Sorted([reply(1, content(update(9e10))), reply(2, content(update(1.1e11)))], **rules)
    assert admission.nodes == {1}  # 10^9 times 100 lies between the two


def weighed(*weights: float, compare: bool = True) -> tuple[list[float], Admission]:
    """The weights of the replies that count, in their order, and what became of the others."""
    nodes = range(1, len(weights) + 1)
    admission = Admission(asked=nodes, server_round=ROUND, metrics={WEIGHT, LOSS}, sent=STATE, compare=compare)
    counted = []
    for node, weight in zip(nodes, weights, strict=True):
        answer = reply(node, content(metrics={WEIGHT: weight, LOSS: 0.5}))
        assert admission.take(answer)
        counted += admission.weigh(answer)
    counted += admission.release()
    return [float(r.content.metric_records[METRICS][WEIGHT]) for r in counted], admission


@pytest.mark.parametrize("place", range(5))
def test_a_weight_far_beyond_the_median_is_rejected_whenever_it_comes(place):
    weights = [80.0, 100.0, 120.0, 90.0]
    weights.insert(place, 1e8)
    counted, admission = weighed(*weights)
    assert sorted(counted) == [80, 90, 100, 120]
    assert admission.nodes == {1, 2, 3, 4, 5} - {place + 1}
    (rejection,) = admission.rejected
    assert rejection.node_id == place + 1
    assert rejection.reason.startswith("weight 1e+08 is more than 100000 times the median of this round, ")


@given(st.lists(st.floats(1, 99999), max_size=8))
def test_tables_that_differ_as_honest_ones_do_all_count(weights):
    counted, admission = weighed(*weights)
    assert sorted(counted) == sorted(weights)
    assert admission.rejected == []


def test_of_two_replies_neither_is_the_wrong_one():
    assert weighed(1.0, 1e9)[0] == [1.0, 1e9]


def test_weights_are_not_compared_where_one_client_may_not_matter_to_another():
    assert weighed(1.0, 1.0, 1e9, compare=False)[0] == [1.0, 1.0, 1e9]


# What a grid checks of several clients' updates at once


def test_of_several_updates_each_that_must_not_count_is_found_with_its_reason():
    sent = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.float32)}
    flat, weights, losses = np.zeros((8, 8), np.float32), np.ones(8), np.zeros(8)
    flat[1, 2], flat[2, 7], flat[3, 6] = np.nan, np.inf, -2e9
    weights[4], weights[5] = 0.5, np.nan
    losses[6], losses[7] = np.nan, 1e31
    found = faults_of(Updates(flat=flat, weights=weights, losses=losses, like=sent), sent, reach_of(sent))
    assert {place: str(fault) for place, fault in found.items()} == {
        1: "array w has NaN or infinite values",
        2: "array b has NaN or infinite values",
        3: "array b has an entry of size 2e+09; at most 1e+09 fits the model",
        4: "weight num-examples must be from 1 to 1e+12, got 0.5",
        5: "weight num-examples must be from 1 to 1e+12, got nan",
        6: "metric train_loss is NaN or infinite",
        7: "metric train_loss is larger than 1e+30",
    }
    assert [place for place, fault in found.items() if fault.of(1).diverged] == [1, 2, 3, 6, 7]
