"""`cloister serve`: the server process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloister.verbs import (
    ExplainEveryOption,
    HeldOutOption,
    JSONOption,
    LogFormatOption,
    NoReportOption,
    OutOption,
    QuietOption,
    StartFromOption,
    TrackOption,
    app,
    verb,
)


@app.command()
@verb
def serve(
    federation: Annotated[Path | None, typer.Argument(metavar="FEDERATION.YAML", help="The document.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN_DIR", help="Go on with this run instead.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="With --resume: this many rounds in all.")] = None,
    address: Annotated[str, typer.Option(help="HOST:PORT to listen on; port 0 takes a free one.")] = "127.0.0.1:8443",
    certificates: Annotated[Path | None, typer.Option(help="Folder with ca.pem, server.pem and server.key.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Plain text, on loopback only.")] = False,
    start_from: StartFromOption = None,
    out: OutOption = None,
    held_out: HeldOutOption = None,
    explain_every: ExplainEveryOption = None,
    wait: Annotated[float | None, typer.Option(help="Seconds to wait for enough clients [default: for ever].")] = None,
    stay: Annotated[
        bool, typer.Option("--stay", help="After the run, let clients fetch its model until Ctrl-C.")
    ] = False,
    max_clients: Annotated[int, typer.Option(min=1, help="Sessions at a time; more are told to wait.")] = 10_000,
    metrics: Annotated[int | None, typer.Option(metavar="PORT", help="Prometheus metrics on 127.0.0.1.")] = None,
    track: TrackOption = None,
    dashboard: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="A page that follows the run.")] = None,
    dashboard_token: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Secret for the page; off this machine there must be one.")
    ] = None,
    no_report: NoReportOption = False,
    log_format: LogFormatOption = "text",
    quiet: QuietOption = False,
    result_as_json: JSONOption = False,
) -> None:
    """Coordinate a federation: the server process.

    After a crash or an upgrade `cloister serve --resume RUN_DIR`, with the flags of before, goes on with the run.

    Example: `cloister serve simulations/heart/federation.yaml --certificates simulations/heart/certs`
    """
    import functools

    from cloister.closing import leave, show_end
    from cloister.progress import ProgressDisplay
    from cloister.report import reported
    from cloister.terminal import ConsoleHandler, progress_console
    from cloister.track import usable
    from common.logs import json_handler, log_to, quiet_flower
    from server import serve as server
    from server.sessions.gate import Limits

    if (federation is None) == (resume is None):
        raise typer.BadParameter("give either FEDERATION.YAML or --resume RUN_DIR")
    if resume is not None and out is not None:
        raise typer.BadParameter("--out is for a new run; with --resume the run stays in its folder")
    if resume is not None and start_from is not None:
        raise typer.BadParameter("--start-from is for a new run; with --resume the run goes on from its checkpoint")
    trackers = usable(track or [])
    if dashboard_token is not None and dashboard is None:
        raise typer.BadParameter("--dashboard-token belongs to --dashboard HOST:PORT")
    if federation is not None:
        if rounds is not None:
            raise typer.BadParameter("--rounds belongs to --resume; a new run has the rounds of its document")
        begun = server.new_run(federation, out=out, start_from=start_from)
    else:
        assert resume is not None
        begun = server.resumed_run(resume, rounds=rounds, stay=stay)
    as_json = log_format == "json"
    console = progress_console(quiet or as_json)  # one for both: log lines then go above the live line
    quiet_flower()
    log_to(json_handler() if as_json else ConsoleHandler(console))
    display = ProgressDisplay(console, limits=begun.federation.privacy.limits)
    with reported(no_report=no_report), display:
        result, _ = server.serve(
            begun,
            address=address,
            certificates=certificates,
            insecure=insecure,
            held_out=held_out,
            explain_every=explain_every,
            wait_s=wait,
            limits=Limits(sessions=max_clients),
            metrics_port=metrics,
            dashboard=dashboard,
            dashboard_token=dashboard_token,
            stay=stay,
            track=trackers,
            observers=[display, server.log_event] if as_json else [display],
            ended=functools.partial(show_end, no_report=no_report, as_json=result_as_json),
        )
    leave(result)
