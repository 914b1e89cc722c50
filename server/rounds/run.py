"""A run: what stays as it is while it goes, how far it has come, and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from common.document.federation import Federation
from common.model.scores import Scores
from common.model.weights import Weights, between
from common.privacy.statement import Statement
from server.rounds.client_privacy import ClientLevelDP, Spent
from server.rounds.disclosure import Disclosure
from server.rounds.events import Event, RoundEnded, Status
from server.rounds.strategies import Memory


@dataclass(kw_only=True)
class Progress:
    """How far a run has come: all that a restart needs, and what a checkpoint keeps."""

    weights: Weights
    average: Weights | None = None  # of the rounds' weights, if the document has one
    averaged: int = 0  # rounds that are in it
    round: int = 0  # the last complete one
    tried: int = 0  # the last one that was made, complete or failed
    event: RoundEnded | None = None  # what is told of it
    pending: bool = False  # is it trained, but not yet evaluated?
    evaluation: Scores | None = None
    held_out_score: Scores | None = None  # the last one that `held_out` gave
    best: float | None = None  # for early stopping
    stale: int = 0  # evaluations since then
    plateaus: dict[str, dict[str, Any]] = field(default_factory=dict)  # what server/rounds/plateau.py remembers
    advised: bool = False  # has it been told what to try when training diverges? Once is enough
    statements: dict[str, Statement] = field(default_factory=dict)
    clients: set[str] = field(default_factory=set)
    present: set[str] = field(default_factory=set)  # who was connected when the round began
    gone: dict[int, int] = field(default_factory=dict)  # node -> the code with which it said no to a task
    strikes: dict[int, int] = field(default_factory=dict)  # node -> rounds in a row without a reply that counts
    resting: dict[int, int] = field(default_factory=dict)  # node -> the round that asks it again
    memory: Memory = field(default_factory=dict)  # what the strategy remembers of earlier rounds
    spent: Spent | None = None  # with `privacy.client`: what has been released about a client, and the clip

    @property
    def model(self) -> Weights:
        """What is scored, kept and handed out: the average if there is one, else what the next round begins with."""
        return self.weights if self.average is None else self.average

    def advance(self, weights: Weights, *, forgetting: float | None) -> None:
        """A round has moved the weights. `forgetting` is `strategy.average`.

        The average of the weights w_1..w_t is sum of d^(t - i) w_i over the sum of d^(t - i), which is an exponential
        moving average without the bias of its start (Kingma and Ba 2015, arXiv:1412.6980, section 3). It follows from
        the rounds' models alone, so it costs no privacy.
        """
        self.weights = weights
        if forgetting is None:
            return
        self.averaged += 1
        before = self.average or weights
        part = (1.0 - forgetting) / (1.0 - forgetting**self.averaged)
        self.average = between(before, weights, part)


class Journal(Protocol):
    """Where a run is written down."""

    def save(self, run: Run) -> None:
        """Puts on disk what makes a restart continue from here."""

    def settle(self) -> None:
        """Lets clients forget their replies, which are in what was saved."""

    def charge(self, run: Run) -> None:
        """Writes down what has been released about whole clients, before it is told."""


class Unwritten:
    """The journal of a run of which nothing is kept."""

    def save(self, run: Run) -> None:
        pass

    def settle(self) -> None:
        pass

    def charge(self, run: Run) -> None:
        pass


@dataclass(kw_only=True)
class Run:
    """What the round loop works on."""

    federation: Federation
    name: str
    progress: Progress
    observe: Callable[[Event], None]
    journal: Journal = field(default_factory=Unwritten)
    name_of: Callable[[int], str] = str
    held_out: Callable[[Weights], Scores] | None = None  # scores the model on a table of the server's own
    client_privacy: ClientLevelDP | None = None  # samples and adds noise, if the federation protects whole clients
    start: Mapping[str, Any] = field(default_factory=dict)  # where its first model is from (server/folder/start.py)
    refused: dict[int, int] = field(default_factory=dict)  # node -> the code with which it refused to join

    @property
    def disclosure(self) -> Disclosure:
        """What may be told of it."""
        return Disclosure.of(self.federation)

    @property
    def epsilon(self) -> float | None:
        """What a row has paid, at most: the largest that any client has stated, or all that is planned."""
        row = self.federation.privacy.row
        if self.disclosure.hides_cohorts and row is not None:
            return row.epsilon
        return max((s.epsilon for s in self.progress.statements.values()), default=None)

    @property
    def epsilon_per_client(self) -> dict[str, float]:
        """What each client has stated, where that may be told."""
        return {name: s.epsilon for name, s in sorted(self.progress.statements.items())}


@dataclass(frozen=True)
class Ending:
    """How a run ended, and why."""

    status: Status
    reason: str = ""
