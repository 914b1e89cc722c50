"""Who is there, and whom a round asks."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.errors import RunFailed
from common.wire.records import BUDGET_EXHAUSTED
from server.rounds.disclosure import KINDS
from server.rounds.events import Refused, Waiting
from server.rounds.run import Run
from server.rounds.run_grid import RunGrid

POLL = 0.02  # seconds between looks at who is connected
LONGEST_GRACE_S = 60.0  # how long a resumed run waits for the clients that it had
FEW_STRIKES = 3  # so many in a row, and a client is asked less often
LONGEST_REST = 64  # rounds


def wait_for_quorum(run: Run, grid: Grid, wait_s: float | None) -> list[int] | None:
    """The nodes that can be asked, in a fixed order; None if spent budgets leave too few.

    Raises:
        RunFailed: there is no quorum within `wait_s`.
    """
    quorum = run.federation.strategy.min_clients
    started, told = time.monotonic(), -1
    while True:
        nodes = present(run, grid)
        note_refusals(run, grid)
        if len(nodes) >= quorum:
            return nodes
        if budgets_are_spent(run, grid):
            return None
        if len(nodes) != told:
            told = len(nodes)
            run.observe(Waiting(clients=told, min_clients=quorum))
        if wait_s is not None and time.monotonic() - started > wait_s:
            if budgets_are_spent(run, grid, nobody_comes=True):
                return None
            said = _who_said_no(run)
            raise RunFailed(f"after {wait_s:g} s, {told} of the {quorum} clients that a round needs are there{said}")
        time.sleep(POLL)


def note_refusals(run: Run, grid: Grid) -> None:
    """Tells of each client that refuses to join, where the grid knows. Who joins after all has changed its mind."""
    if not isinstance(grid, RunGrid):
        return
    for node in run.refused.keys() & set(grid.get_node_ids()):
        del run.refused[node]
    for refusal in grid.refusals():
        if refusal.node_id not in run.refused:
            run.refused[refusal.node_id] = refusal.code
            named = run.disclosure.named(refusal, run.name_of)
            run.observe(Refused(client=named.client, kind=_kind(refusal.code), reason=named.reason))


def _who_said_no(run: Run) -> str:
    """Their names, with the public kind of what they said."""
    said = {run.name_of(node): _kind(code) for node, code in {**run.refused, **run.progress.gone}.items()}
    return "; " + ", ".join(f"{name}: {kind}" for name, kind in sorted(said.items())) if said else ""


def _kind(code: int) -> str:
    return KINDS.get(code, "failed")


def wait_for_those_who_were_here(run: Run, grid: Grid) -> None:
    """After a restart, gives the clients that were connected time to come back, so that a round asks them all."""
    deadline = time.monotonic() + min(run.federation.strategy.round_timeout, LONGEST_GRACE_S)
    while time.monotonic() < deadline:
        if run.progress.present <= {run.name_of(node) for node in grid.get_node_ids()}:
            return
        time.sleep(POLL)


def present(run: Run, grid: Grid) -> list[int]:
    """The nodes that are connected and have not said no, in a fixed order."""
    gone = run.progress.gone
    return [node for node in sorted(grid.get_node_ids()) if node not in gone]


def budgets_are_spent(run: Run, grid: Grid, *, nobody_comes: bool = False) -> bool:
    """Are too few clients left, who would be enough had none of them spent its budget?

    Of those who refused to join, only such count as have taken part before: in place of the others somebody may come
    yet, unless `nobody_comes`.
    """
    left, quorum = len(present(run, grid)), run.federation.strategy.min_clients
    return left < quorum <= left + len(_spent(run, nobody_comes=nobody_comes))


def _spent(run: Run, *, nobody_comes: bool) -> set[int]:
    """The nodes whose budgets are spent."""
    known = {n for n in run.refused if nobody_comes or run.name_of(n) in run.progress.clients}
    said = {**{node: run.refused[node] for node in known}, **run.progress.gone}
    return {node for node, code in said.items() if code == BUDGET_EXHAUSTED}


def whose_budgets_are_spent(run: Run) -> list[str]:
    """Their names."""
    return sorted(run.name_of(node) for node in _spent(run, nobody_comes=True))


@dataclass(frozen=True)
class Cohort:
    """Whom a round asks."""

    nodes: list[int]  # who is there, in a fixed order
    asked: list[int]  # of those, in the order in which they are asked
    needed: int  # so many replies, and the round goes on without the others


def choose(run: Run, nodes: list[int], server_round: int) -> Cohort:
    """Whom a round asks, of the nodes that are there.

    Drawn from the seed and the round alone, so that a run which was resumed asks whom it would have asked.
    """
    if run.client_privacy is not None:
        sampled = run.client_privacy.sample(nodes)
        return Cohort(nodes, sampled, len(sampled))
    strategy = run.federation.strategy
    resting = run.progress.resting
    awake = [node for node in nodes if resting.get(node, 0) <= server_round] if resting else nodes
    if len(awake) < strategy.min_clients:
        awake = nodes
    needed = min(max(strategy.min_clients, round(strategy.fraction * len(awake))), len(awake))
    asked = min(math.ceil(needed * (1 + strategy.over_selection)), len(awake))
    rng = random.Random(f"{run.federation.training.seed}/sampling/{server_round}")
    return Cohort(nodes, rng.sample(awake, asked), needed)


def note_strikes(run: Run, cohort: Iterable[int], counted: set[int], excused: set[int], server_round: int) -> None:
    """Lets a client rest that did not answer several times in a row: one that never answers must not hold up all
    rounds until their deadline. It is asked again after 2, 4, 8... rounds."""
    for node in cohort:
        if node in counted:
            run.progress.strikes.pop(node, None)
            run.progress.resting.pop(node, None)
        elif node not in excused:
            run.progress.strikes[node] = strikes = run.progress.strikes.get(node, 0) + 1
            if strikes >= FEW_STRIKES:
                run.progress.resting[node] = server_round + 1 + min(2 ** (strikes - FEW_STRIKES + 1), LONGEST_REST)


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
