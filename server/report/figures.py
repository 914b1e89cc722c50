"""The charts of a run, by Vega-Altair: each from what its folder says, and only those that it has something for."""

from __future__ import annotations

from collections.abc import Callable

import altair as alt

from common.document.schema import Classes
from server.folder.folder import RunRecord
from server.report import facts
from server.report.drawing import (
    BLUE,
    GREY,
    MOST_NAMED,
    Figure,
    Rows,
    by_round,
    colour,
    data,
    figure_of,
    format_of,
    height_of,
    thinned,
)
from server.report.people import clients, groups, participation, spent, times


def figures(record: RunRecord) -> list[Figure]:
    """All that this run has something for, in the order of the page."""
    makers: list[Callable[[RunRecord], Figure | None]] = [
        learning,
        loss,
        epsilon,
        spent,
        clients,
        groups,
        classes,
        confusion,
        participation,
        times,
        importance,
    ]
    return [figure for make in makers if (figure := make(record)) is not None]


def learning(record: RunRecord) -> Figure | None:
    """Accuracy or error by round, with what the noise makes uncertain as a band."""
    federation = record.federation
    private = bool(federation.privacy.limits)
    of_clients = "clients' validation rows" + (", noisy" if private else "")
    rows: Rows = []
    for event in thinned(facts.complete(record)):
        for who, scores in ((of_clients, event.evaluation), (facts.EXACT, event.held_out)):
            if (score := facts.score_of(scores, federation)) is not None:
                rows.append(
                    {"round": event.round, "of": who, "value": score.value, "low": score.low, "high": score.high}
                )
    if not rows:
        return None
    name = federation.metrics[0]
    form = format_of(name)
    scale = alt.Scale(zero=False)
    kinds = [of_clients, facts.EXACT]
    base = alt.Chart(data(rows)).encode(x=by_round(), color=colour("of:N", kinds, present={row["of"] for row in rows}))
    band = (
        base.transform_filter("isValid(datum.low)")
        .mark_area(opacity=0.2)
        .encode(y=alt.Y("low:Q", title=None), y2="high:Q")
    )
    line = base.mark_line(point=len(rows) <= 60).encode(
        y=alt.Y("value:Q", title=facts.label(name), axis=alt.Axis(format=form), scale=scale),
        tooltip=[
            alt.Tooltip("round:Q", title="round"),
            alt.Tooltip("of:N", title="of"),
            alt.Tooltip("value:Q", title=facts.label(name), format=form),
        ],
    )
    noisy = any(row["low"] is not None for row in rows)
    how = (
        " The band is what the noise in the counts makes uncertain: 95 %, from its known size, to first order. How few "
        "rows there are adds to that."
        if noisy
        else ""
    )
    title = (
        "Accuracy by round"
        if name == "accuracy"
        else f"Error by round, in units of {federation.data_schema.target.name}"
    )
    return figure_of("learning", title, f"On rows that were not trained on.{how}", band + line if noisy else line)


def loss(record: RunRecord) -> Figure | None:
    """The training loss by round, where clients tell theirs."""
    rows = [{"round": e.round, "loss": e.loss} for e in thinned(facts.complete(record)) if e.loss is not None]
    if not rows:
        return None
    chart = (
        alt.Chart(data(rows))
        .mark_line(point=len(rows) <= 60, color=BLUE)
        .encode(
            x=by_round(),
            y=alt.Y("loss:Q", title="mean loss of a row", scale=alt.Scale(zero=False)),
            tooltip=[alt.Tooltip("round:Q", title="round"), alt.Tooltip("loss:Q", title="loss", format=".4g")],
        )
    )
    return figure_of(
        "loss", "Training loss by round", "On the rows that were trained on, before each round's update.", chart
    )


def epsilon(record: RunRecord) -> Figure | None:
    """Epsilon by round against its limit, of each protected unit."""
    limits = record.federation.privacy.limits
    rows = [
        {"round": event.round, "of": f"a {unit}", "epsilon": told["epsilon"]}
        for event in thinned(facts.complete(record))
        for unit, told in event.privacy.items()
    ]
    if not rows:
        return None
    units = [f"a {unit}" for unit in limits]
    line = (
        alt.Chart(data(rows))
        .mark_line(point=len(rows) <= 60)
        .encode(
            x=by_round(),
            y=alt.Y("epsilon:Q", title="epsilon", scale=alt.Scale(zero=True)),
            color=colour("of:N", units),
            tooltip=[
                alt.Tooltip("round:Q", title="round"),
                alt.Tooltip("of:N", title="of"),
                alt.Tooltip("epsilon:Q", format=".3f"),
            ],
        )
    )
    bounds = [{"of": f"a {unit}", "limit": limit, "text": f"limit {limit:g}"} for unit, limit in limits.items()]
    rule = alt.Chart(data(bounds)).mark_rule(strokeDash=[5, 4]).encode(y="limit:Q", color=colour("of:N", units))
    text = (
        alt.Chart(data(bounds))
        .mark_text(align="left", dx=4, dy=-6)
        .encode(x=alt.value(0), y="limit:Q", text="text:N", color=colour("of:N", units))
    )
    caption = "What has been released so far, and the limit that the federation's document sets. Lower is more private."
    return figure_of("epsilon", "Privacy spent by round", caption, line + rule + text)


def classes(record: RunRecord) -> Figure | None:
    """Precision and recall of each class."""
    found = facts.last_scores(record)
    rows: Rows = []
    for who, scores in found[:1]:
        for label, of_class in list(scores.get("per_class", {}).items())[:MOST_NAMED]:
            rows += [
                {"class": label, "figure": figure, "value": of_class[figure], "of": who}
                for figure in ("precision", "recall")
                if of_class.get(figure) is not None
            ]
    if not rows:
        return None
    chart = (
        alt.Chart(data(rows))
        .mark_bar()
        .encode(
            y=alt.Y("class:N", title=None, sort=None, axis=alt.Axis(labelLimit=160)),
            yOffset=alt.YOffset("figure:N"),
            x=alt.X("value:Q", title=None, axis=alt.Axis(format=".0%"), scale=alt.Scale(domain=[0, 1])),
            color=colour("figure:N", ["precision", "recall"]),
            tooltip=[alt.Tooltip("class:N"), alt.Tooltip("figure:N"), alt.Tooltip("value:Q", format=".1%")],
        )
    )
    worst = min((row for row in rows if row["figure"] == "recall"), key=lambda row: row["value"], default=None)
    said = f" Lowest recall: {worst['class']}, {100 * worst['value']:.1f} %." if worst else ""
    caption = (
        f"On {found[0][0]}. Recall: of the rows of a class, how many are found. Precision: of those found, how many "
        f"are of it.{said}"
    )
    return figure_of("classes", "Each class", caption, chart, height=28 * len({row["class"] for row in rows}) * 2)


def confusion(record: RunRecord) -> Figure | None:
    """What was predicted of the rows of each class."""
    target = record.federation.data_schema.target
    found = [(who, scores) for who, scores in facts.last_scores(record) if "confusion" in scores]
    if not found or not isinstance(target, Classes):
        return None
    who, counts = found[0][0], found[0][1]["confusion"]
    scores_are_noisy = "count_noise" in found[0][1]
    names, rows = list(target.classes), []
    for true, line in zip(names, counts, strict=True):
        total = sum(line)
        for predicted, count in zip(names, line, strict=True):
            rows.append({"true": true, "predicted": predicted, "rows": count, "share": count / total if total else 0.0})
    base = alt.Chart(data(rows)).encode(
        x=alt.X("predicted:N", sort=None, axis=alt.Axis(labelAngle=0, orient="top", labelLimit=90)),
        y=alt.Y("true:N", sort=None, axis=alt.Axis(labelLimit=120)),
    )
    cells = base.mark_rect().encode(
        color=alt.Color("share:Q", legend=None, scale=alt.Scale(domain=[0, 1], range=["#dfe9f5", "#2b6cb5"])),
        tooltip=[
            alt.Tooltip("true:N"),
            alt.Tooltip("predicted:N"),
            alt.Tooltip("rows:Q", format=",.1f"),
            alt.Tooltip("share:Q", title="of this class", format=".1%"),
        ],
    )
    text = base.mark_text(fontSize=12).encode(
        text=alt.Text("rows:Q", format=",.0f"),
        color=alt.condition("datum.share > 0.55", alt.value("#ffffff"), alt.value("#14202e")),
    )
    caption = f"Rows of each true class (line) by what was predicted (column), on {who}. Darker: more of that class."
    if facts.hides_replies(record) and scores_are_noisy:
        caption += " Each client counts as one row, dealt to the cells as its rows are."
    return figure_of("confusion", "Confusion", caption, cells + text, height=max(160, 42 * len(names)))


def importance(record: RunRecord) -> Figure | None:
    """Which columns the model goes by (`cloister explain`)."""
    told = record.explanation
    columns = list(told.get("columns", ()))[:25]
    if not columns:
        return None
    permuted = columns[0].get("worse") is not None
    accuracy = told.get("metric") == "accuracy"
    form = ".1%" if accuracy else ".3g"
    rows = [
        {
            "column": column["column"],
            "value": column["worse"] if permuted else column["attribution"],
            "low": column["worse"] - column["spread"] if permuted else None,
            "high": column["worse"] + column["spread"] if permuted else None,
        }
        for column in columns
    ]
    what = ("accuracy lost" if accuracy else "error added") if permuted else "moves the output by, in the mean"
    base = alt.Chart(data(rows)).encode(y=alt.Y("column:N", title=None, sort=None, axis=alt.Axis(labelLimit=160)))
    bar = base.mark_bar(color=BLUE).encode(
        x=alt.X("value:Q", title=what, axis=alt.Axis(format=form)),
        tooltip=[alt.Tooltip("column:N"), alt.Tooltip("value:Q", title=what, format=form)],
    )
    whisker = base.mark_rule(strokeWidth=2, color=GREY).encode(x="low:Q", x2="high:Q")
    caption = (
        f"By how much predictions get worse when a column means nothing any more, on {told.get('rows', 0):,} rows "
        "(permutation importance, with its standard deviation). Not what causes the target: what the model goes by."
        if permuted
        else f"How far each column carries a prediction from the average row's, on {told.get('rows', 0):,} rows."
    )
    chart = bar + whisker if permuted else bar
    return figure_of("importance", "What the model goes by", caption, chart, height=height_of(len(rows)))
