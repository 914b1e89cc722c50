"""`cloister report`: a run, or several, to look at."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cloister.models import ForceOption
from cloister.verbs import app, verb

PAGE, CARD, COMPARISON = "report.html", "model_card.md", "comparison.html"
DRAWN_BY = ("altair", "vl_convert", "jinja2")


@app.command()
@verb
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="A run folder, or several to compare.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page [default: in the run folder, or comparison.html].")
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="DIR", help="Also each chart as a PNG, for a paper.")] = None,
    force: ForceOption = False,
) -> None:
    """Write a run's report and model card: one page that asks no network for anything. Of several runs, a comparison.

    Example: `cloister report runs/heart`
    """
    from cloister import models
    from common import files
    from common.errors import OutputError
    from server.folder.folder import read_run

    models.needs("report", *DRAWN_BY)
    from server.report import comparison, facts, figures, page

    records = [read_run(run) for run in runs]
    place = out or (runs[0] / PAGE if len(runs) == 1 else Path(COMPARISON))
    if out is not None or len(runs) > 1:
        models.check_out(place, force=force)
    with facts.readable(*records):
        if len(records) == 1:
            drawn, html = figures.figures(records[0]), page.report(records[0])
        else:
            drawn, html = comparison.comparison_figures(records), comparison.comparison(records)
    pictures = [] if png is None else [png / f"{figure.key}.png" for figure in drawn]
    for path in pictures if not force else ():
        if path.exists():
            raise OutputError(f"{path}: is there already; --force replaces it")
    files.write_out(place, html.encode())
    print(place)
    if len(runs) == 1:
        print(write_card(runs[0]))
    for path in page.write_pictures(png, drawn) if png is not None else ():
        print(path)


def write_card(run: Path) -> Path:
    """Writes a run's model card into its folder."""
    from common import files
    from server.folder.folder import read_run
    from server.report import facts
    from server.report.card import card

    record = read_run(run)
    with facts.readable(record):
        text = card(record)
    files.write_out(run / CARD, text.encode())
    return run / CARD


def after_run(run: Path) -> list[str]:
    """Writes the report and the card of a run that has just ended, whatever else was installed. Returns what to tell:
    a report that cannot be made is no fault of the run."""
    from cloister import models
    from common import files
    from common.errors import CloisterError

    try:
        told = [f"model card: {write_card(run)}"]
        if models.lacks(*DRAWN_BY):
            return [*told, "no report: pip install 'cloister[report]', then `cloister report` makes it"]
        from server.folder.folder import read_run
        from server.report import page

        files.write_out(run / PAGE, page.report(read_run(run)).encode())
        return [f"report: {run / PAGE}", *told]
    except CloisterError as error:
        return [f"warning: no report: {error}"]
    except Exception:  # a bug, which keeps its traceback; the run is over all the same, and clients have its model
        logging.getLogger("cloister").exception("the run is whole, but its report could not be made")
        return []


@contextmanager
def reported(*, no_report: bool) -> Iterator[None]:
    """Around a run: one that fails has a report all the same."""
    from common.errors import RunFailed

    try:
        yield
    except RunFailed as failed:
        for line in after_run(failed.folder) if failed.folder is not None and not no_report else ():
            print(line, file=sys.stderr)
        raise
