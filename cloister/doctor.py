"""`cloister doctor`: what stands between a file and its first round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloister.verbs import JSONOption, app, verb

if TYPE_CHECKING:
    from rich.console import Console

    from common.findings import Finding

STYLES = {"ok": "green", "warning": "yellow", "wrong": "red"}
NOT_READY = 1


@app.command()
@verb
def doctor(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A client.yaml, or a federation.yaml.")],
    certificates: Annotated[
        Path | None, typer.Option(help="Of a federation.yaml: the folder that the server is to be given.")
    ] = None,
    address: Annotated[
        str, typer.Option(help="Of a federation.yaml: HOST:PORT where the server is to listen.")
    ] = "127.0.0.1:8443",
    as_json: JSONOption = False,
) -> None:
    """Examine one side before the first round: each line is ok, a warning, or wrong with what to do.

    The exit code is 0 if it is ready, 1 if not.

    A client asks its server for the document, if it is up, and tells it nothing of what is found. Nothing is written.

    Example: `cloister doctor simulations/heart/cleveland.yaml`
    """
    import logging

    from rich.console import Console

    from client.doctor.examination import examine
    from cloister.check import is_client_file
    from common.errors import ConfigError
    from common.findings import is_ready
    from common.logs import log_to
    from server import doctor as coordinator

    if not file.is_file():
        raise ConfigError([f"{file}: no such file; give a client.yaml or a federation.yaml"])
    log_to(logging.NullHandler())  # what libraries of ours would warn of is among the findings
    if is_client_file(file):
        if certificates is not None:
            raise typer.BadParameter("--certificates is for a federation.yaml; a client file names its own under `tls`")
        findings = examine(file)
    else:
        findings = coordinator.examine(file, certificates=certificates, address=address)
    console = Console()
    found: list[Finding] = []
    for finding in findings:
        found.append(finding)
        if not as_json:
            show(finding, console)
    ready = is_ready(found)
    if as_json:
        print(json.dumps({"ready": ready, "findings": [finding.describe() for finding in found]}, indent=2))
    else:
        console.print(_verdict(found), highlight=False)
    raise typer.Exit(0 if ready else NOT_READY)


def show(finding: Finding, console: Console) -> None:
    """One line, and below it what to do. What was found may quote a table or a server, so no markup is read in it."""
    from rich.text import Text

    from common.text import shown

    line = Text(f"{finding.state:<8}", style=STYLES[finding.state])
    line.append(f"{finding.what:<13} {shown(finding.said, 2000)}", style="default")
    console.print(line, soft_wrap=True)
    if finding.remedy:
        console.print(Text(f"{'':<22}-> {shown(finding.remedy, 500)}", style="dim"), soft_wrap=True)


def _verdict(found: list[Finding]) -> str:
    counts = {state: sum(finding.state == state for finding in found) for state in STYLES}
    if counts["wrong"]:
        return f"not ready: {counts['wrong']} wrong"
    return f"ready, with {counts['warning']} to look at" if counts["warning"] else "ready"
