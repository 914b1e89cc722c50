"""`cloister predict`: a table of new rows in, predictions out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloister.models import ForceOption, ModelArgument, SkipBadOption, TableArgument, TargetOption
from cloister.verbs import DecimalOption, EncodingOption, QuietOption, app, file_format, verb


@app.command()
@verb
def predict(
    model: ModelArgument,
    table: TableArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="What to write: .csv, .tsv or .parquet.")],
    keep: Annotated[list[str] | None, typer.Option(help="A column to copy beside the predictions; repeatable.")] = None,
    skip_bad: SkipBadOption = False,
    force: ForceOption = False,
    target: TargetOption = None,
    encoding: EncodingOption = None,
    decimal: DecimalOption = None,
    quiet: QuietOption = False,
) -> None:
    """Predict with a finished model: the class and its probabilities, or a number, for each row of a table.

    Example: `cloister predict runs/heart simulations/heart/va.data -o predictions.csv`

    The table needs the schema's columns, but not the target. Rows that cannot be read are listed with their lines;
    with --skip-bad their predictions stay empty. Tables may be larger than memory.
    """
    from cloister import models
    from cloister.terminal import progress_console, tell
    from common.data import tables
    from common.inference import predict as predicting

    form = file_format(encoding, decimal)
    predicting.check_ending(out)
    models.check_out(out, force=force, inputs=(table,))
    predictor = models.predictor(model, target)
    given = tables.read(table, predictor.federation.data_schema, form, with_target=False)
    report = predicting.predict(given, predictor, out, keep=keep or (), skip_bad=skip_bad)
    console = progress_console(quiet)
    for line in ([given.note] if given.note else []) + report.lines(use="left empty"):
        tell(console, line)
    bad = f", {report.left_out} of them without one" if report.left_out else ""
    print(f"{out}: predictions for {report.rows:,} rows{bad}")
