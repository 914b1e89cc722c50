"""One round as a value: whom it asks and the weights that it is of go in, the weights that it gives come out.

Nothing of a run is changed here; what became of those who were asked is told, and the loop draws its conclusions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies
from flwr.serverapp.strategy import Strategy

from common.document.federation import Federation
from common.model.energy import Energy, sum_of
from common.model.scores import Counts, Scores, count_sensitivity, count_size, scores_of
from common.model.update import Update
from common.model.weights import Weights, between, is_finite
from common.privacy.statement import Statement
from common.wire import records
from common.wire.records import COMPLETE, COUNTS, GRAMS, JOULES, LATE, LOSS, METRICS, RATE, RUN, WEIGHT
from server.rounds import strategies
from server.rounds.admission import Admission, Partial, Rejection
from server.rounds.aggregation import Aggregator
from server.rounds.client_privacy import ClientLevelDP
from server.rounds.cohort import Cohort, CohortGrid
from server.rounds.run_grid import RunGrid

MOST_REASONS = 3  # of a failed round


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of a run, and whom it asks."""

    federation: Federation
    run: str
    number: int
    complete: int  # rounds that made the model which it sends
    cohort: Cohort
    rate_factor: float = 1.0  # what a plateau has brought the clients' learning rate down to
    server_step: float = 1.0  # how much of the strategy's step is taken


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What became of those whom a round asked."""

    counted: frozenset[int]  # whose replies count
    silent: frozenset[int]  # who has not answered
    rejected: tuple[Rejection, ...]  # by node; those who were late among them
    statements: Mapping[int, Statement]  # what private clients say that they released
    seconds: float
    aggregation: float  # of those, for putting replies together and moving the model
    transfer: float  # ... and for the reply that took longest to arrive, once it had begun
    energy: Energy | None  # that those took whose replies count; None where clients do not tell
    enough: bool  # were there as many as the round needed? Then it did not wait for the silent


@dataclass(frozen=True, kw_only=True)
class TrainedRound:
    """A round that moved the model."""

    weights: Weights
    loss: float | None  # the mean of a row's, where clients tell theirs
    answers: Answers


@dataclass(frozen=True, kw_only=True)
class EvaluatedRound:
    """`metrics` is None if nobody answered, and empty if those who did have no rows to score the model on.
    `counts` is each client's, by node; nobody's with `privacy.client`."""

    metrics: Scores | None
    counts: Mapping[int, Counts]
    answers: Answers


class RoundFailed(Exception):
    """A round that left the model as it was."""

    def __init__(self, reason: str, answers: Answers) -> None:
        super().__init__(reason)
        self.reason, self.answers = reason, answers


def train_round(
    this: Round, weights: Weights, *, grid: Grid, strategy: Strategy, aggregator: Callable[[], Aggregator]
) -> TrainedRound:
    """Trains one round from `weights`.

    Args:
        aggregator: makes what puts the updates together: of a mean, of each reply, of a noisy mean.

    Raises:
        RoundFailed: too few replies were admitted, or the strategy made no model of them.
    """
    started = time.monotonic()
    federation, cohort = this.federation, this.cohort
    admission = _admission(
        this,
        metrics={WEIGHT, LOSS} if federation.privacy.row is None else {WEIGHT},
        sent=weights,
        wire=federation.wire.dtype,
        compare=federation.privacy.client is None,
    )
    config = ConfigRecord({RUN: this.run})
    if federation.strategy.average is None:  # else what is sent is no model to keep: the average is
        config[COMPLETE] = this.complete
    if this.rate_factor != 1.0:
        config[RATE] = this.rate_factor
    # A strategy that is shown no node would wait for one, and an empty cohort is a cohort.
    shown = CohortGrid(grid, cohort.asked or cohort.nodes)
    strategies.begin_round(strategy, client_rate=federation.training.rate_at(this.number, 0) * this.rate_factor)
    messages = strategy.configure_train(this.number, records.from_weights(weights), config, shown)
    # Strategies ask in a random order of their own, which no seed repeats; where not all are needed, it tells.
    place = {node: i for i, node in enumerate(cohort.asked)}
    messages = [message for message in messages if message.metadata.dst_node_id in place]
    messages.sort(key=lambda message: place[message.metadata.dst_node_id])
    together, aggregation = aggregator(), _Stopwatch()
    took: list[Energy | None] = []
    for answer in _admitted(this, grid, messages, admission, aggregator):
        with aggregation:
            if isinstance(answer, Partial):
                took.append(answer.energy)
                together.merge(answer.aggregate)
            else:
                took.append(records.energy_of(answer.content))
                together.add(answer.metadata.src_node_id, records.to_update(answer.content))
    loss = together.loss  # before a strategy takes updates apart
    moved, problem = None, _missing(this, admission)
    with aggregation:
        if not problem:
            moved, problem = _move(strategy, this, weights, grid, together.finish())
    answers = _answers(this, admission, started, took, aggregation=aggregation.seconds, transfer=_transfer(grid))
    if moved is None:
        raise RoundFailed(problem, answers)
    if this.server_step != 1.0:
        moved = between(weights, moved, this.server_step)
    moved |= {name: weights[name] for name in federation.frozen_arrays}  # whatever clients sent
    return TrainedRound(weights=moved, loss=loss, answers=answers)


def evaluate_round(
    this: Round, weights: Weights, *, grid: Grid, strategy: Strategy, client_privacy: ClientLevelDP | None
) -> EvaluatedRound:
    """Lets the cohort score `weights`. `client_privacy` adds noise for whole clients; then even no
    reply at all gives metrics, as it must not tell who was asked."""
    started = time.monotonic()
    schema = this.federation.data_schema
    admission = _admission(this, metrics={WEIGHT, COUNTS}, counts=count_size(schema))
    config = ConfigRecord({RUN: this.run, COMPLETE: this.complete})
    shown = CohortGrid(grid, this.cohort.asked)
    messages = strategy.configure_evaluate(this.number, records.from_weights(weights), config, shown)
    told: dict[int, Counts] = {}
    took: list[Energy | None] = []
    for answer in _admitted(this, grid, messages, admission, None):
        assert isinstance(answer, Message)
        took.append(records.energy_of(answer.content))
        told[answer.metadata.src_node_id] = np.asarray(answer.content.metric_records[METRICS][COUNTS], np.float64)
    # Scores of all rows come from counts of all rows, in a fixed order: sums of floats depend on theirs.
    nodes = sorted(told)
    counts = [told[node] for node in nodes]
    metrics, noise = None, count_noise(this.federation, len(counts))
    if client_privacy is not None:
        metrics = scores_of(client_privacy.counts(counts), schema, noise=noise, few=0)  # of clients, not rows
    elif counts:
        metrics = scores_of(np.sum(counts, axis=0), schema, noise=noise)
    if metrics and noise:
        metrics["count_noise"] = noise
    answers = _answers(this, admission, started, took, late=False, transfer=_transfer(grid))
    told = told if client_privacy is None else {}
    return EvaluatedRound(metrics=metrics, counts=told, answers=answers)


def count_noise(federation: Federation, clients: int) -> float:
    """Standard deviation of the noise in each count that an evaluation's metrics are made of; 0 without privacy.

    With `privacy.row` each of the clients adds noise of its own; with `privacy.client` the server adds some once, to
    counts in which each client weighs as much as one row, and what clients added before is not in this figure.
    """
    one = federation.privacy.evaluation.noise * count_sensitivity(federation.data_schema)
    if federation.privacy.client is not None:
        return one
    return one * math.sqrt(clients) if federation.privacy.row is not None else 0.0


class _Stopwatch:
    """Adds up the seconds of the contexts that it is."""

    def __init__(self) -> None:
        self.seconds = self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.monotonic() - self._began


def _transfer(grid: Grid) -> float:
    return grid.transfer_s if isinstance(grid, RunGrid) else 0.0


def _admission(this: Round, *, metrics: set[str], **expected: Any) -> Admission:
    """Of a round's replies; `expected` is what those to training or to evaluation are like."""
    row = this.federation.privacy.row
    energy = {JOULES, GRAMS} if this.federation.tells_energy else set()
    return Admission(
        asked=this.cohort.asked,
        server_round=this.number,
        private=row is not None,
        limit=math.inf if row is None else row.epsilon,
        metrics=metrics | energy,
        **expected,
    )


def _admitted(
    this: Round,
    grid: Grid,
    messages: Iterable[Message],
    admission: Admission,
    aggregator: Callable[[], Aggregator] | None,
) -> Iterator[Message | Partial]:
    """Sends messages and yields the answers that count, as they come, until there are as many as are needed.
    `aggregator` is what a grid may put updates together in; None if they are not to be."""
    sent = list(messages)
    for message in sent:
        message.metadata.group_id = str(admission.server_round)
    timeout = this.federation.strategy.round_timeout
    if not isinstance(grid, RunGrid):  # one of Flower's own
        for reply in filter(admission.take, grid.send_and_receive(sent, timeout=timeout)):
            yield from admission.weigh(reply)
    else:
        needed = this.cohort.needed
        if aggregator is None:
            stream: Generator[Message | Partial] = grid.stream(sent, timeout=timeout)
        else:
            stream = grid.answers(
                sent, aggregator=aggregator, needed=needed, compare=admission.compare, timeout=timeout
            )
        with closing(stream) as answers:
            for answer in answers:
                if isinstance(answer, Partial):
                    if admission.take_partial(answer):
                        yield answer
                elif admission.take(answer):
                    yield from admission.weigh(answer)
                if len(admission.nodes) >= needed:
                    break
    yield from admission.release()


def _answers(
    this: Round,
    admission: Admission,
    started: float,
    took: Iterable[Energy | None],
    *,
    late: bool = True,
    aggregation: float = 0.0,
    transfer: float = 0.0,
) -> Answers:
    rejected = sorted(admission.rejected, key=lambda r: r.node_id)
    enough = len(admission.nodes) >= this.cohort.needed
    if late and not enough:
        said = f"no reply within {this.federation.strategy.round_timeout:g} s"
        rejected += [Rejection(node, LATE, said) for node in sorted(admission.silent)]
    return Answers(
        counted=frozenset(admission.nodes),
        silent=frozenset(admission.silent),
        rejected=tuple(rejected),
        statements=admission.statements,
        seconds=time.monotonic() - started,
        aggregation=aggregation,
        transfer=transfer,
        energy=sum_of(*took),
        enough=enough,
    )


def _missing(this: Round, admission: Admission) -> str:
    """Why there are too few replies; "" if there are enough."""
    # For `privacy.client` no reply is an outcome like any other: that a round failed would tell who was asked.
    quorum = this.federation.strategy.min_clients
    if this.federation.privacy.client is not None or len(admission.nodes) >= quorum:
        return ""
    reasons = _some(sorted({r.reason for r in admission.rejected})) or "no reply in time"
    return f"{len(admission.nodes)} of at least {quorum} replies were admitted ({reasons})"


def _some(reasons: list[str]) -> str:
    """The first few: those of many clients may differ by a number alone, and each is told with its client."""
    more = len(reasons) - MOST_REASONS
    return "; ".join(reasons[:MOST_REASONS]) + (f"; and {more} more reasons" if more > 0 else "")


def _move(
    strategy: Strategy, this: Round, weights: Weights, grid: Grid, updates: list[tuple[int, Update]]
) -> tuple[Weights | None, str]:
    """The weights that the strategy makes of the updates; or none and why, and it then forgets the updates."""
    before = strategies.memory(strategy)
    replies = [grid.create_message(records.from_update(update), "train", node, "") for node, update in updates]
    try:
        arrays, _ = strategy.aggregate_train(this.number, replies)
        problem = "aggregation gave no model, or one with NaN or infinite values"
    except (AggregationError, InconsistentMessageReplies) as error:
        arrays, problem = None, f"aggregation failed: {error}"
    moved = _like(arrays, weights)
    if moved is None:
        strategies.restore(strategy, before)
        return None, problem
    return moved, ""


def _like(arrays: ArrayRecord | None, weights: Weights) -> Weights | None:
    """The aggregated arrays in the model's own types (some strategies compute in float64), if all are finite."""
    if arrays is None or list(arrays) != list(weights):
        return None
    new = {name: arrays[name].numpy().astype(weights[name].dtype) for name in weights}
    return new if is_finite(new) else None
