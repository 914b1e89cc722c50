"""`cloister status`: asks a running server how it goes, or reads it from a run folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloister.verbs import JSONOption, app, print_told, verb

if TYPE_CHECKING:
    from rich.console import Console

    from server.folder.folder import RunRecord

PATIENCE_S = 10.0
GONE = "died"  # of a server that left no word
OVER = ("completed", "budget exhausted", "stopped", "failed")


@app.command()
@verb
def status(
    of: Annotated[str, typer.Argument(metavar="HOST:PORT|RUN_DIR", help="Where the server listens, or a run folder.")],
    certificates: Annotated[Path | None, typer.Option(help="Folder with ca.pem and a certificate.")] = None,
    name: Annotated[str, typer.Option(help="Whose certificate in that folder.")] = "operator",
    as_json: JSONOption = False,
) -> None:
    """How a run goes: its round, its clients, and what each is doing. A client's certificate shows that client alone.

    A running server is asked: `cloister status 127.0.0.1:8443 --certificates simulations/heart/certs`. A run folder is
    read: how its run goes or how it ended, what it cost, who refused, and how to go on with it.

    Example: `cloister status runs/heart`
    """
    from rich.console import Console

    from common.errors import RunFolderError

    in_folder = Path(of).is_dir()
    if not in_folder and ("/" in of or ":" not in of):
        raise RunFolderError(f"{of}: no such folder, and of a server it must be HOST:PORT")
    if in_folder and certificates is not None:
        raise typer.BadParameter("--certificates is for a server that is asked; a run folder is read")
    told = read(Path(of)) if in_folder else ask(of, certificates=certificates, name=name)
    if as_json:
        print_told(told, [], as_json=True)
    elif in_folder:
        from server.folder.folder import RunFolder
        from server.report.facts import readable

        with readable(RunFolder(Path(of))):
            show_folder(told, Console())
    else:
        show(told, Console())


def ask(address: str, *, certificates: Path | None, name: str) -> dict[str, Any]:
    """What the server says of its run, as plain values.

    Args:
        certificates: a folder with ca.pem, NAME.pem and NAME.key; None is plain text, for loopback.

    Raises:
        ConfigError: that is no address.
        CertificateError: the two sides do not accept each other's certificates.
        ConnectionFailed: nobody answers there.
    """
    from google.protobuf import json_format

    from client.calls import calling
    from common.certificates import identity
    from common.errors import CertificateError
    from common.wire import session_pb2 as pb
    from common.wire.address import parse_option
    from common.wire.channel import is_loopback

    host = parse_option("HOST:PORT", address).host
    material = None
    if certificates is not None:
        material = identity.load(certificates / "ca.pem", certificates / f"{name}.pem", certificates / f"{name}.key")
    elif not is_loopback(host):
        raise CertificateError(f"{address}: give --certificates FOLDER; plain text is for loopback only")
    with calling(address, material) as server:
        reply = server.Status(pb.StatusRequest(), timeout=PATIENCE_S)
    told: dict[str, Any] = json_format.MessageToDict(
        reply, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    for key in ("round", "rounds"):
        told[key] = int(told[key])  # JSON's numbers are too small for 64 bits, so protobuf writes text
    for client in told["clients"]:
        client["strikes"] = int(client["strikes"])
    return told


def show(told: dict[str, Any], console: Console) -> None:
    """Prints it for a person."""
    from rich.markup import escape
    from rich.table import Table

    from common.text import duration

    console.print(
        f"{told['federation']}: round {told['round']} of {told['rounds']}, {told['state']}, "
        f"up {duration(told['seconds'])} (Cloister {told['version']})",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if told["problem"]:
        console.print(f"the last round failed: {told['problem']}", style="red", markup=False, soft_wrap=True)
    table = Table()
    for heading in ("client", "state", "last heard", "strikes", "last reason"):
        table.add_column(heading, justify="right" if heading in ("last heard", "strikes") else "left")
    for client in told["clients"]:
        heard = f"{duration(client['last_seen'])} ago"
        cells = (client["name"], client["state"], heard, str(client["strikes"]), client["reason"])
        table.add_row(*(escape(cell) for cell in cells))
    console.print(table)


def read(path: Path) -> dict[str, Any]:
    """What a run folder says of its run, as plain values: times as ISO 8601, `state` also "died".

    `served` is whether a server is at work in the folder; None where that cannot be known, as of a simulation.

    Raises:
        RunFolderError: it is no run's folder, or of a run that never began, or a file is damaged.
        ConfigError: its federation.yaml has mistakes.
    """
    from server.folder.folder import RunFolder, read_run
    from server.report import facts

    record = read_run(path)
    with facts.readable(record):
        standing, federation = record.standing, record.federation
        served = RunFolder(path).is_served()
        state = str(record.result.get("status", standing.state)).replace("_", " ")
        if served is False and state not in OVER:
            state = GONE
        waiting = standing.waiting
        return {
            "federation": federation.name,
            "fingerprint": federation.fingerprint,
            "run": record.run,
            "state": state,
            "reason": str(record.result.get("reason", standing.reason)),
            "problem": standing.problem,
            "served": served,
            "waiting_for": {"clients": waiting.clients, "min_clients": waiting.min_clients} if waiting else None,
            "round": standing.round,
            "rounds": standing.rounds or federation.training.rounds,
            "began": _iso(record.started),
            "last_event": _iso(max((event.time for event in RunFolder(path).events()), default=0.0)),
            "evaluation": standing.evaluation,
            "held_out": facts.held_out(record),
            "privacy": [
                {key: one[key] for key in ("unit", "spent", "limit", "delta")} for one in facts.epsilons(record)
            ],
            "refused": facts.refusals(record),
            **_next(record, state, served),
        }


def _next(record: RunRecord, state: str, served: bool | None) -> dict[str, Any]:
    """How to go on with a run, or why that is not possible; neither where a server is at work or nothing is left."""
    import shlex

    from common.errors import CloisterError
    from server.serve import resumed_run

    if served or state == "completed":
        return {"resume": None, "cannot_resume": ""}
    try:
        resumed_run(record.path, rounds=None)
    except CloisterError as error:
        return {"resume": None, "cannot_resume": str(error)}
    return {"resume": f"cloister serve --resume {shlex.quote(str(record.path))}", "cannot_resume": ""}


def _iso(seconds: float) -> str | None:
    """A time (seconds since 1970) in UTC; None for 0, which is none."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds") if seconds else None


def show_folder(told: dict[str, Any], console: Console) -> None:
    """Prints what a run folder says, for a person."""
    from rich.markup import escape
    from rich.table import Table

    from common.text import shown

    def say(text: str, style: str | None = None) -> None:
        console.print(shown(text), style=style, markup=False, highlight=False, soft_wrap=True)

    say(f"{told['federation']}: round {told['round']} of {told['rounds']}, {_state(told)}")
    for style, text in _sentences(told):
        say(text, style)
    figures = Table(show_header=False)
    for name, value in _figures(told):
        figures.add_row(escape(shown(name)), escape(shown(value)))
    if figures.row_count:
        console.print(figures)
    if told["refused"]:
        table = Table("client", "said", "rounds", "last reason")
        for one in told["refused"]:
            table.add_row(*(escape(shown(str(one[key]))) for key in ("client", "kind", "rounds", "reason")))
        console.print(table)
    if told["resume"]:
        say(f"to go on: {told['resume']}, with the options of before")
    elif told["cannot_resume"]:
        say(f"cannot go on: {told['cannot_resume']}")


def _state(told: dict[str, Any]) -> str:
    waiting = told["waiting_for"]
    if told["state"] == GONE:
        return "its server died"
    of = f": {waiting['clients']} of {waiting['min_clients']}" if waiting and told["state"] not in OVER else ""
    return f"{told['state']}{of}"


def _sentences(told: dict[str, Any]) -> Iterator[tuple[str | None, str]]:
    """What is to be said of a run, each with its style."""
    from datetime import datetime

    from common.text import duration

    if told["reason"]:
        yield "red" if told["state"] == "failed" else None, f"reason: {told['reason']}"
    if told["problem"]:
        yield "red", f"the last round failed: {told['problem']}"
    if told["served"] is None and told["state"] not in OVER:
        yield "yellow", "whether it still runs is not known: no server has a lock on the folder, as in a simulation"
    if told["began"]:
        ago = time.time() - datetime.fromisoformat(told["last_event"]).timestamp()
        yield None, f"began {told['began']}, last event {told['last_event']} ({duration(max(ago, 0.0))} ago)"


def _figures(told: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The last figures, and what they cost."""
    from cloister.progress import headline

    if told["evaluation"] is not None:
        yield "evaluation", headline(told["evaluation"])
    if told["held_out"]:
        yield "held-out rows", headline(told["held_out"])
    for one in told["privacy"]:
        spent = "nothing told yet" if one["spent"] is None else f"{one['spent']:.2f}"
        yield f"epsilon of a {one['unit']}", f"{spent} of {one['limit']:g}"
