"""What a reply must satisfy before it may be aggregated.

Flower aggregates whatever arrives: one NaN makes the global model NaN. Here each reply stands alone, and a bad
one is left out with a reason:

    not asked this round, or asked in another           rejected
    a second reply of one client                        rejected
    an error                                            a failure, with its code
    array names, their order, shapes or types differ    rejected
    NaN or infinity in an array, a metric or a weight   rejected
    a weight that is 0 or less, or above 10^12          rejected
    metrics other than those expected                   rejected
    a private client's without a privacy statement      rejected
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord
from numpy.typing import NDArray

from common.wire.records import ARRAYS, COUNTS, FAILED, METRICS, PRIVACY, WEIGHT

Statement = dict[str, float]

LARGEST_WEIGHT = 1e12  # no table has more rows, and sums of such weights are far from overflow


@dataclass(frozen=True)
class Rejection:
    """A reply that does not count. `code` is that of the client's error, 0 if the fault was found here."""

    node_id: int
    code: int
    reason: str


@dataclass
class Admission:
    """One round's replies, sorted."""

    admitted: list[Message] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    statements: dict[int, Statement] = field(default_factory=dict)  # what private clients say they released


class _Fault(Exception):
    pass


def admit(
    replies: Iterable[Message],
    *,
    asked: Collection[int],
    server_round: int,
    metrics: Collection[str],
    private: bool = False,
    state: Mapping[str, NDArray[np.float32]] | None = None,
    counts: int | None = None,
) -> Admission:
    """Sorts replies.

    Args:
        asked: the nodes that this round asked.
        metrics: the names that a reply's metrics must have, all and no other.
        private: whether each reply must say what its client has released.
        state: training only: the arrays that each reply's arrays must resemble.
        counts: evaluation only: how many counts there are.
    """
    result = Admission()
    seen: set[int] = set()
    for reply in replies:
        node_id = reply.metadata.src_node_id
        try:
            if node_id not in asked or reply.metadata.group_id != str(server_round):
                raise _Fault(f"answers a task that round {server_round} did not give it")
            if node_id in seen:
                raise _Fault("answered this round already")
            seen.add(node_id)
            if reply.has_error():
                code = reply.error.code or FAILED
                result.rejected.append(Rejection(node_id, code, reply.error.reason or "no reason given"))
                continue
            # What a client says it has released, it has, also in a reply that does not count.
            if (statement := _statement(reply)) is not None:
                result.statements[node_id] = statement
            if state is not None:
                _check_arrays(reply, state)
            _check_metrics(reply, metrics, counts)
            if private and statement is None:
                raise _Fault("a private client must state what it has released, and this reply does not")
        except _Fault as fault:
            result.rejected.append(Rejection(node_id, 0, str(fault)))
            continue
        result.admitted.append(reply)
    return result


def _check_arrays(reply: Message, state: Mapping[str, NDArray[np.float32]]) -> None:
    records = reply.content.array_records
    if list(records) != [ARRAYS]:
        raise _Fault(f"expected one record of arrays called {ARRAYS}, got {list(records)}")
    record = records[ARRAYS]
    if list(record) != list(state):
        raise _Fault(f"arrays must be {', '.join(state)}; got {', '.join(record) or 'none'}")
    for name, expected in state.items():
        try:
            array = record[name].numpy()
            shape, dtype = array.shape, array.dtype  # what numpy reads from an archive has neither
        except Exception as error:  # numpy's reader has no exception of its own
            raise _Fault(f"array {name} cannot be read") from error
        if shape != expected.shape or dtype != expected.dtype:
            raise _Fault(f"array {name} must be {expected.dtype} {list(expected.shape)}, got {dtype} {list(shape)}")
        if not np.isfinite(array).all():
            raise _Fault(f"array {name} has NaN or infinite values")


def _check_metrics(reply: Message, expected: Collection[str], counts: int | None) -> None:
    records = reply.content.metric_records
    if list(records) != [METRICS]:
        raise _Fault(f"expected one record of metrics called {METRICS}, got {list(records)}")
    record: MetricRecord = records[METRICS]
    if set(record) != set(expected):
        raise _Fault(f"metrics must be {', '.join(sorted(expected))}; got {', '.join(sorted(record)) or 'none'}")
    for name, value in record.items():
        values = value if isinstance(value, list) else [value]
        if isinstance(value, list) != (name == COUNTS) or (name == COUNTS and len(values) != counts):
            raise _Fault(f"metric {name} has the wrong size")
        if not all(_is_finite(v) for v in values):
            raise _Fault(f"metric {name} is NaN or infinite")
    weight = record[WEIGHT]
    if not (isinstance(weight, int | float) and 0 < weight <= LARGEST_WEIGHT):
        raise _Fault(f"weight {WEIGHT} must be greater than 0 and at most {LARGEST_WEIGHT:g}, got {weight}")


def _statement(reply: Message) -> Statement | None:
    record = reply.content.get(PRIVACY)
    if not isinstance(record, ConfigRecord):
        return None
    statement: Statement = {}
    for name, value in record.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            raise _Fault(f"the privacy statement's {name} is not a finite number")
        statement[name] = value
    return statement


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False
