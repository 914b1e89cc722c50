"""A terminal as a person sees it: progress goes to stderr, results to stdout."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from common.text import shown_lines

if TYPE_CHECKING:
    from client.node import Step

DOING = {"train": "training", "evaluate": "evaluating"}


def progress_console(quiet: bool) -> Console:
    return Console(stderr=True, quiet=quiet)


def tell(console: Console, text: str) -> None:
    """Shows whoever owns the data a line; a warning in colour."""
    style = "yellow" if text.startswith("warning:") else None
    console.print(shown_lines(text), markup=False, highlight=False, soft_wrap=True, style=style)


def warn(console: Console, text: str) -> None:
    """... and what they should not miss."""
    console.print(shown_lines(text), markup=False, highlight=False, soft_wrap=True, style="yellow")


class JoinDisplay:
    """A client's run as one live line: its round, what it is at, and what that has cost. Use it as a context, so that
    the terminal is left clean; lines that are told meanwhile appear above it."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[cost]}"))
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task("", total=None, cost="")
        self._closed = False

    def __enter__(self) -> JoinDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the terminal back, cursor and all, for good: a step that comes later is not shown."""
        self._closed = True
        self._bar.stop()

    def __call__(self, step: Step) -> None:
        if self._closed:
            return
        self._bar.start()  # not before: the owner may have to answer a question first
        doing = DOING[step.task] if not step.done else "waiting for the others"
        self._bar.update(self._task, description=f"round {step.round}/{step.rounds}  {doing}", total=step.rounds)
        if step.round.isdecimal():
            self._bar.update(self._task, completed=int(step.round) - (not step.done))
        if step.epsilon is not None:
            self._bar.update(self._task, cost=f"epsilon {step.epsilon:.2f} of {step.limit:g} spent")


class ConsoleHandler(logging.Handler):
    """Log lines above the live line."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        self._console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)


async def ask(question: str) -> bool:
    """Asks on the terminal; anything but yes is no. A thread waits for the line, so that Ctrl-C still works, also where
    a loop cannot watch a terminal (Windows)."""
    print(question, end="", flush=True)
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[str] = loop.create_future()

    def heard(line: str) -> None:
        if not answer.done():
            answer.set_result(line)

    def read() -> None:
        line, place = b"", sys.stdin.fileno()
        while not line.endswith(b"\n") and (more := os.read(place, 1)):  # holds no lock that an exit would wait for
            line += more
        with suppress(RuntimeError):  # the loop is over, and nobody waits for it any more
            loop.call_soon_threadsafe(heard, line.decode(errors="replace"))

    threading.Thread(target=read, daemon=True).start()
    return (await answer).strip().lower() in ("y", "yes")
