"""`cloister sweep`: a federation with many settings and seeds, to a table."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from click import Choice

from cloister.verbs import (
    ClientsOption,
    DataDirOption,
    DataOption,
    DecimalOption,
    DeviceOption,
    EncodingOption,
    FederationFile,
    GenerateOption,
    PartitionOption,
    QuietOption,
    StartFromOption,
    app,
    file_format,
    verb,
)

if TYPE_CHECKING:
    from rich.console import Console

    from simulations.sites import Sites
    from simulations.sweeps.outcomes import Outcome, Result
    from simulations.sweeps.points import Point
    from simulations.sweeps.report import Report

MOST_LOOKED_AT = 100  # clients, for how many rows one has


@app.command()
@verb
def sweep(
    document: FederationFile,
    more: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE,...", help="More of --grid.")] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(help="A key of the document and its values: training.learning_rate=0.1,0.3; may be repeated."),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            click_type=Choice(["rate", "batch", "regularisation", "clip"]),
            help="Values around the document's own; may be repeated.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each point, from the federation's seed on.")] = 1,
    search: Annotated[
        int | None,
        typer.Option(min=1, help="Points that Optuna picks, instead of all; also from KEY=LOW..HIGH."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="What points are compared by: accuracy, precision, recall, f1, mae or mse.")
    ] = None,
    data: DataOption = None,
    data_dir: DataDirOption = None,
    generate: GenerateOption = None,
    clients: ClientsOption = None,
    partition: PartitionOption = "iid",
    held_out: Annotated[
        Path | None, typer.Option(help="Table to score models on [default: the clients' validation rows].")
    ] = None,
    start_from: StartFromOption = None,
    device: DeviceOption = "auto",
    workers: Annotated[int | None, typer.Option(min=1, help="Runs at a time [default: one a core, or a GPU].")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The sweep's folder [default: sweeps/ and the federation's name].")
    ] = None,
    encoding: EncodingOption = None,
    decimal: DecimalOption = None,
    quiet: QuietOption = False,
) -> None:
    """Simulate a federation with many settings and seeds, on all cores: a table, two CSV files and a picture.

    Started again, with more of either too, it runs what is missing. An epsilon of `inf` is no privacy.

    Example: `cloister sweep simulations/article.yaml --grid training.learning_rate=0.001,0.01 --seeds 2 --generate 500
    --clients 2`
    """
    from client.device import resolve_device
    from cloister.terminal import progress_console, warn
    from common.document import federation as federations
    from common.document.federation import LOWER_IS_BETTER
    from common.errors import ConfigError
    from common.privacy.selection import choosing
    from server.folder.start import read_start
    from server.observers.scoring import HeldOut
    from simulations.engine import devices_for
    from simulations.sources import Source
    from simulations.sweeps import points as sweeps
    from simulations.sweeps.report import Report
    from simulations.sweeps.runs import How, run_all
    from simulations.sweeps.search import Search

    federation = federations.load(document)
    metric = metric or federation.metrics[0]
    if metric not in federation.metrics:
        raise ConfigError([f"--metric {metric}: this target has {', '.join(federation.metrics)}"])
    source = Source(
        data=data,
        data_dir=data_dir,
        generate=generate,
        clients=clients,
        partition=partition,
        form=file_format(encoding, decimal),
    )
    where = resolve_device(device)
    around = [setting for name in dict.fromkeys(preset or []) for setting in sweeps.preset(name, federation)]
    axes = sweeps.parse([*around, *(grid or []), *(more or [])])
    folder = out or Path("sweeps") / federation.name
    first = federation.training.seed
    processes = len(devices_for(where, workers))
    how = How(source=source, held_out=held_out, device=device, processes=processes, start_from=start_from)
    searching: Search | None = None
    if search is not None:
        searching = Search(
            document,
            axes,
            number=search,
            metric=metric,
            lower_is_better=metric in LOWER_IS_BETTER,
            seed=first,
            record=folder / "search.jsonl",
        )
        points, count = searching.points(), search
    else:
        every = sweeps.grid(document, axes)
        points, count = iter(every), len(every)
    example = federation if searching is not None else every[0].federation
    for point in every if searching is None else ():
        if point.federation.start is not None:
            read_start(start_from, point.federation)
    sites = source.sites(example, device=where)  # what does not fit is said before anything is written
    if held_out is not None:
        HeldOut(example, held_out, source.form)
    console = progress_console(quiet)
    results: list[Result] = []
    console.print(f"sweep of {federation.name}: {count} points, {seeds} seeds, {processes} at a time", highlight=False)
    with Display(console, total=count * seeds) as display:
        try:
            for result in run_all(points, folder, how, seeds=range(first, first + seeds), done=display.done):
                results.append(result)
                if searching is not None:
                    searching.tell(result)
        except KeyboardInterrupt:
            warn(console, f"stopped: {display.complete} of {count * seeds} runs are complete; start it again to go on")
            raise typer.Exit(130) from None
    for line in searching.refused if searching is not None else ():
        warn(console, f"not tried: {line}")
    if searching is None:
        order = {point.name: place for place, point in enumerate(every)}
        results.sort(key=lambda result: order[result.point.name])
    tried = [result.point for result in results]
    report = Report(results, metric=metric)
    written = report.write(folder)
    show(report, written)
    if (price := choosing([point.federation for point in tried], rows=_rows(sites))) is not None:
        console.print(price.words, highlight=False, soft_wrap=True)
    if not any(result.complete for result in results):
        raise typer.Exit(1)


def _rows(sites: Sites) -> int:
    """That a client trains on, on average."""
    rows = [site.dataset.rows for site in itertools.islice(sites, MOST_LOOKED_AT)]
    return max(1, round(sum(rows) / max(len(rows), 1)))


class Display:
    """A live line of how many runs are done, and how long the others will take."""

    def __init__(self, console: Console, *, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console, self._total, self._began = console, total, time.monotonic()
        self._done = self._now = self.complete = 0  # runs, those of them that were run now, and those with a model
        self._said = set[str]()  # of errors
        self._bar = Progress(
            TextColumn("runs"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, left="")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def done(self, point: Point, seed: int, outcome: Outcome, now: bool) -> None:
        from cloister.terminal import warn
        from common.text import duration

        self._done, self._now = self._done + 1, self._now + now
        self.complete += not outcome.error
        each = (time.monotonic() - self._began) / max(self._now, 1)
        left = f"{duration(each * (self._total - self._done))} left" if self._now else ""
        self._bar.update(self._task, completed=self._done, left=left)
        if outcome.error and outcome.error not in self._said:
            self._said.add(outcome.error)
            warn(self._console, f"{point.name}, seed {seed}: {outcome.error}")
        elif not self._console.is_terminal and self._done % max(1, self._total // 10) == 0:
            self._console.print(f"{self._done} of {self._total} runs", highlight=False)


def show(report: Report, written: list[Path]) -> None:
    """The table, on stdout, with the best point marked."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    rows = [*report.rows()]
    # On a narrow terminal heads are folded, and no figure.
    for name, cells in zip(report.head(), zip(*rows, strict=True), strict=True):
        table.add_column(escape(name), justify="right", min_width=max(map(len, cells)), overflow="fold")
    best = report.best if len(report.results) > 1 else None
    for result, row in zip(report.results, rows, strict=True):
        table.add_row(*map(escape, row), style="bold" if result is best else None)
    console = Console()
    console.print(table)
    for line in report.errors():
        console.print(f"without a model: {line}", markup=False, highlight=False, soft_wrap=True)
    for path in written:
        console.print(str(path), highlight=False, soft_wrap=True)
