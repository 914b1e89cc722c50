"""What happens in a run, each a value of its own kind, and how the run stands after it.

An event is a line of events.jsonl, and what observers are given. Whoever wants to know how a run goes reduces its
events with `after`: progress, `cloister status`, Prometheus, result.json, and whoever reads a run folder later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar, Literal

from common.model.energy import Energy, sum_of
from common.model.scores import Scores

Status = Literal["completed", "budget_exhausted", "stopped", "failed"]

# The reason of an end after which another server is to go on with the run.
TERMINATED = "terminated; `cloister serve --resume` goes on with the run"


@dataclass(frozen=True)
class Rejected:
    """A client whose reply did not count: `kind` is rejected, late, lost, refused or budget_exhausted."""

    client: str
    kind: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened, at `time` (seconds since 1970)."""

    KIND: ClassVar[str] = ""
    time: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As it stands in events.jsonl."""
        told = {**vars(self)}
        return {"event": self.KIND, **{k: v for k, v in told.items() if k != "time"}, "time": self.time}


@dataclass(frozen=True, kw_only=True)
class Serving(Event):
    """The server listens."""

    KIND = "serving"
    address: str


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """A run begins. `federation` is its document's fingerprint."""

    KIND = "start"
    run: str = ""
    federation: str = ""
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """A run goes on after its last complete round."""

    KIND = "resumed"
    round: int
    run: str = ""
    federation: str = ""
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Waiting(Event):
    """There are too few clients for a round."""

    KIND = "waiting"
    clients: int
    min_clients: int


@dataclass(frozen=True, kw_only=True)
class Refused(Event):
    """A client refuses the federation as a whole, or its owner's budget does not cover it: it will not be asked."""

    KIND = "refused"
    client: str
    kind: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class RoundEnded(Event):
    """A round that moved the model, or failed.

    `clients` is how many took part and `asked` how many were asked (under `privacy.client`, both are how many were
    there). `members` names them, if they are not too many. `loss` is the mean of a row's, where clients tell theirs.
    `privacy` is the epsilon so far for each protected unit, row or client. `strikes` counts, for each client, rounds in
    a row without a reply that counted. `times` splits `seconds`: clients at work, the longest transfer of a reply,
    aggregation, evaluation; where replies are hidden, so are they. `energy` is what clients say that their tasks took,
    joules and grams of CO2-equivalent, where the document asks and privacy allows.
    """

    KIND = "round"
    round: int
    rounds: int
    waiting: float = 0.0  # seconds, for enough clients
    clients: int = 0
    asked: int = 0
    members: tuple[str, ...] = ()
    loss: float | None = None
    rejected: tuple[Rejected, ...] = ()
    strikes: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    times: Mapping[str, float] = field(default_factory=dict)
    energy: Mapping[str, float] = field(default_factory=dict)
    evaluation: Scores | None = None
    held_out: Scores | None = None
    privacy: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    failed: str = ""  # why, if it did
    advice: str = ""  # what to try, if its training diverged

    def to_json(self) -> dict[str, Any]:
        told = super().to_json()
        told["rejected"] = [asdict(each) for each in self.rejected]
        told["members"] = list(self.members)
        for name in ("members", "strikes", "times", "energy", "privacy", "failed", "advice"):
            if not told[name]:
                del told[name]
        for name in ("evaluation", "held_out"):
            if told[name] is None:
                del told[name]
        return {("train" if k == "loss" else k): ({"loss": v} if k == "loss" else v) for k, v in told.items()}


@dataclass(frozen=True, kw_only=True)
class Ended(Event):
    """The run is over."""

    KIND = "end"
    status: Status
    reason: str = ""


def all_of(*listeners: Callable[[Event], None]) -> Callable[[Event], None]:
    """One listener that tells several, in this order."""

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell


_KINDS = {kind.KIND: kind for kind in (Serving, Started, Resumed, Waiting, Refused, RoundEnded, Ended)}


def from_json(told: Mapping[str, Any]) -> Event:
    """An event from its line. Raises LookupError, TypeError or ValueError if that is none."""
    kind = _KINDS[told["event"]]
    fields = {name: value for name, value in told.items() if name != "event"}
    if kind is RoundEnded:
        fields["loss"] = fields.pop("train", {}).get("loss")
        fields["rejected"] = tuple(Rejected(**one) for one in fields.get("rejected", ()))
        fields["members"] = tuple(fields.get("members", ()))
    return kind(**fields)


class State(StrEnum):
    """What a run is doing, or how it ended."""

    STARTING = "starting"
    WAITING = "waiting for clients"
    RUNNING = "running"
    COMPLETED = "completed"
    BUDGET_EXHAUSTED = "budget exhausted"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a run stands."""

    state: State = State.STARTING
    round: int = 0  # the last complete one
    rounds: int = 0
    waiting: Waiting | None = None  # what for, while it does
    problem: str = ""  # why the last round failed, if it did
    failures: int = 0  # rounds that failed
    clients: int = 0  # that took part in the last complete round
    strikes: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)  # of each client's last rejection or refusal
    refused: Mapping[str, str] = field(default_factory=dict)  # client -> the kind of its refusal
    evaluation: Scores | None = None  # the last one that counted a row; empty if none ever did
    held_out: Scores | None = None
    privacy: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    energy: Energy | None = None  # of all rounds so far, failed ones too; None where clients do not tell
    reason: str = ""  # why it ended


def after(standing: Standing, event: Event) -> Standing:
    """How a run stands after an event."""
    match event:
        case Started():
            return replace(standing, state=State.RUNNING, rounds=event.rounds)
        case Resumed():
            return replace(standing, state=State.RUNNING, round=event.round, rounds=event.rounds, reason="")
        case Waiting():
            return replace(standing, state=State.WAITING, waiting=event)
        case Refused():
            reasons = {**standing.reasons, event.client: event.reason}
            return replace(standing, refused={**standing.refused, event.client: event.kind}, reasons=reasons)
        case RoundEnded():
            return _after_round(standing, event)
        case Ended():
            return replace(standing, state=State(event.status.replace("_", " ")), waiting=None, reason=event.reason)
    return standing


def _after_round(standing: Standing, event: RoundEnded) -> Standing:
    again = not event.failed and event.round == standing.round
    refused = {r.client: r.kind for r in event.rejected if r.kind in ("refused", "budget_exhausted")}
    standing = replace(
        standing,
        state=State.RUNNING,
        waiting=None,
        rounds=event.rounds,
        problem=event.failed,
        strikes=event.strikes,
        reasons={**standing.reasons, **{r.client: r.reason for r in event.rejected}},
        refused={**standing.refused, **refused},
        privacy=event.privacy or standing.privacy,
        # After a restart the last complete round may be told again.
        energy=sum_of(standing.energy, Energy.of(event.energy) if event.energy and not again else None),
    )
    if event.failed:
        return replace(standing, failures=standing.failures + 1)
    evaluation, held_out = standing.evaluation, standing.held_out
    return replace(
        standing,
        round=event.round,
        clients=event.clients,
        evaluation=evaluation if event.evaluation is None else event.evaluation or evaluation or {},
        held_out=held_out if event.held_out is None else event.held_out,
    )
