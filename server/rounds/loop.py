"""The round loop: wait, sample, send, admit, aggregate, evaluate, save.

It drives Flower's public Strategy methods, so any Flower strategy works unchanged, but not Flower's own
`Strategy.start`, which cannot resume or stop early, ends a run without a single reply as a success, and averages
whatever arrives.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import closing

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies
from flwr.serverapp.strategy import Strategy

from common.document.federation import OF_A_MEAN
from common.errors import RunFailed
from common.model.scores import Metrics, count_size, metrics_of
from common.model.weights import State, is_finite
from common.wire import records
from common.wire.grids import RunGrid
from common.wire.records import ARRAYS, BUDGET_EXHAUSTED, COUNTS, LATE, LOSS, LOST, METRICS, REFUSED, RUN, WEIGHT
from server.rounds import cohort, stopping, strategies
from server.rounds.admission import Admission, Rejection
from server.rounds.advice import on_divergence
from server.rounds.aggregation import Fold
from server.rounds.cohort import CohortGrid
from server.rounds.run import Event, Run

SAYS_NO = (REFUSED, BUDGET_EXHAUSTED)
MOST_REASONS = 3  # of a failed round


def run_rounds(run: Run, grid: Grid, strategy: Strategy, *, wait_s: float | None = None) -> None:
    """Runs the rounds that are left, and leaves in `run` how they ended.

    Args:
        wait_s: seconds to wait for the quorum before each round; None waits for ever.

    Raises:
        RunFailed: too many failed rounds in a row, or no quorum within `wait_s`.
    """
    federation = run.federation
    if run.present:
        cohort.wait_for_those_who_were_here(run, grid)
    if run.pending:
        assert run.event is not None
        _complete(run, grid, strategy, run.event)
    failed, problem = 0, None
    rounds = federation.training.rounds
    first = run.tried + 1 if run.round == rounds else min(run.tried + 1, rounds)  # the last one may be tried again
    for server_round in range(first, rounds + 1):
        if reason := stopping.verdict(run):
            run.status, run.reason = "completed", reason
            return
        started = time.monotonic()
        nodes = cohort.wait_for_quorum(run, grid, wait_s)
        if nodes is None:
            _end_by_budgets(run)
            return
        run.present = {run.name_of(node) for node in nodes}
        event: Event = {"event": "round", "round": server_round, "rounds": federation.training.rounds}
        event["waiting"] = time.monotonic() - started
        problem = _train(run, grid, strategy, nodes, server_round, event)
        if problem is None:
            failed = 0
            run.round, run.tried, run.event = server_round, server_round, event
            _complete(run, grid, strategy, event)
            continue
        failed += 1
        event["failed"] = problem
        run.tried = server_round
        run.save()
        if server_round < rounds:
            run.settle()  # what came in counts for nothing, and nobody will ask for it again
        _note_privacy(run, event)
        run.observe(event)
        if cohort.budgets_are_spent(run, grid):
            _end_by_budgets(run)
            return
        if failed >= federation.strategy.max_failed_rounds:
            raise RunFailed(f"{failed} rounds in a row failed; the last: {problem}{_advice(run)}")
    # A run whose last rounds failed has not trained for as many rounds as it says.
    if failed:
        raise RunFailed(f"the last of {federation.training.rounds} rounds failed: {problem}{_advice(run)}")
    run.status, run.reason = "completed", stopping.verdict(run) or ""


def _end_by_budgets(run: Run) -> None:
    run.status = "budget_exhausted"
    run.reason = "the clients that are left are fewer than min_clients, because budgets are spent"


def _complete(run: Run, grid: Grid, strategy: Strategy, event: Event) -> None:
    """Evaluates a round that has trained, if it is one that evaluates, and tells of it.

    Nothing of a round leaves the server before it is saved: a restart would make it again, with other noise. And no
    client forgets a reply before: a restart may ask for it.
    """
    if run.federation.evaluates(run.round):
        run.pending = True
        run.save()
        run.settle()
        started = time.monotonic()
        evaluation, rejected = _evaluate(run, grid, strategy, run.round)
        if evaluation is not None:
            event["evaluation"] = evaluation
            run.evaluation = evaluation or run.evaluation or {}
            stopping.note(run, evaluation)
        event["rejected"] += [_named(run, r) for r in rejected if not run.central or r.code in SAYS_NO]
        event["seconds"] += time.monotonic() - started
    run.pending = False
    if run.held_out is not None:
        event["held_out"] = run.held_out_score = run.held_out(run.state)
    _note_privacy(run, event)
    run.save()
    run.settle()
    run.observe(event)


def _note_privacy(run: Run, event: Event) -> None:
    if run.epsilon is not None:
        event["privacy"] = {"row": {"epsilon": run.epsilon, "per_client": run.epsilon_per_client}}
    if run.central:
        event.setdefault("privacy", {})["client"] = {"epsilon": run.central.epsilon}


def _train(run: Run, grid: Grid, strategy: Strategy, nodes: list[int], server_round: int, event: Event) -> str | None:
    """Trains one round and moves the model on. Fills the event, and returns why the round failed, if it did."""
    started = time.monotonic()
    if run.central:
        asked = run.central.sample(nodes)
        needed = len(asked)
    else:
        asked, needed = cohort.choose(run, nodes, server_round)
    row, of_a_mean = run.federation.privacy.row, run.federation.strategy.name in OF_A_MEAN
    admission = Admission(
        asked=asked,
        server_round=server_round,
        metrics={WEIGHT, LOSS} if row is None else {WEIGHT},
        private=row is not None,
        limit=math.inf if row is None else row.epsilon,
        state=run.state,
        wire=run.federation.wire.dtype,
        keep=not of_a_mean,
        compare=run.central is None,
    )
    config = ConfigRecord({RUN: run.name})
    # A strategy that is shown no node would wait for one, and an empty cohort is a cohort.
    shown = CohortGrid(grid, asked or nodes)
    strategies.forget_model(strategy)
    messages = strategy.configure_train(server_round, records.from_state(run.state), config, shown)
    messages = [m for m in messages if m.metadata.dst_node_id in asked]
    replies = _admitted(run, grid, messages, admission, needed)
    loss, problem = _aggregate(run, grid, strategy, nodes, replies, admission)
    _remember(run, admission)
    rejected = sorted(admission.rejected, key=lambda r: r.node_id)
    if len(admission.nodes) < needed:
        late = f"no reply within {run.federation.strategy.round_timeout:g} s"
        rejected += [Rejection(node, LATE, late) for node in sorted(admission.silent)]
    for rejection in rejected:  # who said no to training is not asked again
        if rejection.code in SAYS_NO:
            run.gone[rejection.node_id] = rejection.code
    if run.central:
        # Who was sampled is a secret that the guarantee rests on; that someone is connected, or refuses, is not.
        rejected = [r for r in rejected if r.code in SAYS_NO]
        run.clients |= {run.name_of(node) for node in nodes}
    else:
        excused = {r.node_id for r in rejected if r.code == LOST}  # who left was not in vain asked
        enough = set(admission.silent) if len(admission.nodes) >= needed else set()
        cohort.note_strikes(run, asked, admission.nodes, excused | enough, server_round)
    hides = run.central is not None
    event |= {
        "clients": len(nodes) if hides else len(admission.nodes),
        "asked": len(nodes) if hides else len(asked),
        "train": {"loss": loss},
        "rejected": [_named(run, r) for r in rejected],
        "seconds": time.monotonic() - started,
    }
    _note_divergence(run, rejected, event)
    return problem


def _note_divergence(run: Run, rejected: list[Rejection], event: Event) -> None:
    """Only of what is told: under `privacy.client` that a reply diverged would tell that it was asked for."""
    run.diverged = any(r.diverged for r in rejected)
    if run.diverged and not run.advised:
        run.advised, event["advice"] = True, on_divergence(run.federation)


def _advice(run: Run) -> str:
    return f"; {on_divergence(run.federation)}" if run.diverged else ""


def _aggregate(
    run: Run, grid: Grid, strategy: Strategy, nodes: list[int], replies: Iterator[Message], admission: Admission
) -> tuple[float | None, str | None]:
    """Moves the model by the replies as they come. Returns the mean loss, and why the model did not move."""
    federation = run.federation
    server_round = admission.server_round
    if run.central:
        # No reply is an outcome like any other: a round that failed for want of replies would tell who was asked.
        state = run.central.mean(run.state, replies)
        run.charge()
        return None, _move(run, strategy, server_round, [_as_reply(grid, nodes[0], state, 1.0)])
    losses = _Losses()
    together: list[Message]
    if admission.keep:
        # In a fixed order: replies race, and sums of floats depend on their order.
        together = sorted((losses.hear(reply) for reply in replies), key=lambda reply: reply.metadata.src_node_id)
    else:
        fold = Fold(run.state)
        for reply in replies:
            losses.hear(reply)
            fold.add(records.to_state(reply.content.array_records[ARRAYS]), records.weight_of(reply.content))
        together = [_as_reply(grid, nodes[0], fold.mean(), fold.weight)] if len(fold) else []
    quorum = federation.strategy.min_clients
    if len(admission.nodes) < quorum:
        reasons = _some(sorted({r.reason for r in admission.rejected})) or "no reply in time"
        return None, f"{len(admission.nodes)} of at least {quorum} replies were admitted ({reasons})"
    loss = losses.mean if federation.privacy.row is None else None  # before a strategy takes replies apart
    problem = _move(run, strategy, server_round, together)
    return loss if problem is None else None, problem


def _some(reasons: list[str]) -> str:
    """The first few: those of many clients may differ by a number alone, and each is told with its client."""
    more = len(reasons) - MOST_REASONS
    return "; ".join(reasons[:MOST_REASONS]) + (f"; and {more} more reasons" if more > 0 else "")


def _move(run: Run, strategy: Strategy, server_round: int, replies: list[Message]) -> str | None:
    """Moves the model by the strategy's aggregate. Returns why it could not; the strategy then forgets it as well."""
    before = strategies.memory(strategy)
    try:
        arrays, _ = strategy.aggregate_train(server_round, replies)
        problem = None
    except (AggregationError, InconsistentMessageReplies) as error:
        arrays, problem = None, f"aggregation failed: {error}"
    state = _like(arrays, run.state)
    if state is None:
        strategies.restore(strategy, before)
        return problem or "aggregation gave no model, or one with NaN or infinite values"
    run.state = state
    return None


def _as_reply(grid: Grid, node: int, state: State, weight: float) -> Message:
    """A mean as the one reply that the strategy sees."""
    metrics = MetricRecord({WEIGHT: weight})
    return grid.create_message(RecordDict({ARRAYS: records.from_state(state), METRICS: metrics}), "train", node, "")


def _evaluate(run: Run, grid: Grid, strategy: Strategy, server_round: int) -> tuple[Metrics | None, list[Rejection]]:
    """Lets every client that can be asked score the model. None if none answers, and no metrics (`{}`) if those who do
    have no rows to score it on."""
    nodes = cohort.present(run, grid)
    if not nodes:
        return None, []
    config = ConfigRecord({RUN: run.name})
    schema, row = run.federation.data_schema, run.federation.privacy.row
    arrays = records.from_state(run.state)
    messages = list(strategy.configure_evaluate(server_round, arrays, config, CohortGrid(grid, nodes)))
    admission = Admission(
        asked=nodes,
        server_round=server_round,
        metrics={WEIGHT, COUNTS},
        private=row is not None,
        limit=math.inf if row is None else row.epsilon,
        counts=count_size(schema),
    )
    for _ in _admitted(run, grid, messages, admission, len(nodes)):
        pass
    # In a fixed order: sums of floats depend on theirs.
    admitted = sorted(admission.admitted, key=lambda reply: reply.metadata.src_node_id)
    _remember(run, admission)
    if run.central:
        noisy = run.central.counts(admitted)
        run.charge()
        return metrics_of(noisy, schema), admission.rejected
    if not admitted:
        return None, admission.rejected
    total = strategy.aggregate_evaluate(server_round, admitted)
    assert total is not None, "strategies sum the counts of at least one reply"
    return metrics_of(np.asarray(total[COUNTS]), schema), admission.rejected


def _admitted(
    run: Run, grid: Grid, messages: Iterable[Message], admission: Admission, needed: int
) -> Iterator[Message]:
    """Sends messages and yields the replies that count, as they come, until there are as many as are needed."""
    sent = list(messages)
    for message in sent:
        message.metadata.group_id = str(admission.server_round)
    timeout = run.federation.strategy.round_timeout
    if not isinstance(grid, RunGrid):  # one of Flower's own
        for reply in filter(admission.take, grid.send_and_receive(sent, timeout=timeout)):
            yield from admission.weigh(reply)
    else:
        with closing(grid.stream(sent, timeout=timeout)) as replies:
            for reply in filter(admission.take, replies):
                yield from admission.weigh(reply)
                if len(admission.nodes) >= needed:
                    break
    yield from admission.release()


def _remember(run: Run, admission: Admission) -> None:
    """Keeps who took part, and what clients stated."""
    if not run.central:
        run.clients |= {run.name_of(node) for node in admission.nodes}
    if run.hides_cohorts:
        return  # a client's figures grow when it is asked
    for node_id, statement in admission.statements.items():
        run.statements[run.name_of(node_id)] = statement


class _Losses:
    """The mean loss of a row over the replies, whatever their order."""

    def __init__(self) -> None:
        self._heard: list[tuple[float, float]] = []

    def hear(self, reply: Message) -> Message:
        if (loss := reply.content.metric_records[METRICS].get(LOSS)) is not None:
            self._heard.append((records.weight_of(reply.content), float(loss)))  # type: ignore[arg-type]  # one number, as admitted
        return reply

    @property
    def mean(self) -> float:
        return math.fsum(w * loss for w, loss in self._heard) / math.fsum(w for w, _ in self._heard)


def _like(arrays: ArrayRecord | None, state: State) -> State | None:
    """The aggregated arrays in the model's own types (some strategies compute in float64), if all are finite."""
    if arrays is None or list(arrays) != list(state):
        return None
    new = {name: arrays[name].numpy().astype(state[name].dtype) for name in state}
    return new if is_finite(new) else None


def _named(run: Run, rejection: Rejection) -> dict[str, str]:
    kinds = {REFUSED: "refused", BUDGET_EXHAUSTED: "budget_exhausted", LOST: "lost", LATE: "late"}
    # A reason may tell what was spent, or when the last round was, and so when the client was asked.
    reason = "its reason is not told, since it could tell when it was asked" if run.hides_cohorts else rejection.reason
    return {
        "client": run.name_of(rejection.node_id),
        "kind": kinds.get(rejection.code, "rejected"),
        "reason": reason,
    }
