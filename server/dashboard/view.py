"""What a page shows of a run, by its events and by who is there.

It tells what an operator may know (`Watch` in server/observers/status.py), and nothing else: events leave out what
`privacy.client` hides, and what a client is doing goes through `Disclosure.activity`. All text is made fit to be shown.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from common.document.federation import Federation
from common.text import shown
from server.dashboard import cards, lines
from server.dashboard.lines import EPSILONS, Line
from server.report import facts
from server.rounds.disclosure import Disclosure
from server.rounds.events import (
    TERMINATED,
    Ended,
    Event,
    Refused,
    Resumed,
    RoundEnded,
    Standing,
    Started,
    State,
    Waiting,
    after,
)

MOST_ROWS = 200  # of a table
PACE_ROUNDS = 20  # the last ones, by which the time left is told
STEADY_S = 2.0  # two looks at when a client was last heard may differ by this, and mean the same
FIRST = ("refused", "away", "joining")  # clients that may need someone's attention

Clients = dict[str, tuple[str, float, str]]  # as `Sessions.describe` tells: state, seconds since heard, reason


@dataclass
class Said:
    """What a client's replies, or its refusal, came to."""

    rounds: int = 0
    last: int = 0  # round; 0 is none in particular
    reason: str = ""


class View:
    """Give it every event with `take`, and who is there with `look`; `whole` and `news` are what pages are told."""

    def __init__(self, federation: Federation, run: str) -> None:
        self.federation, self.run = federation, run
        self.standing = Standing(rounds=federation.training.rounds)
        self.began: float | None = None  # seconds since 1970, like the two below
        self.told_at: float | None = None  # when the last round ended
        self.ended: float | None = None
        self.loss: float | None = None
        self.over = False  # will no server go on with it?
        self.counts: Counter[str] = Counter()  # clients by what they are doing
        self._disclosure = Disclosure.of(federation)
        self._pace: deque[float] = deque(maxlen=PACE_ROUNDS + 1)  # when rounds ended, by the monotonic clock
        keys = [line["key"] for chart in lines.charts(federation) for line in chart["lines"]]
        self._lines = {key: Line() for key in keys}
        self._refusals: dict[tuple[str, str], Said] = {}
        self._clients: list[list[Any]] = []  # name, state, away since, strikes, reason
        self._since: dict[str, float] = {}
        self._told: dict[str, Any] = {}

    # What happens

    def take(self, event: Event, at: float | None = None) -> None:
        """An event, and when it happened by the monotonic clock; None for one of a server before this one."""
        self.standing = after(self.standing, event)
        match event:
            case Started() | Resumed():
                self.began = self.began or event.time
                self.over, self.ended = False, None
                self._pace.clear()
                if isinstance(event, Resumed):  # later rounds are made again
                    for line in self._lines.values():
                        line.cut(event.round + 1)
            case Waiting():
                self._pace.clear()  # how long clients stay away says nothing about rounds
            case Refused():
                self._refusals[event.client, event.kind] = Said(reason=event.reason)
            case RoundEnded():
                self._take_round(event, at)
            case Ended():
                self.over, self.ended = event.reason != TERMINATED, event.time

    def _take_round(self, event: RoundEnded, at: float | None) -> None:
        for rejected in event.rejected:
            said = self._refusals.setdefault((rejected.client, rejected.kind), Said())
            said.rounds += event.round != said.last  # after a restart one may be told again
            said.last, said.reason = event.round, rejected.reason
        self.told_at = event.time
        if at is not None:
            self._pace.append(at)
        for unit, spent in event.privacy.items():
            self._lines[EPSILONS[unit]].add(event.round, spent["epsilon"])
        if event.failed:
            return
        self.loss = event.loss
        if event.loss is not None:
            self._lines[lines.LOSS].add(event.round, event.loss)
        for scores, first, second in (
            (event.evaluation, lines.CLIENTS, lines.SECOND_CLIENTS),
            (event.held_out, lines.HELD_OUT, lines.SECOND_HELD_OUT),
        ):
            if (score := facts.score_of(scores, self.federation)) is not None:
                ends = () if score.low is None or score.high is None else (score.low, score.high)
                self._lines[first].add(event.round, score.value, *ends)
            if scores and (name := lines.second_metric(self.federation)) in scores:
                self._lines[second].add(event.round, scores[name])

    @property
    def ends(self) -> float | None:
        """When the run may be expected to end, in seconds since 1970; None where nothing tells yet."""
        standing = self.standing
        if self.told_at is None or standing.state != State.RUNNING or len(self._pace) < 2:
            return None
        a_round = (self._pace[-1] - self._pace[0]) / (len(self._pace) - 1)
        return self.told_at + a_round * (standing.rounds - standing.round)

    def look(self, clients: Clients, now: float) -> None:
        """Who is there, at `now` (seconds since 1970)."""
        rows, self.counts = [], Counter()
        for name, (doing, seen, why) in clients.items():
            state, seen = self._disclosure.activity(doing, seen)
            self.counts[state] += 1
            reason = self.standing.reasons.get(name, "")
            if not self._disclosure.hides_cohorts:  # else only what an event may tell
                reason = why or reason
            away = self._steady(name, now - seen) if state == "away" else None
            rows.append([name, state, away, self.standing.strikes.get(name, 0), shown(reason)])
        self._clients = sorted(rows, key=lambda row: (row[1] not in FIRST, row[0]))

    def _steady(self, name: str, since: float) -> float:
        """When a client was last heard, the same at each look, so that pages are told nothing new."""
        before = self._since.get(name, 0.0)
        if abs(before - since) > STEADY_S:
            self._since[name] = before = round(since, 1)
        return before

    # What pages are told

    def whole(self) -> dict[str, Any]:
        """All there is."""
        federation = self.federation
        return {
            "run": {"name": federation.name, "run": self.run, "fingerprint": federation.fingerprint},
            "charts": lines.charts(federation),
            "lines": {key: line.points for key, line in self._lines.items()},
            **self._parts(),
        }

    def news(self) -> dict[str, Any]:
        """What is new since this was asked last; {} if nothing is. `more` has for a line how many of its points stay,
        and those that come after them."""
        parts = self._parts()
        told = {name: part for name, part in parts.items() if self._told.get(name) != part}
        self._told = parts
        for key, line in self._lines.items():
            if (more := line.news()) is not None:
                told.setdefault("more", {})[key] = more
        return told

    def _parts(self) -> dict[str, Any]:
        said: list[list[Any]] = [
            [client, kind.replace("_", " "), said.rounds, said.last, shown(said.reason)]
            for (client, kind), said in self._refusals.items()
        ]
        said.sort(key=lambda row: (-row[3], row[0]))
        return {
            "state": {"over": self.over, "alarm": shown(cards.alarm(self.standing), limit=1000)},
            "cards": cards.cards(self),
            "clients": {"rows": self._clients[:MOST_ROWS], "of": len(self._clients)},
            "refusals": {"rows": said[:MOST_ROWS], "of": len(said)},
        }
