"""The curves of a run by round: what each is called, its points, and which of them pages were not told yet."""

from __future__ import annotations

import math
from typing import Any

from common.document.federation import Federation
from server.report import facts

MOST_POINTS = 400  # of a line; it may grow to twice as many before it is thinned
LOSS, CLIENTS, HELD_OUT, SECOND_CLIENTS, SECOND_HELD_OUT = "loss", "clients", "held_out", "clients_2", "held_out_2"
EPSILONS = {"row": "epsilon_row", "client": "epsilon_client"}


class Line:
    """Points of one curve, each [round, value], or [round, value, low, high] where noise makes it uncertain.

    A long line keeps every second point, then every fourth and so on, and always the last.
    """

    def __init__(self) -> None:
        self.points: list[list[float]] = []
        self._places: list[int] = []  # of each point, among all that there were
        self._every = 1
        self._told = self._same = 0  # how many points pages have, and how many of these are still ours

    def add(self, number: int, *values: float) -> None:
        """A round's point. One that is not finite is left out; a round that is told again takes its place again."""
        self.cut(number)
        if not all(map(math.isfinite, values)):
            return
        place = self._places[-1] + 1 if self._places else 0
        if self._places and self._places[-1] % self._every:  # it was there as the last one
            self._drop()
        self.points.append([number, *(float(f"{value:.6g}") for value in values)])
        self._places.append(place)
        if len(self.points) > 2 * MOST_POINTS:
            self._thin()

    def cut(self, number: int) -> None:
        """Drops the points of this round and of later ones, which are made again."""
        while self.points and self.points[-1][0] >= number:
            self._drop()

    def news(self) -> tuple[int, list[list[float]]] | None:
        """How many of the points that pages have stay, and those that come after them; None if nothing is new."""
        keep, told = self._same, self._told
        self._same = self._told = len(self.points)
        return None if keep == told == len(self.points) else (keep, self.points[keep:])

    def _drop(self) -> None:
        self.points.pop()
        self._places.pop()
        self._same = min(self._same, len(self.points))

    def _thin(self) -> None:
        self._every, self._same = 2 * self._every, 0
        last = len(self.points) - 1
        kept = [i for i, place in enumerate(self._places) if i == last or place % self._every == 0]
        self.points, self._places = [self.points[i] for i in kept], [self._places[i] for i in kept]


def second_metric(federation: Federation) -> str:
    """The figure that is drawn beside accuracy or mae."""
    return "f1" if "f1" in federation.metrics else "rmse"


def charts(federation: Federation) -> list[dict[str, Any]]:
    """The charts of a run: title, caption, how figures are written (`share` or `number`), lines, and a limit if any."""
    of_clients = "clients' validation rows" + (", noisy" if federation.privacy.limits else "")
    found: list[dict[str, Any]] = [
        {
            "title": facts.sentence(facts.label(name)),
            "caption": caption,
            "form": "number" if name in ("mae", "rmse") else "share",
            "lines": [{"key": ours, "name": of_clients}, {"key": held_out, "name": facts.EXACT}],
        }
        for name, ours, held_out, caption in (
            (federation.metrics[0], CLIENTS, HELD_OUT, "A band is what noise in the counts makes uncertain."),
            (second_metric(federation), SECOND_CLIENTS, SECOND_HELD_OUT, ""),
        )
    ]
    found[0]["caption"] = found[0]["caption"] if federation.privacy.limits else ""
    found.append({"title": "Training loss", "caption": "", "form": "number", "lines": [{"key": LOSS, "name": "loss"}]})
    for unit, limit in federation.privacy.limits.items():
        of = "a row, at most" if unit == "row" else "a whole client"
        line = {"key": EPSILONS[unit], "name": f"epsilon of {of}"}
        title = f"Epsilon of a {unit}"
        found.append({"title": title, "caption": "", "form": "number", "lines": [line], "limit": limit, "zero": True})
    return found
