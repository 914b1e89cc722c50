"""`cloister explain`: which columns a finished model's predictions rest on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cloister.models import ModelArgument, SkipBadOption, TableArgument, TargetOption
from cloister.verbs import DecimalOption, EncodingOption, JSONOption, QuietOption, app, file_format, verb

if TYPE_CHECKING:
    from rich.table import Table

    from common.document.schema import Schema
    from common.inference.explanation import Explanation, RowExplanation

KEPT = "explanation.json"  # in a run folder, for its report
MOST_COLUMNS = 30


@app.command()
@verb
def explain(
    model: ModelArgument,
    table: TableArgument,
    row: Annotated[int | None, typer.Option(metavar="LINE", help="Also this one, by its line in the file.")] = None,
    of: Annotated[
        str | None, typer.Option("--class", help="Whose probability [default: the second of two, else the likeliest].")
    ] = None,
    rows: Annotated[int, typer.Option(min=2, help="How many rows are looked at, drawn by chance.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    skip_bad: SkipBadOption = False,
    as_json: JSONOption = False,
    target: TargetOption = None,
    encoding: EncodingOption = None,
    decimal: DecimalOption = None,
    quiet: QuietOption = False,
) -> None:
    """Which columns of a table drive a model's predictions, overall and for one row.

    Example: `cloister explain runs/heart simulations/heart/va.data --row 2`

    With the target in the table, a column is also permuted, to see how much worse predictions become without it. In a
    run folder the result is kept for the report.
    """
    import json

    from rich.console import Console

    from cloister import models
    from cloister.terminal import progress_console, tell
    from common import files
    from common.data import tables
    from common.inference.explanation import explain as explained
    from common.inference.predictor import TorchPredictor

    models.needs("explain", "captum")
    predictor = TorchPredictor(models.load(model, target))
    schema = predictor.federation.data_schema
    given = tables.read(table, schema, file_format(encoding, decimal), with_target=False)
    found = explained(given, predictor, most_rows=rows, line=row, of=of, skip_bad=skip_bad, seed=seed)
    console = progress_console(quiet)
    for line in ([given.note] if given.note else []) + found.report.warnings():
        tell(console, line)
    told = found.to_json(schema)
    if model.is_dir() and target is None:
        # Without the row, which is somebody's.
        files.write_out(model / KEPT, (json.dumps(told | {"row": None}, indent=2) + "\n").encode())
    if as_json:
        print(json.dumps(told, indent=2))
        return
    for part in shown(found, schema):
        Console().print(part, highlight=False)


def shown(found: Explanation, schema: Schema) -> list[Table | str]:
    """An explanation for a person, part by part."""
    parts: list[Table | str] = [_overall(found, schema)]
    if len(found.columns) > MOST_COLUMNS:
        parts.append(f"and {len(found.columns) - MOST_COLUMNS} more columns; --json has all")
    if found.row is not None:
        parts += [_row(found.row), _sum(found.row)]
    return parts


def _overall(found: Explanation, schema: Schema) -> Table:
    from rich.markup import escape
    from rich.table import Table

    classes = hasattr(schema.target, "classes")
    title = f"{found.rows:,} rows"
    if found.baseline is not None:
        said = f"accuracy {100 * found.baseline:.1f} %" if classes else f"mean absolute error {found.baseline:.4g}"
        title += f", {said}"
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    table.add_column("column")
    if found.baseline is not None:
        worse = "accuracy lost,\nif permuted" if classes else "error added,\nif permuted"
        table.add_column(worse, justify="right", no_wrap=True)
    table.add_column("moves the output\nby, in the mean", justify="right", no_wrap=True)
    for column in found.columns[:MOST_COLUMNS]:
        cells = [column.column]
        if column.worse is not None and column.spread is not None:
            cells.append(
                f"{round(100 * column.worse, 1) + 0.0:.1f} ± {100 * column.spread:.1f} points"  # and never -0.0
                if classes
                else f"{column.worse:.4g} ± {column.spread:.2g}"
            )
        cells.append(_amount(column.attribution, points=classes))
        table.add_row(*map(escape, cells))
    return table


def _row(row: RowExplanation) -> Table:
    from rich.markup import escape
    from rich.table import Table

    of = f"probability of {row.of}" if row.of else "prediction"
    table = Table(title=escape(f"line {row.line}: {of}"), title_justify="left", title_style="bold")
    table.add_column("column")
    table.add_column("cell")
    table.add_column("adds", justify="right", no_wrap=True)
    ordered = sorted(row.attributions.items(), key=lambda item: -abs(item[1]))
    for name, amount in ordered[:MOST_COLUMNS]:
        sign = "+" if amount >= 0 else "-"
        table.add_row(
            escape(name), escape(row.cells[name] or "(empty)"), sign + _amount(abs(amount), points=bool(row.of))
        )
    return table


def _sum(row: RowExplanation) -> str:
    if row.of:
        return f"average row {100 * row.base:.1f} %, this row {100 * row.output:.1f} %"
    return f"average row {row.base:.4g}, this row {row.output:.4g}"


def _amount(value: float, *, points: bool) -> str:
    return f"{100 * value:.1f} points" if points else f"{value:.4g}"
