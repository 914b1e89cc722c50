"""A terminal as a person sees it: progress goes to stderr, results to stdout."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from contextlib import suppress

from rich.console import Console

from common.text import shown_lines


def progress_console(quiet: bool) -> Console:
    return Console(stderr=True, quiet=quiet)


def tell(console: Console, text: str) -> None:
    """Shows whoever owns the data a line; a warning in colour."""
    style = "yellow" if text.startswith("warning:") else None
    console.print(shown_lines(text), markup=False, highlight=False, soft_wrap=True, style=style)


def warn(console: Console, text: str) -> None:
    """... and what they should not miss."""
    console.print(shown_lines(text), markup=False, highlight=False, soft_wrap=True, style="yellow")


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
