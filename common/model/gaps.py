"""How far apart groups of rows are, or clients: for each figure the gap, and who does worst and best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

FEW_ROWS = 30  # of which a figure says little
LARGER_IS_WORSE = ("mae",)
SIGNED = ("overconfidence", "bias")  # best at 0
HEADLINES = ("accuracy", "mae")
IN_UNITS = ("mae", "bias")  # of the target, not shares


class Figure(NamedTuple):
    """A figure of some rows, and the standard deviation that the counts' noise gives to it."""

    value: float
    noise: float = 0.0


def gaps(of_groups: Mapping[str, Mapping[str, Figure]]) -> dict[str, dict[str, Any]]:
    """From each group's figures to `{figure: {gap, worst, best}}`, of the figures that two groups have or more, and
    with noise also `noise`, its standard deviation in the difference.

    A gap is the largest value less the least, of what has a sign too: a model that is as much too sure of itself for
    some as it is too timid for others treats them differently. Of equals, the first is the worst, or best.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for figures in of_groups.values() for name in figures):
        figures = {group: its[name] for group, its in of_groups.items() if name in its}
        if len(figures) < 2:
            continue
        values = {group: figure.value for group, figure in figures.items()}
        sizes = {group: abs(value) for group, value in values.items()} if name in SIGNED else values
        low, high = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
        worst, best = (high, low) if name in (*LARGER_IS_WORSE, *SIGNED) else (low, high)
        ends = (min(figures.values()), max(figures.values()))
        found[name] = {"gap": ends[1].value - ends[0].value, "worst": worst, "best": best}
        if noise := math.hypot(*(figure.noise for figure in ends)):
            found[name]["noise"] = noise
    return found


def in_words(figure: str, gap: Mapping[str, Any], *, between: str) -> str:
    """A gap as a sentence, `between` what."""
    named = "mean absolute error" if figure == "mae" else figure
    noise = f" (noise alone: ± {size_of(figure, gap['noise'])})" if "noise" in gap else ""
    return f"gap in {named} {between}: {size_of(figure, gap['gap'])}{noise}; worst {gap['worst']}, best {gap['best']}"


def size_of(figure: str, value: float) -> str:
    """A difference between two figures, for a person."""
    return f"{value:.4g}" if figure in IN_UNITS else f"{100 * value:.1f} points"
