"""A run's events as a person sees them: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from common.text import duration
from server.rounds.events import Ended, Event, Refused, RoundEnded, Standing, Waiting, after

NO_ROWS = "no validation rows"
_SAYS = {"refused": "refuses to take part", "budget_exhausted": "cannot take part", "failed": "could not join"}
LINES = 10  # of progress that stay on the screen
PACE_S = 5.0


class ProgressDisplay:
    """Give it every event of a run; use it as a context so that the terminal is left clean."""

    def __init__(self, console: Console, *, limits: Mapping[str, float]) -> None:
        """`limits` is the epsilon that the federation allows for each unit it protects: row, client."""
        self._console, self._limits = console, limits
        self._standing = Standing()
        self._first: tuple[int, float] | None = None  # the first round that was seen, and when it ended
        self._pace = Pace()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[left]}"),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("starting", total=None, left="")

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        self._standing = after(self._standing, event)
        if isinstance(event, Waiting):
            self._say(f"waiting for clients: {event.clients} of {event.min_clients}")
        elif isinstance(event, Refused):
            self._warn(f"{event.client} {_SAYS[event.kind]}: {event.reason}")
        elif isinstance(event, RoundEnded):
            self._round(event)
        elif isinstance(event, Ended):
            self.__exit__()

    def trained(self, done: int, asked: int) -> None:
        """Tell it how many clients of a round are trained, of how many that were asked, as a simulation goes."""
        self._pace.note(done, time.monotonic())
        if self._bar is not None and (pace := self._pace.updates) is not None:
            rounds = self._standing.rounds - self._standing.round
            left = duration(max(rounds * asked - done, 0) / pace) if pace else "?"
            self._bar.update(self._task, left=f"{self._pace} {left} left")

    def _warn(self, text: str, style: str = "yellow") -> None:
        """A line that stays, above the live one."""
        self._console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            self._console.print(text, highlight=False, soft_wrap=True)

    def _round(self, event: RoundEnded) -> None:
        done, rounds = event.round, event.rounds
        self._first = self._first or (done, time.monotonic())
        for rejection in event.rejected:
            self._warn(f"round {done}: {rejection.client} {rejection.kind}: {rejection.reason}")
        if event.advice:
            self._warn(event.advice)
        if event.failed:
            self._warn(f"round {done}: failed: {event.failed}", "red")
        line = self._line(event)
        if done % max(1, rounds // LINES) == 0 or done == rounds:
            self._console.print(line, highlight=False, soft_wrap=True)
        if self._bar is not None:
            self._bar.update(self._task, description=line, completed=done, total=rounds)
            if self._pace.updates is None:
                self._bar.update(self._task, left=self._left(done, rounds))

    def _left(self, done: int, rounds: int) -> str:
        """The time left, by the rounds after the first, which also pays for starting up."""
        assert self._first is not None
        first, ended = self._first
        if done == first:
            return ""
        return f"{duration((time.monotonic() - ended) / (done - first) * (rounds - done))} left"

    def _line(self, event: RoundEnded) -> str:
        parts = [f"round {event.round:>{len(str(event.rounds))}}/{event.rounds}", f"clients {event.clients}"]
        if event.loss is not None:
            parts.append(f"loss {event.loss:.4f}" if event.loss >= 0.001 else f"loss {event.loss:.2g}")
        if (evaluation := self._standing.evaluation) is not None:
            parts.append(headline(evaluation))
        if event.held_out:
            parts.append(f"held out: {headline(event.held_out)}")
        for unit, spent in event.privacy.items():
            parts.append(f"epsilon of a {unit} {spent['epsilon']:.2f} of {self._limits[unit]:g}")
        if self._bar is None and self._pace.updates is not None:
            parts.append(str(self._pace))
        return "  ".join(parts)


class Pace:
    """How many clients are trained a second, in the last few seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()  # when, and how many by then
        self._total = self._of_round = 0

    def note(self, done: int, now: float) -> None:
        """`done` of a round are trained; fewer than before means that another round has begun."""
        self._total += done - self._of_round if done > self._of_round else done
        self._of_round = done
        self._seen.append((now, self._total))
        while now - self._seen[1 if len(self._seen) > 1 else 0][0] > PACE_S:
            self._seen.popleft()

    @property
    def updates(self) -> float | None:
        """Client updates a second; None before there were two moments to compare."""
        (began, before), (ended, now) = (self._seen[0], self._seen[-1]) if self._seen else ((0.0, 0), (0.0, 0))
        return (now - before) / (ended - began) if ended > began else None

    def __str__(self) -> str:
        pace = self.updates or 0.0
        return f"{pace:,.0f} client updates/s" if pace >= 10 else f"{pace:.1f} client updates/s"


def headline(metrics: dict[str, Any]) -> str:
    """The one figure that says most."""
    if not metrics:
        return NO_ROWS
    if "accuracy" in metrics:
        return f"accuracy {100 * metrics['accuracy']:.1f} %"
    return f"mean absolute error {metrics['mae']:.4g}{scaled(metrics, 'mae')}"


def scaled(metrics: dict[str, Any], name: str) -> str:
    """The figure as a share of the range between the bounds of the target."""
    return f" ({100 * metrics['scaled'][name]:.3g} % of its range)" if "scaled" in metrics else ""
