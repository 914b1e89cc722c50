"""A run's events as a person sees them: a live line on a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from cloister.report import after_run
from cloister.terminal import tell
from common.model.energy import Energy
from common.model.gaps import HEADLINES, size_of
from common.text import duration
from server.rounds.events import Ended, Event, Refused, RoundEnded, Standing, Waiting, after

NO_ROWS = "no validation rows"
_SAYS = {"refused": "refuses to take part", "budget_exhausted": "cannot take part", "failed": "could not join"}
LINES = 10  # of progress that stay on the screen
MOST_ROWS = 10  # of clients in the closing table; of more, it tells the least, the median and the largest
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
    return f"mean absolute error {metrics['mae']:.4g}{_scaled(metrics, 'mae')}"


def _scaled(metrics: dict[str, Any], name: str) -> str:
    """The figure as a share of the range between the bounds of the target."""
    return f" ({100 * metrics['scaled'][name]:.3g} % of its range)" if "scaled" in metrics else ""


def finish(result: dict[str, Any], folder: Path, *, no_report: bool = False) -> None:
    """Shows how a run ended, and ends the process as it did."""
    show_end(result, folder, no_report=no_report)
    leave(result)


def show_end(result: dict[str, Any], folder: Path, *, no_report: bool) -> None:
    """Shows the closing table, and writes the run's report."""
    print_result(result, folder)
    for line in () if no_report else after_run(folder):
        tell(Console(stderr=line.startswith("warning: ")), line)


def leave(result: dict[str, Any]) -> None:
    """A run that was interrupted exits as interrupted programs do."""
    if result["status"] == "stopped":
        raise typer.Exit(143 if result["reason"].startswith("terminated") else 130)


def print_result(result: dict[str, Any], folder: Path) -> None:
    """Shows how a run ended, on stdout."""
    console = Console()
    console.print(f"{result['status'].replace('_', ' ')} after {result['rounds']} rounds", highlight=False)
    console.print(_summary(result))
    console.print(f"run folder: {folder}", highlight=False, soft_wrap=True)


def _summary(result: dict[str, Any]) -> Table:
    """The closing table of a run, from what result.json holds."""
    table = Table(show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    noisy = " (from noisy counts)" if any(result["privacy"].values()) else ""
    for name, value in _figures(result["evaluation"] or {}):
        table.add_row(name + noisy, value)
    if result["evaluation"] == {}:
        table.add_row("evaluation", NO_ROWS)
    for target, told in (result["evaluation"] or {}).get("tasks", {}).items():
        for name, value in _figures(told)[:1] or [("too few rows" if noisy else "no row has it", "")]:
            table.add_row(f"{escape(target)}: {name}{noisy if value else ''}", value)
    for name, value in _gaps(result["evaluation"] or {}):
        table.add_row(name, value)
    for name, value in _held_out(result["held_out"] or {}):
        table.add_row(name, value)
    if (row := result["privacy"]["row"]) is not None:
        for name, epsilon in _epsilons(row["per_client"]):
            table.add_row(name, f"{epsilon:.2f}")
        if row["epsilon"] is not None:
            table.add_row("epsilon of a row, at most (whole plan)", f"{row['epsilon']:.2f}")
        table.add_row("delta", f"{row['delta']:g}")
    if (unit := result["privacy"]["client"]) is not None:
        table.add_row("epsilon of a whole client", f"{unit['epsilon']:.2f}")
        table.add_row("delta of a client", f"{unit['delta']:g}")
    if (energy := result.get("energy")) is not None:
        table.add_row("energy of clients", str(Energy.of(energy)))
    table.add_row("clients", str(len(result["clients"])))
    for name, value in _refused(result["refused"]):
        table.add_row(name, value)
    table.add_row("time", duration(result["seconds"]))
    if result["reason"]:
        table.add_row("reason", escape(result["reason"]))
    return table


def _gaps(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """How far groups are apart, where the schema declares any: in accuracy or error, and the largest in recall."""
    found = []
    for column, compared in metrics.get("by", {}).items():
        gaps = compared["gaps"]
        recalls = sorted((name for name in gaps if name.startswith("recall")), key=lambda name: -gaps[name]["gap"])
        named = [name for name in (*HEADLINES, *recalls[:1]) if name in gaps]
        for name in named:
            gap = gaps[name]
            noise = f" ± {size_of(name, gap['noise'])} of noise" if "noise" in gap else ""
            said = f"{size_of(name, gap['gap'])}{noise}, worst {escape(str(gap['worst']))}"
            found.append((f"gap in {'MAE' if name == 'mae' else escape(name)} by {escape(column)}", said))
        if not named:
            found.append((f"gap by {escape(column)}", "too few rows to tell"))
    return found


def _epsilons(per_client: dict[str, float]) -> list[tuple[str, float]]:
    """What rows have paid: of each client, or of many in short."""
    if len(per_client) <= MOST_ROWS:
        return [(f"epsilon of {escape(client)}", epsilon) for client, epsilon in per_client.items()]
    found = sorted(per_client.values())
    figures = {"least": found[0], "median": median(found), "largest": found[-1]}
    return [(f"epsilon of {len(found)} clients, {name}", epsilon) for name, epsilon in figures.items()]


def _refused(kinds: dict[str, str]) -> list[tuple[str, str]]:
    if len(kinds) <= MOST_ROWS:
        return [(f"refused by {escape(client)}", kind.replace("_", " ")) for client, kind in kinds.items()]
    counts = Counter(kinds.values())
    return [(f"refused by clients: {kind.replace('_', ' ')}", str(number)) for kind, number in counts.most_common()]


def _held_out(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """The first figure of the held-out rows; below it that of each client, where all of them were there to score."""
    how = "exact, but against clamped targets" if metrics.get("clamped_targets") else "exact"
    rows = [(f"{name} on held-out rows ({how})", value) for name, value in _figures(metrics)[:1]]
    each = metrics.get("per_client", {})
    if len(each) <= MOST_ROWS:
        return rows + [(f"  {escape(client)}", value) for client, own in each.items() for _, value in _figures(own)[:1]]
    name = "accuracy" if "accuracy" in metrics else "mae"
    found = sorted(own[name] for own in each.values() if name in own)
    figures = {"least": found[0], "median": median(found), "largest": found[-1]} if found else {}
    of = f"  of {len(found)} clients"
    return rows + [(f"{of}, {which}", _figures({name: value})[0][1]) for which, value in figures.items()]


def _figures(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    names = {
        "accuracy": "accuracy",
        "precision": "precision, macro",
        "recall": "recall, macro",
        "f1": "F1, macro",
    }
    if "accuracy" in metrics:
        return [(shown, f"{100 * metrics[name]:.1f} %") for name, shown in names.items() if name in metrics]
    shown_first = [("MAE", f"{metrics['mae']:.4g}{_scaled(metrics, 'mae')}")] if "mae" in metrics else []
    return shown_first + [(name.upper(), f"{metrics[name]:.4g}") for name in ("rmse", "mse") if name in metrics]
