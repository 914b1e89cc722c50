"""A run's events as a person sees them: a live line on a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from server.rounds.events import Event, Refused, RoundEnded, Standing, Waiting, after

NO_ROWS = "no validation rows"
_SAYS = {"refused": "refuses to take part", "budget_exhausted": "cannot take part", "failed": "could not join"}
LINES = 10  # of progress that stay on the screen


class ProgressDisplay:
    """Give it every event of a run; use it as a context so that the terminal is left clean."""

    def __init__(self, console: Console, *, limits: Mapping[str, float]) -> None:
        """`limits` is the epsilon that the federation allows for each unit it protects: row, client."""
        self._console, self._limits = console, limits
        self._standing = Standing()
        self._first: tuple[int, float] | None = None  # the first round that was seen, and when it ended
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
            left = self._left(done, rounds)
            self._bar.update(self._task, description=line, completed=done, total=rounds, left=left)

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
            parts.append(f"loss {event.loss:.4f}")
        if (evaluation := self._standing.evaluation) is not None:
            parts.append(headline(evaluation))
        if event.held_out:
            parts.append(f"held out: {headline(event.held_out)}")
        for unit, spent in event.privacy.items():
            parts.append(f"epsilon of a {unit} {spent['epsilon']:.2f} of {self._limits[unit]:g}")
        return "  ".join(parts)


def headline(metrics: dict[str, Any]) -> str:
    """The one figure that says most."""
    if not metrics:
        return NO_ROWS
    if "accuracy" in metrics:
        return f"accuracy {100 * metrics['accuracy']:.1f} %"
    return f"mean absolute error {metrics['mae']:.4g}"


def finish(result: dict[str, Any], folder: Path) -> None:
    """Shows the closing table. A run that was interrupted exits as interrupted programs do."""
    print_result(result, folder)
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
    for name, value in _held_out(result["held_out"] or {}):
        table.add_row(name, value)
    if (row := result["privacy"]["row"]) is not None:
        for client, epsilon in row["per_client"].items():
            table.add_row(f"epsilon of {escape(client)}", f"{epsilon:.2f}")
        if row["epsilon"] is not None:
            table.add_row("epsilon of a row, at most (whole plan)", f"{row['epsilon']:.2f}")
        table.add_row("delta", f"{row['delta']:g}")
    if (unit := result["privacy"]["client"]) is not None:
        table.add_row("epsilon of a whole client", f"{unit['epsilon']:.2f}")
        table.add_row("delta of a client", f"{unit['delta']:g}")
    table.add_row("clients", str(len(result["clients"])))
    for client, kind in result["refused"].items():
        table.add_row(f"refused by {escape(client)}", kind.replace("_", " "))
    table.add_row("time", duration(result["seconds"]))
    if result["reason"]:
        table.add_row("reason", escape(result["reason"]))
    return table


def _held_out(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """The first figure of the held-out rows; below it that of each client, where all of them were there to score."""
    how = "exact, but against clamped targets" if metrics.get("clamped_targets") else "exact"
    rows = [(f"{name} on held-out rows ({how})", value) for name, value in _figures(metrics)[:1]]
    for client, own in metrics.get("per_client", {}).items():
        rows += [(f"  {escape(client)}", value) for _, value in _figures(own)[:1]]
    return rows


def _figures(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    names = {
        "accuracy": "accuracy",
        "precision": "precision, macro",
        "recall": "recall, macro",
        "f1": "F1, macro",
    }
    if "accuracy" in metrics:
        return [(shown, f"{100 * metrics[name]:.1f} %") for name, shown in names.items() if name in metrics]
    return [(name.upper(), f"{metrics[name]:.4g}") for name in ("mae", "mse") if name in metrics]


def duration(seconds: float) -> str:
    """A time for a person: 3.2 s, 4 min 10 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
