"""What a tracker is given of a run: its document as params, and each round's event as scalars.

All of it stands in the run folder: what may not be told of a run (server/rounds/disclosure.py) is not tracked either.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from common.document.federation import Federation
from server.rounds.events import RoundEnded, Status

Param = str | int | float | bool

COMPLETE = "round/complete"  # the number of a round that moved the model: by the last one a tracker knows how far it is
LONGEST_NAME = 250  # characters, which is as many as MLflow takes


class Tracker(Protocol):
    """One run in a tracker, to write. Each method raises `OutputError` or `ConnectionFailed` where that fails.

    Times are seconds since 1970.
    """

    place: str  # where a person finds it
    done: int  # the last complete round that it holds; 0 if none

    def params(self, told: Mapping[str, Param], *, time: float) -> None:
        """The run's settings; once for a run, later ones are passed over."""

    def scalars(self, told: Mapping[str, float], *, step: int, time: float) -> None:
        """Figures of round `step`."""

    def close(self, status: Status, *, time: float) -> None:
        """How the run ended. It may be opened again, if the run goes on."""


def params_of(federation: Federation) -> dict[str, Param]:
    """A document's settings by their dotted names, lists as JSON, and its fingerprint."""
    told = {named(*path, by="."): value for path, value in _leaves(json.loads(federation.canonical))}
    params = {name: value if isinstance(value, Param) else json.dumps(value) for name, value in told.items()}
    return {**params, "fingerprint": federation.fingerprint}


def scalars_of(event: RoundEnded) -> dict[str, float]:
    """A round's figures: one that failed has told no loss and no scores, but may have cost privacy."""
    told: dict[str, Any] = {
        "round": {
            **({"failed": 1} if event.failed else {"complete": event.round}),
            "clients": event.clients,
            "asked": event.asked,
            "rejected": len(event.rejected),
        },
        "seconds": {"round": event.seconds, "waiting": event.waiting, **event.times},
        "train": {"loss": event.loss},
        "evaluation": event.evaluation or {},
        "held_out": event.held_out or {},
        "epsilon": {unit: spent["epsilon"] for unit, spent in event.privacy.items()},
        "epsilon_per_client": {unit: spent.get("per_client", {}) for unit, spent in event.privacy.items()},
        "energy": event.energy,
    }
    return {named(*path): float(value) for path, value in _leaves(told) if _is_number(value)}


def named(*path: str, by: str = "/") -> str:
    """One name for the parts of a path, the same in each tracker.

    Parts may be names of columns, classes and clients. What is no letter, digit, underscore, dot, blank or hyphen is
    written as -HEX-, so that no two become one.
    """
    name = by.join(_plain(part) for part in path)
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 17]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _plain(part: str) -> str:
    kept = re.sub(r"[^\w. -]|-(?=[0-9a-f]+-)", lambda found: f"-{ord(found[0]):x}-", part)
    return kept if kept.strip(".") else "-".join(["", *(f"{ord(c):x}" for c in part), ""])  # "..", as a path, leads up


def _leaves(told: Mapping[str, Any], *above: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in told.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, *above, str(name))
        else:
            yield (*above, str(name)), value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
