"""A run as it stands: the model, what its clients have said, and how it can be told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from common.document.federation import Federation
from common.model.scores import Metrics
from common.model.weights import State
from server.rounds.admission import Statement
from server.rounds.client_privacy import CentralDP

Event = dict[str, Any]
Status = Literal["completed", "budget_exhausted", "stopped", "failed"]


def _nothing() -> None:
    pass


@dataclass
class Run:
    """What the round loop works on. The fields of the last group are what a checkpoint keeps."""

    federation: Federation
    name: str
    state: State
    observe: Callable[[Event], None]
    save: Callable[[], None] = _nothing  # puts on disk what makes a restart continue from here
    settle: Callable[[], None] = _nothing  # lets clients forget their replies, which are in what was saved
    charge: Callable[[], None] = _nothing  # writes down what `central` has charged, before it is released
    name_of: Callable[[int], str] = str
    held_out: Callable[[State], Metrics] | None = None  # scores the model on a table of the server's own
    central: CentralDP | None = None  # samples and adds noise, if the federation protects whole clients

    status: Status = "failed"
    reason: str = ""
    diverged: bool = False  # did training at a client leave all bounds in the last round?
    advised: bool = False  # has it been told what to try then? Once is enough
    gone: dict[int, int] = field(default_factory=dict)  # node -> the code with which it said no
    strikes: dict[int, int] = field(default_factory=dict)  # node -> rounds in a row without a reply that counts
    resting: dict[int, int] = field(default_factory=dict)  # node -> the round that asks it again

    round: int = 0  # the last complete one
    tried: int = 0  # the last one that was made, complete or failed
    event: Event | None = None  # what is told of it
    pending: bool = False  # is it trained, but not yet evaluated?
    evaluation: Metrics | None = None
    held_out_score: Metrics | None = None  # the last one that `held_out` gave
    best: float | None = None  # for early stopping
    stale: int = 0  # evaluations since then
    statements: dict[str, Statement] = field(default_factory=dict)
    clients: set[str] = field(default_factory=set)
    present: set[str] = field(default_factory=set)  # who was connected when the round began

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
