"""What the model goes by while it is trained: summary.md in the run folder, in words, every so many rounds.

Fed by events: a held-out score that says what the model relies on (server/observers/scoring.py) makes a new summary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import files
from common.document.federation import Federation
from common.errors import RunFolderError
from common.text import shown
from server.rounds.events import Event, RoundEnded

NAME = "summary.md"
MOST_COLUMNS, FIRST_COLUMNS = 20, 3  # of the last summary, and of each before


class Summary:
    """Give it every event of a run."""

    def __init__(self, federation: Federation, folder: Path) -> None:
        self._federation, self._path = federation, folder / NAME
        self._told: list[tuple[int, dict[str, Any]]] = []

    def __call__(self, event: Event) -> None:
        """Raises `RunFolderError` if the summary cannot be written."""
        if not isinstance(event, RoundEnded) or not (event.held_out or {}).get("relies_on"):
            return
        self._told.append((event.round, dict(event.held_out or {})))
        try:
            files.replace(self._path, ("\n".join(self._lines()) + "\n").encode(), durable=False)
        except OSError as error:
            raise RunFolderError(f"{self._path}: cannot be written: {error.strerror}") from error

    def _lines(self) -> Iterator[str]:
        number, scores = self._told[-1]
        relies, metric = scores["relies_on"], self._federation.metrics[0]
        yield f"# {self._federation.name} after round {number} of {self._federation.training.rounds}"
        yield ""
        yield (
            f"On the held-out rows: {_figure(metric, scores[metric])}. A column matters as much as {_label(metric)} "
            f"gets worse when its cells are dealt anew to {relies['rows']:,} of these rows, {relies['repeats']} times."
        )
        yield ""
        yield f"| column | {_label(metric)} worse by |"
        yield "|---|---|"
        for column in relies["columns"][:MOST_COLUMNS]:
            yield f"| {_cell(column['column'])} | {_change(metric, column['worse'], column['spread'])} |"
        if (more := len(relies["columns"]) - MOST_COLUMNS) > 0:
            yield f"| and {more} more | |"
        yield ""
        yield "## Over the run"
        yield ""
        yield f"| round | {_label(metric)} | the columns that mattered most |"
        yield "|---|---|---|"
        for before, told in self._told:
            first = ", ".join(_cell(column["column"]) for column in told["relies_on"]["columns"][:FIRST_COLUMNS])
            yield f"| {before} | {_figure(metric, told[metric])} | {first} |"


def _label(metric: str) -> str:
    return "accuracy" if metric == "accuracy" else "the mean absolute error"


def _figure(metric: str, value: float) -> str:
    return f"{_label(metric)} {100 * value:.1f} %" if metric == "accuracy" else f"{_label(metric)} {value:.4g}"


def _change(metric: str, mean: float, spread: float) -> str:
    if metric == "accuracy":
        return f"{round(100 * mean, 1) + 0.0:.1f} ± {100 * spread:.1f} points"  # and never -0.0
    return f"{mean:.4g} ± {spread:.2g}"


def _cell(name: str) -> str:
    """A column's name as a cell of a table, whatever it holds."""
    return shown(name).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
