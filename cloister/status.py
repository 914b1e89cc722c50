"""`cloister status`: asks a running server how it goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloister.verbs import JSONOption, app, print_told, verb

if TYPE_CHECKING:
    from rich.console import Console

PATIENCE_S = 10.0


@app.command()
@verb
def status(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where the server listens.")],
    certificates: Annotated[Path | None, typer.Option(help="Folder with ca.pem and a certificate.")] = None,
    name: Annotated[str, typer.Option(help="Whose certificate in that folder.")] = "operator",
    as_json: JSONOption = False,
) -> None:
    """How a run goes: its round, its clients, and what each is doing. A client's certificate shows that client alone.

    Example: `cloister status 127.0.0.1:8443 --certificates simulations/heart/certs`
    """
    from rich.console import Console

    told = ask(address, certificates=certificates, name=name)
    if as_json:
        print_told(told, [], as_json=True)
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
