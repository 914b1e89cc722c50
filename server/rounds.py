"""The round loop: wait, sample, send, admit, aggregate, evaluate, save.

It drives Flower's public Strategy methods, so any Flower strategy works unchanged, but not Flower's own
`Strategy.start`, which cannot stop early, ends a run without a single reply as a success, and averages
whatever arrives.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies
from flwr.serverapp.strategy import Strategy

from common.errors import RunFailed
from common.federation import Federation
from common.metrics import Metrics, count_size, metrics_of
from common.state import State
from common.wire import records
from common.wire.records import ARRAYS, BUDGET_EXHAUSTED, COUNTS, LOSS, LOST, METRICS, REFUSED, RUN, WEIGHT
from server.admission import Admission, Rejection, Statement, admit
from server.central import CentralDP

Event = dict[str, Any]
Status = Literal["completed", "budget_exhausted", "stopped", "failed"]

POLL = 0.05  # seconds between looks at who is connected
SAYS_NO = (REFUSED, BUDGET_EXHAUSTED)


@dataclass
class Run:
    """A run as it stands: the model, and what its clients have said."""

    federation: Federation
    name: str
    state: State
    observe: Callable[[Event], None]
    save: Callable[[State, int], None]
    name_of: Callable[[int], str] = str
    held_out: Callable[[State], Metrics] | None = None  # scores the model on a table of the server's own
    central: CentralDP | None = None  # samples and adds noise, if the federation protects whole clients
    charge: Callable[[], None] = lambda: None  # writes down what `central` has charged, before it is released

    round: int = 0  # the last complete one
    status: Status = "failed"
    reason: str = ""
    evaluation: Metrics | None = None
    statements: dict[str, Statement] = field(default_factory=dict)
    clients: set[str] = field(default_factory=set)
    gone: dict[int, int] = field(default_factory=dict)  # node -> the code with which it said no

    @property
    def hides_cohorts(self) -> bool:
        """Must nobody learn who was asked? Then no figure of a single client is told: it grows when it is asked."""
        return self.central is not None and self.federation.strategy.fraction < 1

    @property
    def epsilon(self) -> float | None:
        """What a row has paid, at most: the largest that any client has stated, or all that is planned."""
        row = self.federation.privacy.row
        if self.hides_cohorts and row is not None:
            return row.epsilon
        return max((s["epsilon"] for s in self.statements.values() if "epsilon" in s), default=None)

    @property
    def epsilon_per_client(self) -> dict[str, float]:
        """What each client has stated, where that may be told."""
        if self.hides_cohorts:
            return {}
        return {name: s["epsilon"] for name, s in sorted(self.statements.items()) if "epsilon" in s}


def run_rounds(run: Run, grid: Grid, strategy: Strategy, *, wait_s: float | None = None) -> None:
    """Runs the federation's rounds, and leaves in `run` how they ended.

    Args:
        wait_s: seconds to wait for the quorum before each round; None waits for ever.

    Raises:
        RunFailed: too many failed rounds in a row, or no quorum within `wait_s`.
    """
    federation = run.federation
    rng = random.Random(f"{federation.training.seed}/sampling")
    failed = 0
    for server_round in range(run.round + 1, federation.training.rounds + 1):
        started = time.monotonic()
        present = _wait_for_quorum(run, grid, wait_s)
        if present is None:
            _end_by_budgets(run)
            return
        waited = time.monotonic()
        cohort = run.central.sample(present) if run.central else _sample(present, federation, rng)
        event: Event = {"event": "round", "round": server_round, "rounds": federation.training.rounds}
        admission, loss, problem = _train(run, grid, strategy, present, cohort, server_round)
        event |= {"clients": len(admission.admitted), "asked": len(cohort), "train": {"loss": loss}}
        rejected = list(admission.rejected)
        if run.central:
            # Who was sampled is a secret that the guarantee rests on; that someone is connected, or refuses, is not.
            event |= {"clients": len(present), "asked": len(present)}
            rejected = [r for r in rejected if r.code in SAYS_NO]
            run.clients |= {run.name_of(node) for node in present}
        if problem is None:
            failed = 0
            run.round = server_round
            run.save(run.state, server_round)
            if server_round in federation.evaluation_rounds:
                evaluation, not_counted = _evaluate(run, grid, strategy, server_round)
                rejected += [r for r in not_counted if not run.central or r.code in SAYS_NO]
                if evaluation is not None:
                    event["evaluation"] = run.evaluation = evaluation
            if run.held_out is not None:
                event["held_out"] = run.held_out(run.state)
        else:
            failed += 1
            event["failed"] = problem
        event["rejected"] = [_named(run, r) for r in rejected]
        if run.epsilon is not None:
            event["privacy"] = {"row": {"epsilon": run.epsilon, "per_client": run.epsilon_per_client}}
        if run.central:
            event.setdefault("privacy", {})["client"] = {"epsilon": run.central.epsilon}
        event["waiting"] = waited - started
        event["seconds"] = time.monotonic() - waited
        run.observe(event)
        if failed and _budgets_are_spent(run, grid):
            _end_by_budgets(run)
            return
        if failed >= federation.strategy.max_failed_rounds:
            raise RunFailed(f"{failed} rounds in a row failed; the last: {problem}")
    # A run whose last rounds failed has not trained for as many rounds as it says.
    if failed:
        raise RunFailed(f"the last of {federation.training.rounds} rounds failed: {problem}")
    run.status = "completed"


def _wait_for_quorum(run: Run, grid: Grid, wait_s: float | None) -> list[int] | None:
    """The nodes that can be asked, in a fixed order; None if spent budgets leave too few."""
    quorum = run.federation.strategy.min_clients
    started, told = time.monotonic(), -1
    while True:
        present = _present(run, grid)
        if len(present) >= quorum:
            return present
        if _budgets_are_spent(run, grid):
            return None
        if len(present) != told:
            told = len(present)
            run.observe({"event": "waiting", "clients": told, "min_clients": quorum})
        if wait_s is not None and time.monotonic() - started > wait_s:
            refused = f"; {len(run.gone)} refused to take part" if run.gone else ""
            raise RunFailed(f"after {wait_s:g} s, {told} of the {quorum} clients that a round needs are there{refused}")
        time.sleep(POLL)


def _present(run: Run, grid: Grid) -> list[int]:
    return [node for node in sorted(grid.get_node_ids()) if node not in run.gone]


def _budgets_are_spent(run: Run, grid: Grid) -> bool:
    """Are too few clients left, who would be enough had none of them spent its budget?"""
    left, quorum = len(_present(run, grid)), run.federation.strategy.min_clients
    spent = sum(code == BUDGET_EXHAUSTED for code in run.gone.values())
    return left < quorum <= left + spent


def _end_by_budgets(run: Run) -> None:
    run.status = "budget_exhausted"
    run.reason = "the clients that are left are fewer than min_clients, because budgets are spent"


def _sample(present: list[int], federation: Federation, rng: random.Random) -> list[int]:
    strategy = federation.strategy
    size = max(strategy.min_clients, round(strategy.fraction * len(present)))
    return sorted(rng.sample(present, min(size, len(present))))


def _train(
    run: Run, grid: Grid, strategy: Strategy, present: list[int], cohort: list[int], server_round: int
) -> tuple[Admission, float | None, str | None]:
    """Trains one round and moves the model on. Returns the replies, the mean loss, and why the round failed."""
    private = run.federation.privacy.row is not None
    config = ConfigRecord({RUN: run.name})
    # A strategy that is shown no node would wait for one, and an empty cohort is a cohort.
    shown = CohortGrid(grid, cohort or present)
    messages = strategy.configure_train(server_round, records.from_state(run.state), config, shown)
    messages = [m for m in messages if m.metadata.dst_node_id in cohort]
    replies = _exchange(grid, messages, server_round, run.federation)
    admission = admit(
        replies,
        asked=cohort,
        server_round=server_round,
        metrics={WEIGHT} if private else {WEIGHT, LOSS},
        private=private,
        state=run.state,
    )
    _remember(run, admission)
    for rejection in admission.rejected:  # who said no to training is not asked again
        if rejection.code in SAYS_NO:
            run.gone[rejection.node_id] = rejection.code
    if run.central:
        # No reply is an outcome like any other: a round that failed for want of replies would tell who was asked.
        return admission, None, _move(run, strategy, server_round, [_as_reply(run, grid, present[0], admission)])
    quorum = run.federation.strategy.min_clients
    if len(admission.admitted) < quorum:
        reasons = "; ".join(sorted({r.reason for r in admission.rejected})) or "no reply in time"
        return (
            admission,
            None,
            f"{len(admission.admitted)} of at least {quorum} replies were admitted ({reasons})",
        )
    # Flower's strategies may take replies apart, so what is needed of them is read first.
    loss = None if private else _mean_loss(admission.admitted)
    problem = _move(run, strategy, server_round, admission.admitted)
    return admission, loss if problem is None else None, problem


def _move(run: Run, strategy: Strategy, server_round: int, replies: list[Message]) -> str | None:
    """Moves the model by the strategy's aggregate. Returns why it could not."""
    try:
        arrays, _ = strategy.aggregate_train(server_round, replies)
    except (AggregationError, InconsistentMessageReplies) as error:
        return f"aggregation failed: {error}"
    state = _like(arrays, run.state)
    if state is None:
        return "aggregation gave no model, or one with NaN or infinite values"
    run.state = state
    return None


def _as_reply(run: Run, grid: Grid, node: int, admission: Admission) -> Message:
    """The noisy mean as the one reply that the strategy sees. Charged, durably, before anyone can see it."""
    assert run.central is not None
    state = run.central.mean(run.state, admission.admitted)
    run.charge()
    content = RecordDict({ARRAYS: records.from_state(state), METRICS: MetricRecord({WEIGHT: 1.0})})
    return grid.create_message(content, "train", node, "")


def _evaluate(run: Run, grid: Grid, strategy: Strategy, server_round: int) -> tuple[Metrics | None, list[Rejection]]:
    """Lets every client that can be asked score the model; there are no metrics if none answers."""
    present = _present(run, grid)
    if not present:
        return None, []
    config = ConfigRecord({RUN: run.name})
    schema = run.federation.data_schema
    arrays = records.from_state(run.state)
    messages = strategy.configure_evaluate(server_round, arrays, config, CohortGrid(grid, present))
    admission = admit(
        _exchange(grid, messages, server_round, run.federation),
        asked=present,
        server_round=server_round,
        metrics={WEIGHT, COUNTS},
        private=run.federation.privacy.row is not None,
        counts=count_size(schema),
    )
    _remember(run, admission)
    if run.central:
        noisy = run.central.counts(admission.admitted)
        run.charge()
        run.save(run.state, server_round)  # the model's file says what was charged
        return metrics_of(noisy, schema), admission.rejected
    if not admission.admitted:
        return None, admission.rejected
    total = strategy.aggregate_evaluate(server_round, admission.admitted)
    assert total is not None, "strategies sum the counts of at least one reply"
    return metrics_of(np.asarray(total[COUNTS]), schema), admission.rejected


def _exchange(grid: Grid, messages: Iterable[Message], server_round: int, federation: Federation) -> Iterable[Message]:
    sent = list(messages)
    for message in sent:
        message.metadata.group_id = str(server_round)
    replies = grid.send_and_receive(sent, timeout=federation.strategy.round_timeout)
    # In a fixed order: strategies shuffle whom they ask, replies race, and sums of floats depend on their order.
    return sorted(replies, key=lambda reply: reply.metadata.src_node_id)


def _remember(run: Run, admission: Admission) -> None:
    """Keeps who took part, and what clients stated."""
    if not run.central:
        run.clients |= {run.name_of(message.metadata.src_node_id) for message in admission.admitted}
    for node_id, statement in admission.statements.items():
        run.statements[run.name_of(node_id)] = statement


def _mean_loss(replies: list[Message]) -> float:
    metrics: list[MetricRecord] = [reply.content.metric_records[METRICS] for reply in replies]
    weights = [float(m[WEIGHT]) for m in metrics]  # type: ignore[arg-type]
    losses = [float(m[LOSS]) for m in metrics]  # type: ignore[arg-type]
    return float(np.average(losses, weights=weights))


def _like(arrays: ArrayRecord | None, state: State) -> State | None:
    """The aggregated arrays in the model's own types (some strategies compute in float64), if all are finite."""
    if arrays is None or list(arrays) != list(state):
        return None
    new = {name: arrays[name].numpy().astype(state[name].dtype) for name in state}
    return new if all(np.isfinite(value).all() for value in new.values()) else None


def _named(run: Run, rejection: Rejection) -> dict[str, str]:
    kind = {REFUSED: "refused", BUDGET_EXHAUSTED: "budget_exhausted", LOST: "lost"}.get(rejection.code, "rejected")
    # A reason may tell what was spent, or when the last round was, and so when the client was asked.
    reason = "its reason is not told, since it could tell when it was asked" if run.hides_cohorts else rejection.reason
    return {"client": run.name_of(rejection.node_id), "kind": kind, "reason": reason}


class CohortGrid(Grid):
    """A grid on which only a round's cohort can be seen, so that a strategy that asks everyone asks the cohort."""

    def __init__(self, grid: Grid, cohort: list[int]) -> None:
        self._grid, self._cohort = grid, cohort

    def get_node_ids(self) -> Iterable[int]:
        return self._cohort

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self._grid.send_and_receive(messages, timeout=timeout)
