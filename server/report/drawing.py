"""What the charts have in common: data, axes and colours, and how much of a long run one has room for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from server.rounds.events import RoundEnded

MOST_POINTS = 400  # of a line
MOST_BINS = 60  # of rounds, where each is a bar or a cell
MOST_NAMED = 40  # clients, or classes, that a chart has a line for; of more clients it has quantiles
BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#3f83d1", "#df8a26", "#2f9e68", "#a569bd", "#d6584a", "#8a929c"

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Figure:
    """One chart with its words. `key` names it in the page and as a file."""

    key: str
    title: str
    caption: str
    chart: Any

    @property
    def spec(self) -> dict[str, Any]:
        """The chart in Vega-Lite."""
        told: dict[str, Any] = self.chart.to_dict()
        return told


def figure_of(key: str, title: str, caption: str, chart: Any, *, height: int = 240) -> Figure:
    return Figure(key, title, caption, chart.properties(width="container", height=height))


def data(rows: Rows) -> alt.InlineData:
    return alt.InlineData(values=rows)


def by_round() -> alt.X:
    return alt.X(
        "round:Q", title="round", axis=alt.Axis(tickMinStep=1, format="d"), scale=alt.Scale(nice=False, zero=False)
    )


def colour(field: str, domain: Sequence[str], *, present: Collection[str] | None = None) -> alt.Color:
    """The same colour for the same thing, whether others are present or not."""
    palette = [BLUE, ORANGE, GREEN, PURPLE, RED, GREY]
    colours = {name: palette[i % len(palette)] for i, name in enumerate(domain) if present is None or name in present}
    scale = alt.Scale(domain=list(colours), range=list(colours.values()))
    return alt.Color(field, title=None, scale=scale, legend=alt.Legend(orient="bottom", labelLimit=260, columns=2))


def few_labels(count: int) -> alt.Axis:
    """Of many bars, not all have room for their name."""
    every = max(1, -(-count // 12))
    return alt.Axis(
        labelAngle=0, labelExpr=f"indexof(domain('x'), datum.value) % {every} == 0 ? datum.label : ''", tickSize=0
    )


def format_of(metric: str) -> str:
    """How an axis shows accuracy, or an error."""
    return ".1%" if metric == "accuracy" else ".4g"


def stacked(rows: Rows, field: str, bars: int, y: alt.Y, colours: Mapping[str, str], form: str) -> Any:
    """Bars of parts that add up, by round: rows have `round`, a part's name in `field`, `order`, and what `y` shows."""
    scale = alt.Scale(domain=list(colours), range=list(colours.values()))
    return (
        alt.Chart(data(rows))
        .mark_bar()
        .encode(
            x=alt.X("round:O", title="round", sort=None, axis=few_labels(bars)),
            y=y,
            color=alt.Color(f"{field}:N", title=None, scale=scale, legend=alt.Legend(orient="bottom", columns=2)),
            order="order:Q",
            tooltip=[alt.Tooltip("round:O"), alt.Tooltip(f"{field}:N"), alt.Tooltip(y.shorthand, format=form)],
        )
    )


def height_of(lines: int) -> int:
    return max(60, 22 * lines + 20)


def thinned(events: Sequence[RoundEnded]) -> list[RoundEnded]:
    """So many that a line can show, the last among them; those with an evaluation rather than others."""
    if len(events) <= MOST_POINTS:
        return list(events)
    step = -(-len(events) // MOST_POINTS)
    kept = {id(part[-1]): part[-1] for part in _parts(events, step)}
    evaluated = [event for event in events if event.evaluation]
    if len(evaluated) <= MOST_POINTS:
        kept |= {id(event): event for event in evaluated}
    return sorted(kept.values(), key=lambda event: event.round)


def bins_of(events: Sequence[RoundEnded]) -> list[Sequence[RoundEnded]]:
    """Rounds that follow each other, so many together that there is a bar's room for each."""
    return _parts(events, -(-len(events) // MOST_BINS))


def _parts(events: Sequence[RoundEnded], step: int) -> list[Sequence[RoundEnded]]:
    return [events[start : start + step] for start in range(0, len(events), step)]


def span(events: Sequence[RoundEnded]) -> str:
    first, last = events[0].round, events[-1].round
    return f"{first}" if first == last else f"{first}-{last}"


def histogram(rows: Rows, field: str, title: str, form: str = ".3g") -> Any:
    return (
        alt.Chart(data(rows))
        .mark_bar(color=BLUE)
        .encode(
            x=alt.X(f"{field}:Q", bin=alt.Bin(maxbins=30), title=title, axis=alt.Axis(format=form)),
            y=alt.Y("count()", title="clients"),
            tooltip=[
                alt.Tooltip(f"{field}:Q", bin=alt.Bin(maxbins=30), format=form),
                alt.Tooltip("count()", title="clients"),
            ],
        )
    )
