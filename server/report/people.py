"""Charts of who took part: what each client has spent, how the model does there, who answered when, and how long."""

from __future__ import annotations

import altair as alt

from common.model.scores import noise_of_figure
from server.folder.folder import RunRecord
from server.report import facts
from server.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    MOST_NAMED,
    ORANGE,
    PURPLE,
    RED,
    Figure,
    Rows,
    bins_of,
    by_round,
    colour,
    data,
    few_labels,
    figure_of,
    format_of,
    height_of,
    histogram,
    span,
    stacked,
    thinned,
)


def spent(record: RunRecord) -> Figure | None:
    """Epsilon of each client's rows against the limit; of many how it spreads."""
    row, stated = record.federation.privacy.row, facts.per_client(record)
    if row is None or not stated:
        return None
    caption = "Used (bar), all that was planned (tick), and the limit of the federation's document (dashed)."
    if len(stated) > MOST_NAMED:
        used = [{"epsilon": told["epsilon"]} for told in stated.values()]
        return figure_of(
            "spent",
            "Privacy spent by client",
            f"How many of {len(used):,} clients have spent how much; the document's limit is {row.epsilon:g}.",
            histogram(used, "epsilon", "epsilon"),
        )
    rows = [{"client": c, "used": t["epsilon"], "planned": t["planned_epsilon"]} for c, t in stated.items()]
    y = alt.Y("client:N", title=None, sort="-x", axis=alt.Axis(labelLimit=160))
    base = alt.Chart(data(rows)).encode(
        y=y,
        tooltip=[
            alt.Tooltip("client:N"),
            alt.Tooltip("used:Q", format=".3f"),
            alt.Tooltip("planned:Q", format=".3f"),
        ],
    )
    bar = base.mark_bar(color=BLUE).encode(x=alt.X("used:Q", title="epsilon"))
    tick = base.mark_tick(color=ORANGE, thickness=3).encode(x="planned:Q")
    limit = alt.Chart(data([{"limit": row.epsilon}])).mark_rule(strokeDash=[5, 4], color=RED).encode(x="limit:Q")
    return figure_of("spent", "Privacy spent by client", caption, bar + tick + limit, height=height_of(len(rows)))


def clients(record: RunRecord) -> Figure | None:
    """Each client's accuracy or error; of many how it spreads."""
    name = record.federation.metrics[0]
    form = format_of(name)
    rows: Rows = []
    for who, scores in facts.last_scores(record):
        for client, own in scores.get("per_client", {}).items():
            if name in own:
                rows.append({"client": client, "value": own[name], "of": who})
    title = f"{facts.label(name).capitalize()} by client"
    if not rows:
        return _spread(record, title)
    if len({row["client"] for row in rows}) > MOST_NAMED:
        shown = [{"value": row["value"]} for row in rows]
        return figure_of(
            "clients",
            title,
            f"How many clients have which, of {len(shown)}.",
            histogram(shown, "value", facts.label(name), form),
        )
    kinds = list(dict.fromkeys(row["of"] for row in rows))
    order = [row["client"] for row in sorted(rows, key=lambda row: row["value"], reverse=name == "accuracy")]
    chart = (
        alt.Chart(data(rows))
        .mark_point(filled=True, size=90)
        .encode(
            x=alt.X("value:Q", title=facts.label(name), axis=alt.Axis(format=form), scale=alt.Scale(zero=False)),
            y=alt.Y("client:N", title=None, sort=list(dict.fromkeys(order)), axis=alt.Axis(labelLimit=160, grid=True)),
            color=colour("of:N", kinds),
            tooltip=[alt.Tooltip("client:N"), alt.Tooltip("of:N"), alt.Tooltip("value:Q", format=form)],
        )
    )
    worst, best = order[-1], order[0]
    noisy = (
        " A client has few rows, so noise moves its figure far more than that of all."
        if record.federation.privacy.limits
        else ""
    )
    return figure_of(
        "clients", title, f"Worst: {worst}, best: {best}.{noisy}", chart, height=height_of(len(set(order)))
    )


def groups(record: RunRecord) -> Figure | None:
    """Accuracy or error by group, where the schema declares groups, with what the noise makes uncertain."""
    schema, name = record.federation.data_schema, record.federation.metrics[0]
    found = [(who, scores) for who, scores in facts.last_scores(record) if scores.get("by")]
    if schema.group is None or not found:
        return None
    form, rows = format_of(name), Rows()
    for who, scores in found:
        for group, told in scores["by"][schema.group.name]["groups"].items():
            if name in told:
                noise = noise_of_figure(name, told[name], told["rows"], schema, float(scores.get("count_noise", 0.0)))
                ends = facts.interval(name, told[name], noise) if noise else (None, None)
                rows.append({"group": group, "value": told[name], "low": ends[0], "high": ends[1], "of": who})
    kinds = list(dict.fromkeys(row["of"] for row in rows))
    base = alt.Chart(data(rows)).encode(
        y=alt.Y("group:N", title=schema.group.name, sort=list(schema.groups), axis=alt.Axis(labelLimit=160, grid=True)),
        color=colour("of:N", kinds),
    )
    point = base.mark_point(filled=True, size=90).encode(
        x=alt.X("value:Q", title=facts.label(name), axis=alt.Axis(format=form), scale=alt.Scale(zero=False)),
        tooltip=[alt.Tooltip("group:N"), alt.Tooltip("of:N"), alt.Tooltip("value:Q", format=form)],
    )
    whisker = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q")
    who, told_of = found[0]
    caption = f"On {who}: " + " ".join(f"{sentence}." for sentence in facts.gaps_by_group(told_of))
    if any(row["low"] is not None for row in rows):
        caption += " The bars are what the noise in the counts makes uncertain, 95 %."
    title = f"{facts.label(name).capitalize()} by {schema.group.name}"
    return figure_of("groups", title, caption.strip(), whisker + point, height=height_of(len(schema.groups)))


def participation(record: RunRecord) -> Figure | None:
    """Who took part when; of many how many did."""
    if not record.rounds:
        return None
    names = facts.participants(record)
    made = facts.told(record)
    named = all(event.members or not event.clients for event in made)
    if not named or len(names) > MOST_NAMED:
        return _counts(record)
    rows: Rows = []
    parts = bins_of(made)
    everyone = sorted({*names, *(r.client for event in made for r in event.rejected)})
    hidden = facts.hides_replies(record)
    kinds = ["was there" if hidden else "took part", "in some of these rounds", "reply did not count"]
    for events in parts:
        for client in everyone:
            took = sum(client in event.members for event in events)
            said = [r.reason for event in events for r in event.rejected if r.client == client]
            kind = kinds[2] if said else kinds[0] if took == len(events) else kinds[1] if took else ""
            if kind:
                rows.append(
                    {"round": span(events), "client": client, "state": kind, "reason": said[-1] if said else ""}
                )
    if not rows:
        return None
    present = [kind for kind in kinds if any(row["state"] == kind for row in rows)]
    chart = (
        alt.Chart(data(rows))
        .mark_rect(stroke="white", strokeOpacity=0.5, strokeWidth=0.5)
        .encode(
            x=alt.X("round:O", title="round", sort=None, axis=few_labels(len(parts))),
            y=alt.Y("client:N", title=None, axis=alt.Axis(labelLimit=160)),
            color=alt.Color(
                "state:N",
                title=None,
                scale=alt.Scale(
                    domain=present, range=[{kinds[0]: GREEN, kinds[1]: ORANGE, kinds[2]: RED}[k] for k in present]
                ),
                legend=alt.Legend(orient="bottom"),
            ),
            tooltip=[alt.Tooltip("round:O"), alt.Tooltip("client:N"), alt.Tooltip("state:N"), alt.Tooltip("reason:N")],
        )
    )
    caption = "Each client in each round. An empty cell: it was not asked, not there, or had nothing to say."
    if hidden:
        caption = "Who was connected when each round began. Whom it asked is not told: that is part of the protection."
    title = "Who was there when" if hidden else "Who took part when"
    return figure_of("participation", title, caption, chart, height=height_of(len(everyone)))


def times(record: RunRecord) -> Figure | None:
    """What rounds spent their time on."""
    if not record.rounds:
        return None
    parts = {
        "waiting": "waiting for clients",
        "clients": "clients at work",
        "transfer": "transfer of the slowest reply",
        "aggregation": "aggregation",
        "evaluation": "evaluation",
        "rest": "all of it",
    }
    rows: Rows = []
    bins = bins_of(facts.told(record))
    for events in bins:
        found = {"waiting": sum(event.waiting for event in events)}
        for event in events:
            for part, seconds in (event.times or {"rest": event.seconds}).items():
                found[part] = found.get(part, 0.0) + seconds
        rows += [
            {
                "round": span(events),
                "part": parts[part],
                "seconds": seconds / len(events),
                "order": list(parts).index(part),
            }
            for part, seconds in found.items()
            if part in parts
        ]
    total = sum(row["seconds"] for row in rows)
    if total <= 0:
        return None
    present = [name for part, name in parts.items() if any(row["part"] == name and row["seconds"] > 0 for row in rows)]
    colours = dict(zip(parts.values(), (GREY, BLUE, PURPLE, ORANGE, GREEN, BLUE), strict=True))
    y = alt.Y("seconds:Q", title="seconds a round")
    chart = stacked(rows, "part", len(bins), y, {name: colours[name] for name in present}, ".3g")
    caption = (
        "Mean seconds of a round, by what they went to, as the server sees it; the way to clients is in their work."
    )
    return figure_of("times", "Where the time went", caption, chart)


def _spread(record: RunRecord, title: str) -> Figure | None:
    """How the figures of many clients spread, by round, where events tell quantiles."""
    rows = [
        {
            "round": e.round,
            "least": q[0],
            "low": q[1],
            "lower": q[2],
            "median": q[3],
            "upper": q[4],
            "high": q[5],
            "most": q[6],
        }
        for e in thinned(facts.complete(record))
        if e.evaluation and (q := e.evaluation.get("spread"))
    ]
    if not rows:
        return None
    name = record.federation.metrics[0]
    form = format_of(name)
    base = alt.Chart(data(rows)).encode(x=by_round())
    y = alt.Y("low:Q", title=facts.label(name), axis=alt.Axis(format=form), scale=alt.Scale(zero=False))
    wide = base.mark_area(opacity=0.18, color=BLUE).encode(y=y, y2="high:Q")
    middle = base.mark_area(opacity=0.3, color=BLUE).encode(y="lower:Q", y2="upper:Q")
    fields = ("least", "low", "lower", "median", "upper", "high", "most")
    line = base.mark_line(color=BLUE, point=len(rows) <= 60).encode(
        y="median:Q", tooltip=["round:Q", *(alt.Tooltip(f"{field}:Q", format=form) for field in fields)]
    )
    caption = "Median of the clients (line), half of them (dark band), and eight in ten (light band)."
    return figure_of("clients", title, caption, wide + middle + line)


def _counts(record: RunRecord) -> Figure:
    """How many clients took part in each round."""
    bins = bins_of(facts.told(record))
    rows: Rows = []
    for events in bins:
        n = len(events)
        counted, asked = (sum(getattr(e, name) for e in events) / n for name in ("clients", "asked"))
        rows.append({"round": span(events), "state": "replies that counted", "clients": counted, "order": 0})
        rows.append(
            {"round": span(events), "state": "asked, without one", "clients": max(asked - counted, 0.0), "order": 1}
        )
    colours = {"replies that counted": GREEN}
    if any(row["order"] and row["clients"] for row in rows):
        colours["asked, without one"] = ORANGE
    chart = stacked(rows, "state", len(bins), alt.Y("clients:Q", title="clients"), colours, ",.1f")
    return figure_of(
        "participation", "How many took part", "Clients that each round asked, by whether a reply counted.", chart
    )
