"""Several runs beside each other: their figures, their curves, and accuracy against epsilon."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from common.document.strategy import title
from common.errors import ConfigError
from server.folder.folder import RunRecord
from server.report import facts, page
from server.report.drawing import GREY, Figure, by_round, colour, data, figure_of, format_of, thinned


def comparison(records: Sequence[RunRecord]) -> str:
    """The page of several runs, as HTML. Raises `ConfigError` unless they have one metric to be compared by."""
    name = _metric(records)
    named = dict(zip(_names(records), records, strict=True))
    rows = [
        {
            "name": label,
            "strategy": title(record.federation.strategy),
            "rounds": record.standing.round,
            "clients": len(facts.participants(record)) or record.standing.clients,
            "score": facts.score_of(record.standing.evaluation, record.federation),
            "held_out": facts.score_of(facts.held_out(record), record.federation),
            "epsilons": facts.epsilons(record),
            "seconds": record.result.get("seconds"),
            "state": record.standing.state.value,
            "fingerprint": record.federation.fingerprint[:12],
        }
        for label, record in named.items()
    ]
    return page.rendered(
        "comparison.html.jinja",
        comparison_figures(records),
        title=f"Comparison of {len(records)} runs",
        rows=rows,
        metric=facts.label(name),
        differences=_differences(named),
    )


def comparison_figures(records: Sequence[RunRecord]) -> list[Figure]:
    """Accuracy (or error) by round, and against epsilon."""
    name = _metric(records)
    form = format_of(name)
    curves: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    for label, record in zip(_names(records), records, strict=True):
        exact = facts.held_out(record)
        made_rounds = facts.complete(record)
        by_held_out = any(event.held_out for event in made_rounds)
        for event in thinned(made_rounds):
            score = facts.score_of(event.held_out if by_held_out else event.evaluation, record.federation)
            if score is not None:
                curves.append({"round": event.round, "run": label, "value": score.value})
        last = facts.score_of(exact or record.standing.evaluation, record.federation)
        for unit in facts.epsilons(record) if last is not None else ():
            if last is not None and unit["epsilon"] is not None:
                points.append(
                    {"run": label, "unit": f"a {unit['unit']}", "epsilon": unit["epsilon"], "value": last.value}
                )
    labels = _names(records)
    made = []
    y = alt.Y("value:Q", title=facts.label(name), axis=alt.Axis(format=form), scale=alt.Scale(zero=False))
    if curves:
        line = (
            alt.Chart(data(curves))
            .mark_line()
            .encode(
                x=by_round(),
                y=y,
                color=colour("run:N", labels),
                tooltip=["run:N", "round:Q", alt.Tooltip("value:Q", title=facts.label(name), format=form)],
            )
        )
        made.append(
            figure_of(
                "curves", f"{facts.label(name).capitalize()} by round", "On held-out rows where there are any.", line
            )
        )
    if points:
        units = {point["unit"] for point in points}
        shapes = alt.Legend(orient="bottom", symbolFillColor=GREY) if len(units) > 1 else None
        dots = (
            alt.Chart(data(points))
            .mark_point(filled=True, size=110)
            .encode(
                x=alt.X(
                    "epsilon:Q", title="epsilon (further left is more private)", scale=alt.Scale(zero=True, padding=12)
                ),
                y=alt.Y(
                    "value:Q",
                    title=facts.label(name),
                    axis=alt.Axis(format=form),
                    scale=alt.Scale(zero=False, padding=12),
                ),
                color=colour("run:N", labels),
                shape=alt.Shape("unit:N", title=None, legend=shapes),
                tooltip=[
                    "run:N",
                    "unit:N",
                    alt.Tooltip("epsilon:Q", format=".2f"),
                    alt.Tooltip("value:Q", format=form),
                ],
            )
        )
        caption = "Each run's last figure, and what it cost. Runs without privacy have no place here; see the table."
        made.append(figure_of("tradeoff", f"{facts.label(name).capitalize()} against epsilon", caption, dots))
    return made


def _metric(records: Sequence[RunRecord]) -> str:
    found = {record.federation.metrics[0] for record in records}
    if len(found) > 1:
        raise ConfigError(["some of these runs predict classes, and some numbers: they cannot be compared"])
    return found.pop()


def _names(records: Sequence[RunRecord]) -> list[str]:
    """Each run's folder, or where two are called the same, its path; each another."""
    names = [record.path.resolve().name for record in records]
    if len(set(names)) < len(names):
        names = [str(record.path) for record in records]
    return [name if name not in names[:i] else f"{name} ({names[:i].count(name) + 1})" for i, name in enumerate(names)]


def _differences(named: dict[str, RunRecord]) -> list[tuple[str, list[str]]]:
    """Keys of the documents in which the runs differ, with each run's value."""
    flat = [_flat(record.federation.model_dump(mode="json", by_alias=True)) for record in named.values()]
    keys = dict.fromkeys(key for one in flat for key in one)
    return [
        (key, [_shown(one.get(key)) for one in flat]) for key in keys if len({_shown(one.get(key)) for one in flat}) > 1
    ]


def _flat(value: dict[str, Any], of: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{of}{key}.") if isinstance(inner, dict) and inner else {f"{of}{key}": inner}
    return found


def _shown(value: Any) -> str:
    text = "none" if value is None or value == {} else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
