"""The model card (Mitchell et al. 2019, "Model Cards for Model Reporting"): what a reader of the model should know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from common.document.schema import Categorical, Classes
from common.document.strategy import title
from common.text import duration
from server.folder.folder import RunRecord
from server.folder.start import in_words
from server.report import facts

MOST_CLIENTS = 50  # with a line each
MOST_RECALLS = 4  # columns in a table of groups


def card(record: RunRecord) -> str:
    """The card of a run's model, in Markdown."""
    parts = [_model, _use, _data, _training, _results, _by_client, _by_group, _privacy, _limits]
    # No text of others is HTML to whoever shows Markdown.
    return "\n".join(line for part in parts for line in part(record)).rstrip().replace("<", "&lt;") + "\n"


def _model(record: RunRecord) -> Iterator[str]:
    federation = record.federation
    sizes = " - ".join(map(str, federation.layer_sizes))
    yield f"# Model card: {federation.name}"
    yield from _paragraph(facts.task(federation), facts.ended(record))
    yield from _table(
        ("", ""),
        [
            ("model", f"multilayer perceptron {sizes}, {federation.model.activation}"),
            ("parameters", f"{federation.parameters:,}"),
            ("run", record.run or "none"),
            ("begun", facts.began(record) or "not yet"),
            ("federation's fingerprint", f"`{federation.fingerprint}`"),
            ("software", ", ".join(f"{k} {v}" for k, v in record.privacy.get("software", {}).items()) or "not stated"),
        ],
    )


def _use(record: RunRecord) -> Iterator[str]:
    yield "## Use"
    yield ""
    yield "    cloister predict RUN_DIR new.csv -o predictions.csv"
    yield from _paragraph(
        "",
        "It is meant for tables whose columns mean what the schema below says, and whose rows are like those of the "
        "participants. What it was not trained on, it knows nothing of.",
    )


def _data(record: RunRecord) -> Iterator[str]:
    schema = record.federation.data_schema
    yield "## Data"
    share = schema.validation_fraction
    yield from _paragraph(
        "The rows of each participant stayed with it. "
        + (f"About {100 * share:.0f} % of each table's rows were kept for validation." if share else "")
    )
    rows = []
    for feature in schema.features:
        if isinstance(feature, Categorical):
            values = ", ".join(map(str, feature.categories[:12])) + (", ..." if len(feature.categories) > 12 else "")
        else:
            values = f"a number from {feature.bounds[0]:g} to {feature.bounds[1]:g}, clamped"
        rows.append((feature.name, values, "may be missing" if feature.may_be_missing else ""))
    for i, target in enumerate(schema.targets):
        what = "also predicted" if i else "the target"
        may = "may be missing" if target.may_be_missing else ""
        if isinstance(target, Classes):
            rows.append((target.name, f"{what}: one of {', '.join(target.classes)}", may))
        else:
            rows.append((target.name, f"{what}: a number from {target.bounds[0]:g} to {target.bounds[1]:g}", may))
    yield from _table(("column", "values", ""), rows)


def _training(record: RunRecord) -> Iterator[str]:
    training, strategy = record.federation.training, record.federation.strategy
    rates, start = training.schedule, record.federation.start
    names = facts.participants(record)
    local = f"{training.local_steps} steps" if training.local_steps else f"{training.local_epochs} epochs"
    yield "## Training"
    yield from _table(
        ("", ""),
        [
            ("rounds", f"{record.standing.round} of {record.standing.rounds or training.rounds}"),
            ("strategy", title(strategy)),
            ("in each round", f"{local} of batches of {training.batch_size}, {training.optimizer}"),
            ("learning rate", f"{training.learning_rate:g}" + (f", {rates.words}" if rates is not None else "")),
            *([("rows changed at random", changes.words)] if (changes := training.augmentation) is not None else []),
            *([("the server's step", strategy.schedule.words)] if strategy.schedule is not None else []),
            *([("the model", f"the rounds' average, forgetting by {strategy.average:g}")] if strategy.average else []),
            ("participants", f"{len(names)}" + (f": {', '.join(names)}" if 0 < len(names) <= MOST_CLIENTS else "")),
            *([("began from", f"the model with SHA-256 {start.sha256}")] if start is not None else []),
            *_energy(record),
            ("time", duration(record.result["seconds"]) if "seconds" in record.result else "not ended"),
        ],
    )


def _energy(record: RunRecord) -> Iterator[tuple[str, str]]:
    if (energy := facts.energy(record)) is None:
        return
    total, more = energy
    yield "energy of clients, measured or estimated", f"{total}; {more}"


def _results(record: RunRecord) -> Iterator[str]:
    federation = record.federation
    yield "## Results"
    found = facts.last_scores(record)
    if not found:
        yield from _paragraph("It was not evaluated.")
        return
    names = [n for n in ("accuracy", "precision", "recall", "f1", "mae", "rmse") if any(n in s for _, s in found)]
    rows = []
    for name in names:
        rows.append((facts.label(name), *(facts.shown(name, s[name]) if name in s else "" for _, s in found)))
    yield from _table(("", *(who for who, _ in found)), rows)
    for who, scores in found:
        if (score := facts.score_of(scores, federation)) is not None and score.band:
            mean = "the mean over clients" if facts.hides_replies(record) else f"the true {facts.label(score.name)}"
            yield from _paragraph(f"On {who}, {mean} lies {score.band} (95 %).")
    if others := facts.other_targets(found[0][1], federation):
        yield from _paragraph(f"The other targets, on {found[0][0]}:")
        yield from _table(("target", "", "", "between, by the noise (95 %)", "rows"), others)
    if classes := found[0][1].get("per_class"):
        yield from _paragraph(f"By class, on {found[0][0]}:")
        yield from _table(
            ("class", "precision", "recall", "F1"),
            [
                (label, *("none" if of[n] is None else f"{100 * of[n]:.1f} %" for n in ("precision", "recall", "f1")))
                for label, of in classes.items()
            ],
        )


def _by_client(record: RunRecord) -> Iterator[str]:
    name = record.federation.metrics[0]
    held_out = (record.result.get("held_out") or {}).get("per_client", {})
    evaluated = (record.standing.evaluation or {}).get("per_client", {})
    figures = {c: own[name] for c, own in (held_out or evaluated).items() if name in own}
    spread = (record.standing.evaluation or {}).get("spread")
    if not figures and not spread:
        return
    yield "## Results by client"
    if not figures or len(figures) > MOST_CLIENTS:
        ends = facts.quantiles(list(figures.values())) if figures else [spread[i] for i in (0, 2, 3, 4, 6)]  # type: ignore[index]
        headings = ("", "least", "lower quartile", "median", "upper quartile", "largest")
        yield from _table(headings, [(facts.label(name), *(facts.shown(name, end) for end in ends))])
        return
    yield from _table(("client", facts.label(name)), [(c, facts.shown(name, v)) for c, v in sorted(figures.items())])
    yield from _paragraph(*(f"{sentence}." for sentence in facts.gaps_by_client(record.standing.evaluation or {})))
    if not held_out and record.federation.privacy.limits:
        yield from _paragraph(
            "Of noisy counts: a client has few rows, and noise moves its figure far more than that of all."
        )


def _by_group(record: RunRecord) -> Iterator[str]:
    found = [(who, scores) for who, scores in facts.last_scores(record) if scores.get("by")]
    group = record.federation.data_schema.group
    if not found or group is None:
        return
    who, scores = found[0]
    yield f"## Results by {group.name}"
    yield from _paragraph(f"On {who}:")
    told = facts.groups(scores, record.federation)
    target = record.federation.data_schema.target
    labels = list(target.classes) if isinstance(target, Classes) else []
    labels = labels if len(labels) <= MOST_RECALLS else []
    last = [] if not group.calibration else ["too sure by" if isinstance(target, Classes) else "bias"]
    headings = ["group", "rows", facts.label(record.federation.metrics[0]), *(f"recall of {c}" for c in labels), *last]
    rows = []
    for name, size, figure, recalls, calibration in told:
        rows.append([name, size, figure, *(recalls.get(c, "") for c in labels), *([calibration] if last else [])])
    yield from _table(headings, rows)
    yield from _paragraph(*(f"{sentence}." for sentence in facts.gaps_by_group(scores)))


def _privacy(record: RunRecord) -> Iterator[str]:
    yield "## Privacy"
    if record.start:
        yield from _paragraph(in_words(record.start))
    units = facts.epsilons(record)
    if not units:
        yield from _paragraph("None: the updates that left clients were exact, and can reveal rows.")
        return
    yield from _table(
        ("protected", "epsilon, at most", "limit", "delta"),
        [
            (
                f"each {u['unit']}",
                "0" if u["epsilon"] is None else f"{u['epsilon']:.2f}",
                f"{u['limit']:g}",
                f"{u['delta']:g}",
            )
            for u in units
        ],
    )
    for unit in ("row", "client"):
        told: dict[str, Any] = record.privacy.get(unit) or {}
        if told:
            yield from _paragraph(
                f"Unit: {told['unit']}; neighbours: {told['neighbours']}; adversary: {told['adversary']}."
            )
            yield from (_plain(f"- not covered: {line}") for line in told.get("not_covered", ()))
            yield ""


def _limits(record: RunRecord) -> Iterator[str]:
    yield "## Limits"
    yield ""
    yield "- Its figures are those of the participants' rows; elsewhere it may do better or worse."
    yield "- Values outside a column's bounds are clamped, and categories that the schema does not list count as other."
    if refused := sorted(
        {one["client"] for one in facts.refusals(record) if one["kind"] in ("refused", "budget exhausted")}
    ):
        yield _plain(f"- Without the rows of {', '.join(refused[:MOST_CLIENTS])}, who refused.")
    if record.federation.privacy.limits:
        yield "- Noise for privacy costs accuracy, most for classes and groups with few rows."
    if record.federation.data_schema.group is None:
        yield "- These figures say nothing of groups of people: `cloister evaluate RUN_DIR table.csv --by COLUMN` does."


def _paragraph(*texts: str) -> Iterator[str]:
    yield ""
    yield " ".join(_plain(text) for text in texts if text)
    yield ""


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    headings = [_cell(heading) for heading in headings]
    yield ""
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for row in rows:
        yield f"| {' | '.join(map(_cell, row))} |"
    yield ""


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")


def _plain(text: str) -> str:
    """Text on one line."""
    return " ".join(text.split())
