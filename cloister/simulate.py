"""`cloister simulate`: files to a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cloister.verbs import (
    ClientsOption,
    DataDirOption,
    DataOption,
    DecimalOption,
    DeviceOption,
    EncodingOption,
    ExplainEveryOption,
    FederationFile,
    GenerateOption,
    HeldOutOption,
    JSONOption,
    NoReportOption,
    OutOption,
    PartitionOption,
    QuietOption,
    SeedOption,
    StartFromOption,
    TrackOption,
    app,
    file_format,
    verb,
)

if TYPE_CHECKING:
    from simulations.sites import Sites

MOST_TABLES = 10  # of which all is told; of more only what is hardly meant
MOST_LINES = 20


@app.command()
@verb
def simulate(
    document: FederationFile,
    data: DataOption = None,
    data_dir: DataDirOption = None,
    generate: GenerateOption = None,
    clients: ClientsOption = None,
    partition: PartitionOption = "iid",
    start_from: StartFromOption = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="In place of the document's value; may be repeated."),
    ] = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    engine: Annotated[
        Literal["vector", "inline", "ray"],
        typer.Option(help="vector: clients together; inline: one by one, to compare; ray: Flower's own, on a cluster."),
    ] = "vector",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that train [default: one a core, if the run is long enough].")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster, for --engine ray [default: started here].")
    ] = None,
    out: OutOption = None,
    held_out: HeldOutOption = None,
    explain_every: ExplainEveryOption = None,
    encoding: EncodingOption = None,
    decimal: DecimalOption = None,
    track: TrackOption = None,
    no_report: NoReportOption = False,
    quiet: QuietOption = False,
    as_json: JSONOption = False,
) -> None:
    """Run a whole federation on this machine, without a network.

    Example: `cloister simulate simulations/heart/federation.yaml --data-dir simulations/heart --out runs/heart`
    """
    import secrets

    from client.device import describe_device, resolve_device
    from cloister.closing import finish
    from cloister.progress import ProgressDisplay
    from cloister.report import reported
    from cloister.terminal import progress_console, tell, warn
    from cloister.track import usable
    from common.document import federation as federations
    from common.errors import ConfigError
    from common.logs import quiet_flower
    from server.folder.folder import RunFolder
    from server.folder.start import read_start
    from server.observers.scoring import HeldOut
    from server.observers.summary import Summary
    from server.observers.trackers.tracking import live
    from server.rounds import strategies
    from server.rounds.events import all_of
    from simulations.engine import opened, run_on
    from simulations.sources import Source

    console, trackers = progress_console(quiet), usable(track or [])
    source = Source(
        data=data,
        data_dir=data_dir,
        generate=generate,
        clients=clients,
        partition=partition,
        form=file_format(encoding, decimal),
    )
    federation = federations.load(document, changes=_changes(set_ or []))
    if seed is not None:
        federation = federation.with_seed(seed)
    strategies.build(federation)  # refuses one that is not installed before tables are read
    start = read_start(start_from, federation)
    where = resolve_device(device, exact=federation.privacy.row is not None)
    if explain_every is not None and held_out is None:
        raise ConfigError(["--explain-every needs rows that may be looked at: give --held-out TABLE"])
    scorer = HeldOut(federation, held_out, source.form, explain_every=explain_every) if held_out else None
    sites = source.sites(federation, device=where)
    quiet_flower()
    run = f"{federation.name}-{secrets.token_hex(8)}"

    def left_out(name: str, reason: str) -> None:
        if len(sites.refused) <= MOST_LINES:
            warn(console, f"{name} is left out: {reason}")

    sites.on_refusal = left_out
    sites.check_quorum(run=run)
    for line in _met(sites, one_table=data_dir is None) + (scorer.report.lines(of="held-out table") if scorer else []):
        tell(console, line)
    how: dict[str, Any] = {"workers": workers, "ray_address": ray_address, "say": lambda text: tell(console, text)}
    display = ProgressDisplay(console, limits=federation.privacy.limits)
    with opened(engine, sites, run=run, progress=display.trained, **how) as grid:
        folder = RunFolder.create(federation, path=out)
        console.print(
            f"simulating {federation.name}: {len(sites)} clients on {describe_device(where)}", highlight=False
        )
        told = live(trackers, federation, folder.path, past=(), warn=lambda text: warn(console, text))
        observe = all_of(display, *told, Summary(federation, folder.path))
        with reported(no_report=no_report), display:
            result = run_on(grid, federation, sites, folder, run=run, observe=observe, held_out=scorer, start=start)
    if len(sites.refused) > MOST_LINES:
        tell(console, f"and {len(sites.refused) - MOST_LINES} more clients are left out")
    finish(result, folder.path, no_report=no_report, as_json=as_json)


def _changes(settings: Sequence[str]) -> dict[tuple[str | int, ...], Any]:
    """What `--set` was given. Raises `ConfigError` with all that is no setting."""
    from common.document.documents import plain_value
    from common.errors import ConfigError

    found: dict[tuple[str | int, ...], Any] = {}
    problems = []
    for text in settings:
        name, equals, value = text.partition("=")
        key = tuple(name.strip().split("."))
        try:
            if not equals or not all(key):
                raise ValueError("expected KEY=VALUE, as training.rounds=10")
            if key in found:
                raise ValueError("stands twice")
            found[key] = plain_value(value)
        except ValueError as error:
            problems.append(f"--set {text}: {error}")
    if problems:
        raise ConfigError(problems)
    return dict(sorted(found.items(), key=lambda change: len(change[0])))  # a mapping before what is in it


def _met(sites: Sites, *, one_table: bool) -> list[str]:
    """What encoding met in the tables, which are whoever simulates' own."""
    if one_table:
        return sites[0].dataset.report.lines()
    if len(sites) <= MOST_TABLES:
        return [line for site in sites for line in site.dataset.report.lines(of=site.name)]
    lines = [line for site in sites for line in site.dataset.report.warnings(of=site.name)]
    more = [f"and {len(lines) - MOST_LINES} more such lines"] if len(lines) > MOST_LINES else []
    return lines[:MOST_LINES] + more
