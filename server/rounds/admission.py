"""What a reply must satisfy before it may be aggregated.

Flower aggregates whatever arrives: one NaN makes the global model NaN. Here each reply stands alone, and a bad
one is left out with a reason:

    not asked this round, or asked in another           rejected
    a second reply of one client                        rejected
    an error                                            a failure, with its code
    array names, their order, shapes or types differ    rejected, also in the form in which updates travel
    NaN or infinity in an array, a metric or a weight   rejected
    an entry beyond 10^9 times the model that was sent  rejected
    a weight below 1, or above 10^12                    rejected
    a weight above 10^5 times the cohort's median       rejected, where three replies or more are to be compared
    metrics other than those expected                   rejected; energy only where the document asks for it
    an energy below 0                                   rejected
    a private client's without a privacy statement      rejected

The two multiples find mistakes of units, a sum in place of a mean and crude sabotage. They do not stop a client that
lies within them: `privacy.client` and the robust strategies are for that. Honest tables differ by a factor of 10^4 (a
clinic of 100 rows beside a registry of a million), so a weight may be ten times as far from the median. An entry is
compared with the largest of the model that was sent, or with 1 if that is less: a step moves entries by about the
learning rate, and the noise for the largest clip that a document may have, 10^6, by 10^8 or so at a batch of one. A
model beyond that has diverged.

Weights are compared as they come, with the median of those that have come, since a sum does not keep replies. The first
two wait for a third, so that one bad reply among them is found whatever its place; two of the first three can hide a
third. Weights within 10^5 of each other are all admitted in any order, so clients that state little cannot keep out one
of at most 10^5 rows. Under `privacy.client` weights are not compared: whether one client counts may not depend on
another, and a weight is capped there.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from numpy.typing import NDArray

from common.document.federation import Dtype
from common.errors import ProtocolError
from common.model.energy import Energy
from common.model.update import Updates
from common.model.weights import Weights
from common.privacy.statement import Statement
from common.text import shown
from common.wire import compression, records
from common.wire.records import ARRAYS, COUNTS, FAILED, GRAMS, JOULES, LOSS, METRICS, PRIVACY, WEIGHT
from server.rounds.aggregation import Aggregator

MOST_OF_MEDIAN = 1e5  # of the cohort's weights
LEAST_TO_COMPARE = 3  # of two, nobody can say which one is wrong
MOST_OF_MODEL = 1e9  # of the largest entry that was sent, or of 1
LARGEST_METRIC = 1e30  # sums of such numbers, times weights, are far from overflow
LARGEST_WEIGHT = 1e12  # no table has more rows, and sums of such weights are far from overflow


@dataclass(frozen=True)
class Rejection:
    """A reply that does not count. `code` is that of the client's error, 0 if the fault was found here."""

    node_id: int
    code: int
    reason: str
    diverged: bool = False  # has its training left all bounds, by what it sent?


@dataclass(frozen=True, kw_only=True)
class Partial:
    """What a grid answers for several clients at once: their updates put together, where they were made."""

    aggregate: Aggregator
    nodes: frozenset[int]  # whose updates are in it
    statements: Mapping[int, Mapping[str, object]]
    energy: Energy | None = None  # that those clients took, where the document asks for it
    rejected: tuple[Rejection, ...] = ()  # who was asked and is not in it, and why


@dataclass(kw_only=True)
class Admission:
    """One round's replies, sorted as they come."""

    asked: Collection[int]  # the nodes that this round asked
    server_round: int
    metrics: Collection[str]  # the names that a reply's metrics must have, all and no other
    private: bool = False  # whether each reply must say what its client has released
    limit: float = math.inf  # the most that a private client may say it has cost a row: the document's epsilon
    sent: Weights | None = None  # training only: the weights that were sent, which each reply's arrays must resemble
    wire: Dtype = "float32"  # training only: the type in which updates travel
    counts: int | None = None  # evaluation only: how many counts there are
    compare: bool = False  # compare weights, in `weigh`?

    nodes: set[int] = field(default_factory=set)  # whose replies were admitted
    rejected: list[Rejection] = field(default_factory=list)
    statements: dict[int, Statement] = field(default_factory=dict)  # what private clients say they released
    _seen: set[int] = field(default_factory=set)
    _reach: float = field(init=False)
    _peers: Peers[Message] = field(init=False)

    def __post_init__(self) -> None:
        self._reach = reach_of(self.sent or {})
        self._peers = Peers(lambda reply: records.weight_of(reply.content))

    def take(self, reply: Message) -> bool:
        """Admits a reply, or notes why not."""
        node_id = reply.metadata.src_node_id
        try:
            if node_id not in self.asked or reply.metadata.group_id != str(self.server_round):
                raise Fault(f"answers a task that round {self.server_round} did not give it")
            if node_id in self._seen:
                raise Fault("answered this round already")
            self._seen.add(node_id)
            if reply.has_error():
                code = reply.error.code or FAILED
                self.rejected.append(Rejection(node_id, code, shown(reply.error.reason or "no reason given")))
                return False
            # What a client says it has released, it has, also in a reply that does not count.
            if (statement := _statement(reply, self.limit)) is not None:
                self.statements[node_id] = statement
            if self.sent is not None:
                _check_arrays(reply, self.sent, self.wire, self._reach)
            _check_metrics(reply, self.metrics, self.counts)
            if self.private and statement is None:
                raise Fault("a private client must state what it has released, and this reply does not")
        except Fault as fault:
            self.rejected.append(fault.of(node_id))
            return False
        self.nodes.add(node_id)
        return True

    def take_partial(self, partial: Partial) -> bool:
        """Admits what a grid has put together of several clients' updates, or notes for each of them why not.

        The grid has checked each update (`check_weights` or `faults_of`, `Peers`), and what did not pass is in
        `partial.rejected`.
        """
        told = [*partial.nodes, *(rejection.node_id for rejection in partial.rejected)]
        try:
            if len(set(told)) != len(told) or not set(told) <= set(self.asked) or set(told) & self._seen:
                raise Fault(f"it has clients that round {self.server_round} did not ask, or one of them twice")
            statements = {node: checked_statement(given, self.limit) for node, given in partial.statements.items()}
            if self.private and not partial.nodes <= set(statements):
                raise Fault("private clients must state what they have released, and one of them does not")
        except Fault as fault:
            self.rejected += [
                Rejection(node, 0, shown(f"a partial result was left out: {fault}")) for node in sorted(partial.nodes)
            ]
            self._seen |= set(told)
            return False
        self._seen |= set(told)
        self.statements |= statements
        self.rejected += partial.rejected
        self.nodes |= partial.nodes
        return True

    def weigh(self, reply: Message) -> list[Message]:
        """The replies, of those that were taken, that count now that this one has come. The first ones wait for enough
        others; where no more come, they are in `release`."""
        return self._without_outliers(self._peers.take(reply)) if self.compare else [reply]

    def release(self) -> list[Message]:
        """What still waits, without those whose weight is too far from the others'."""
        return self._without_outliers(self._peers.release())

    def _without_outliers(self, compared: Iterable[tuple[Message, Fault | None]]) -> list[Message]:
        kept = []
        for reply, fault in compared:
            if fault is None:
                kept.append(reply)
                continue
            node_id = reply.metadata.src_node_id
            self.nodes.discard(node_id)
            self.rejected.append(fault.of(node_id))
        return kept

    @property
    def silent(self) -> list[int]:
        """Who was asked and has not answered."""
        return [node for node in self.asked if node not in self._seen]


class Fault(Exception):
    """Why a reply does not count."""

    def of(self, node_id: int) -> Rejection:
        """The rejection of that node's reply."""
        return Rejection(node_id, 0, shown(str(self)), diverged=isinstance(self, Diverged))


class Diverged(Fault):
    """... because training has left all bounds."""


Reply = TypeVar("Reply")


class Peers(Generic[Reply]):
    """A round's replies as they come, each of whose weights is compared with the median of those that have come."""

    def __init__(self, weight_of: Callable[[Reply], float]) -> None:
        self._weight_of = weight_of
        self._weights: list[float] = []  # sorted
        self._waiting: list[Reply] = []  # for enough others

    def take(self, reply: Reply) -> list[tuple[Reply, Fault | None]]:
        """The replies that can be judged now that this one has come, and what is wrong with each."""
        bisect.insort(self._weights, self._weight_of(reply))
        self._waiting.append(reply)
        return self.release() if len(self._weights) >= LEAST_TO_COMPARE else []

    def release(self) -> list[tuple[Reply, Fault | None]]:
        """Those that still wait, where no more come."""
        waiting, self._waiting = self._waiting, []
        return [(reply, self._fault(self._weight_of(reply))) for reply in waiting]

    def _fault(self, weight: float) -> Fault | None:
        if len(self._weights) < LEAST_TO_COMPARE:
            return None
        median = statistics.median(self._weights)
        if weight <= MOST_OF_MEDIAN * median:
            return None
        return Fault(f"weight {weight:g} is more than {MOST_OF_MEDIAN:.0f} times the median of this round, {median:g}")


def _check_arrays(reply: Message, sent: Weights, wire: Dtype, reach: float) -> None:
    found = reply.content.array_records
    if list(found) != [ARRAYS]:
        raise Fault(f"expected one record of arrays called {ARRAYS}, got {list(found)}")
    if wire != "float32":
        _unpack(reply, sent, wire)
    record = reply.content.array_records[ARRAYS]
    check_weights({name: _read(record, name) for name in record}, sent, reach)


def reach_of(sent: Weights) -> float:
    """The size that no entry of a reply may pass, for the model that was sent."""
    return MOST_OF_MODEL * max([1.0, *map(_largest, sent.values())])


def check_weights(weights: Mapping[str, NDArray[Any]], sent: Weights, reach: float) -> None:
    """Raises `Fault` unless they are what training can have made of the weights that were sent."""
    if list(weights) != list(sent):
        raise Fault(f"arrays must be {', '.join(sent)}; got {', '.join(weights) or 'none'}")
    for name, expected in sent.items():
        array = weights[name]
        try:
            shape, dtype = array.shape, array.dtype  # what numpy reads from an archive has neither
        except AttributeError as error:
            raise Fault(f"array {name} cannot be read") from error
        if shape != expected.shape or dtype != expected.dtype:
            raise Fault(f"array {name} must be {expected.dtype} {list(expected.shape)}, got {dtype} {list(shape)}")
        if not math.isfinite(largest := _largest(array)):
            raise Diverged(f"array {name} has NaN or infinite values")
        if largest > reach:
            raise Diverged(f"array {name} has an entry of size {largest:.3g}; at most {reach:.3g} fits the model")


def faults_of(updates: Updates, sent: Weights, reach: float) -> dict[int, Fault]:
    """What is wrong with each of several clients' updates that must not count, by its place."""
    largest = np.maximum(updates.flat.max(1, initial=0), -updates.flat.min(1, initial=0))  # NaN if there is one
    doubtful = ~(largest <= reach) | ~((updates.weights >= 1) & (updates.weights <= LARGEST_WEIGHT))
    if updates.losses is not None:
        doubtful |= ~(np.abs(updates.losses) <= LARGEST_METRIC)
    found: dict[int, Fault] = {}
    for place in np.flatnonzero(doubtful).tolist():
        (update,) = updates.take([place])
        try:
            check_weights(update.weights, sent, reach)
            if update.loss is not None:
                _check_metric(LOSS, update.loss)
            _check_weight(update.weight)
        except Fault as fault:
            found[place] = fault
    return found


def _largest(array: NDArray[Any]) -> float:
    """In size; NaN if there is one, which numpy's extremes pass on."""
    return max(float(array.max(initial=0)), -float(array.min(initial=0)))


def _unpack(reply: Message, sent: Weights, wire: Dtype) -> None:
    """Replaces the packed update by the model it makes."""
    record = reply.content.array_records[ARRAYS]
    try:
        unpacked = compression.unpack({name: _read(record, name) for name in record}, sent, wire)
    except compression.NotFinite as error:
        raise Diverged(str(error)) from error
    except ProtocolError as error:
        raise Fault(str(error)) from error
    reply.content[ARRAYS] = records.from_weights(unpacked)


def _read(record: ArrayRecord, name: str) -> NDArray[Any]:
    try:
        return records.look_at(record[name])
    except Exception as error:  # numpy's reader has no exception of its own
        raise Fault(f"array {name} cannot be read") from error


def _check_metrics(reply: Message, expected: Collection[str], counts: int | None) -> None:
    found = reply.content.metric_records
    if list(found) != [METRICS]:
        raise Fault(f"expected one record of metrics called {METRICS}, got {list(found)}")
    record: MetricRecord = found[METRICS]
    if set(record) != set(expected):
        raise Fault(f"metrics must be {', '.join(sorted(expected))}; got {', '.join(sorted(record)) or 'none'}")
    for name, value in record.items():
        values = value if isinstance(value, list) else [value]
        if isinstance(value, list) != (name == COUNTS) or (name == COUNTS and len(values) != counts):
            raise Fault(f"metric {name} has the wrong size")
        for v in values:
            _check_metric(name, v)
    _check_weight(record[WEIGHT])


def _check_metric(name: str, value: float) -> None:
    if not _is_finite(value):
        raise (Diverged if name == LOSS else Fault)(f"metric {name} is NaN or infinite")
    if name != WEIGHT and abs(value) > LARGEST_METRIC:
        raise (Diverged if name == LOSS else Fault)(f"metric {name} is larger than {LARGEST_METRIC:g}")
    if name in (JOULES, GRAMS) and value < 0:
        raise Fault(f"metric {name} must be at least 0, got {value:g}")


def _check_weight(weight: object) -> None:
    if not (isinstance(weight, int | float) and 1 <= weight <= LARGEST_WEIGHT):
        raise Fault(f"weight {WEIGHT} must be from 1 to {LARGEST_WEIGHT:g}, got {weight}")


def _statement(reply: Message, limit: float) -> Statement | None:
    record = reply.content.get(PRIVACY)
    return checked_statement(record, limit) if isinstance(record, ConfigRecord) else None


def checked_statement(given: Mapping[str, object], limit: float) -> Statement:
    """What a client states. Raises `Fault` if it is nothing that a client can state under that limit of epsilon."""
    try:
        return Statement.from_wire(given, limit=limit)
    except ValueError as error:
        raise Fault(str(error)) from error


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False
