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
    """Points of one curve, each [round, value], or [round, value, low, high] where noise makes it uncertain."""

    def __init__(self) -> None:
        self.points: list[list[float]] = []
        self._told = 0  # how many of them pages have
        self._anew = False  # are those that pages have no longer the first of ours?

    def add(self, number: int, *values: float) -> None:
        """A round's point. One that is not finite is left out; a round that is told again takes its place again."""
        self.cut(number)
        if all(map(math.isfinite, values)):
            self.points.append([number, *(float(f"{value:.6g}") for value in values)])
        if len(self.points) > 2 * MOST_POINTS:
            self.points, self._anew = self.points[::-1][::2][::-1], True  # the last one stays

    def cut(self, number: int) -> None:
        """Drops the points of this round and of later ones, which are made again."""
        while self.points and self.points[-1][0] >= number:
            self.points.pop()
        self._anew |= len(self.points) < self._told

    def news(self) -> tuple[list[list[float]], bool]:
        """The points that pages do not have, and whether they replace all that pages have."""
        anew, first = self._anew, 0 if self._anew else self._told
        self._anew, self._told = False, len(self.points)
        return self.points[first:], anew


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
