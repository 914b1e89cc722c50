"""`cloister evaluate`: how good a finished model is on a table, and for whom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloister.models import ModelArgument, SkipBadOption, TableArgument, TargetOption
from cloister.verbs import DecimalOption, EncodingOption, JSONOption, QuietOption, app, file_format, verb

if TYPE_CHECKING:
    from rich.table import Table

    from common.inference.evaluation import Evaluated

MOST_CLASSES = 12  # of which a confusion matrix is shown
MOST_RECALLS = 3  # columns in a table of groups


@app.command()
@verb
def evaluate(
    model: ModelArgument,
    table: TableArgument,
    by: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Also by group: sex, or age:40,60; repeatable.")
    ] = None,
    skip_bad: SkipBadOption = False,
    as_json: JSONOption = False,
    target: TargetOption = None,
    encoding: EncodingOption = None,
    decimal: DecimalOption = None,
    quiet: QuietOption = False,
) -> None:
    """How good a finished model is on a table with its target: metrics, confusion, calibration, gaps between groups.

    Example: `cloister evaluate runs/heart simulations/heart/va.data --by sex --by age:50,60`

    Groups are those of --by, and those that the federation's schema declares.
    """
    import json

    from rich.console import Console

    from cloister import models
    from cloister.terminal import progress_console, tell
    from common.data import tables
    from common.inference import evaluation
    from common.inference.grouping import Declared, Grouping, Groups

    predictor = models.predictor(model, target)
    given = tables.read(table, predictor.federation.data_schema, file_format(encoding, decimal))
    groupings: list[Groups] = [Grouping.parse(text, given) for text in dict.fromkeys(by or [])]
    declared = predictor.federation.data_schema.group
    if declared is not None and declared.name in given.types and declared.name not in (g.name for g in groupings):
        groupings.insert(0, Declared(declared))
    found = evaluation.evaluate(given, predictor, by=groupings, skip_bad=skip_bad)
    console = progress_console(quiet)
    for line in found.report.lines():
        tell(console, line)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
        return
    for part in shown(found):
        Console().print(part, highlight=False)


def shown(found: Evaluated) -> list[Table | str]:
    """An evaluation for a person, part by part."""
    from rich.markup import escape

    from common.model.gaps import FEW_ROWS, in_words

    told = found.to_json()
    parts: list[Table | str] = [_overall(told)]
    if "confusion" in told and len(told["confusion"]["classes"]) <= MOST_CLASSES:
        parts.append(_confusion(told["confusion"]))
    parts.append(_calibration(told["calibration"]))
    for column, compared in told["by"].items():
        parts.append(_groups(column, compared))
        gaps = ((figure, gap) for figure, gap in compared["gaps"].items() if gap["gap"] > 0)
        parts += [escape(in_words(figure, gap, between=f"by {column}")) for figure, gap in gaps]
        if not compared["gaps"]:
            parts.append(escape(f"no gaps by {column}: fewer than two groups have {FEW_ROWS} rows"))
    return parts


def _table(title: str, *headings: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for i, heading in enumerate(headings):
        shown_heading = escape(heading).replace(" of ", " of\n").replace("% ", "%\n")
        table.add_column(shown_heading, justify="right" if i else "left", no_wrap=i > 0, min_width=0 if i else 6)
    return table


def _row(table: Table, *cells: str) -> None:
    from rich.markup import escape

    table.add_row(*(escape(cell) for cell in cells))


def _overall(told: dict[str, Any]) -> Table:
    table = _table(f"{told['rows']:,} {'row' if told['rows'] == 1 else 'rows'}", "", "value", "95 % interval")
    if "accuracy" in told:
        _row(table, "accuracy", percent(told["accuracy"]), interval(told["accuracy_interval"]))
        for name, label in (("precision", "precision, macro"), ("recall", "recall, macro"), ("f1", "F1, macro")):
            _row(table, label, percent(told[name]), "")
        if "roc_auc" in told:
            _row(table, "area under the ROC curve", f"{told['roc_auc']:.3f}", "")
        _row(table, "log loss", f"{told['log_loss']:.3f}", "")
        for label, of_class in told["per_class"].items():
            if of_class["recall"] is not None:
                _row(table, f"recall of {label}", percent(of_class["recall"]), "")
        return table
    low, high = told["mae_interval"]
    _row(table, "mean absolute error", f"{told['mae']:.4g}", f"{low:.4g} to {high:.4g}")
    _row(table, "root mean squared error", f"{told['rmse']:.4g}", "")
    _row(table, "bias (prediction less target)", f"{told['bias']:+.4g}", "")
    _row(table, "R squared", "none" if told["r2"] is None else f"{told['r2']:.3f}", "")
    _row(table, "MAE, of the target's range", f"{100 * told['scaled']['mae']:.3g} %", "")
    return table


def _confusion(confusion: dict[str, Any]) -> Table:
    table = _table("rows of each class, by what was predicted", "true", *confusion["classes"])
    for label, counts in zip(confusion["classes"], confusion["counts"], strict=True):
        _row(table, label, *(f"{count:,}" for count in counts))
    return table


def _calibration(calibration: dict[str, Any]) -> Table:
    if "brier" not in calibration:
        table = _table("calibration", "predicted", "rows", "mean prediction", "mean target")
        for b in calibration["bins"]:
            cells = (f"{b['mean_prediction']:.4g}", f"{b['mean_target']:.4g}")
            _row(table, f"{b['from']:g} to {b['to']:g}", f"{b['rows']:,}", *cells)
        return table
    title = (
        f"calibration: Brier score {calibration['brier']:.3f}, expected error "
        f"{percent(calibration['expected_calibration_error'])}"
    )
    table = _table(title, "probability of the class that is predicted", "rows", "mean", "right")
    for b in calibration["bins"]:
        cells = (percent(b["mean_probability"]), percent(b["accuracy"]))
        _row(table, f"{100 * b['from']:.0f} to {100 * b['to']:.0f} %", f"{b['rows']:,}", *cells)
    return table


def _groups(column: str, compared: dict[str, Any]) -> Table:
    groups = compared["groups"]
    first = next(iter(groups.values()))
    if "mae" in first:
        table = _table(f"by {column}", column, "rows", "MAE", "95 % interval", "bias")
        for name, told in groups.items():
            low, high = told["mae_interval"]
            cells = (_rows(told), f"{told['mae']:.4g}", f"{low:.4g} to {high:.4g}", f"{told['bias']:+.4g}")
            _row(table, name, *cells)
        return table
    classes = list(first["rows_of_class"])
    classes = classes if len(classes) <= MOST_RECALLS else []  # of more, --json has all
    headings = [f"recall of {label}" for label in classes]
    table = _table(f"by {column}", column, "rows", "accuracy", "95 % interval", "too sure by", *headings)
    for name, told in groups.items():
        recalls = (percent(told["recall"][label]) if label in told["recall"] else "no rows" for label in classes)
        sure = f"{100 * told['overconfidence']:+.1f} %"
        _row(table, name, _rows(told), percent(told["accuracy"]), interval(told["accuracy_interval"]), sure, *recalls)
    return table


def _rows(told: dict[str, Any]) -> str:
    from common.model.gaps import FEW_ROWS

    return f"{told['rows']:,}" + (" (few)" if told["rows"] < FEW_ROWS else "")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def interval(ends: list[float]) -> str:
    return f"{100 * ends[0]:.0f} to {100 * ends[1]:.0f} %"
