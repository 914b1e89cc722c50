"""`cloister certs`: the certificates of a federation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloister.verbs import JSONOption, app, print_told, verb

if TYPE_CHECKING:
    from rich.console import Console

    from common.certificates.listing import Listed

certs_app = typer.Typer(help="Make, list and revoke the certificates of a federation.", no_args_is_help=True)
app.add_typer(certs_app, name="certs")

CertsFolder = Annotated[Path, typer.Option("--folder", help="Where the authority and its certificates lie.")]
CertsDays = Annotated[int, typer.Option("--days", help="How long it is valid: 1 to 825 days.")]

STYLES = {
    "valid": "green",
    "expires soon": "yellow",
    "not yet valid": "yellow",
    "expired": "red",
    "revoked": "red",
    "foreign": "magenta",
}
WIDE = 80  # columns that the table needs, if names are folded
HEADER = ("name", "kind", "serial", "valid until", "days left", "state")


@certs_app.command("init")
@verb
def certs_init(folder: CertsFolder = Path("certs")) -> None:
    """Make a federation's certificate authority. Keep ca.key where only its owner reads it.

    Example: `cloister certs init --folder simulations/heart/certs`
    """
    from common.certificates import authority

    authority.create_authority(folder)
    print(f"{folder / 'ca.pem'} is for everyone; {folder / 'ca.key'} signs certificates and stays with you")


@certs_app.command("server")
@verb
def certs_server(
    hosts: Annotated[list[str], typer.Argument(metavar="HOST...", help="Names or addresses clients will use.")],
    folder: CertsFolder = Path("certs"),
    days: CertsDays = 397,
) -> None:
    """Make the server's certificate, valid for the given hosts.

    Example: `cloister certs server 127.0.0.1 localhost --folder simulations/heart/certs`
    """
    from common.certificates import authority

    authority.create_server(folder, hosts, days=days)
    print(f"{folder / 'server.pem'} and {folder / 'server.key'}, for {', '.join(hosts)}")


@certs_app.command("client")
@verb
def certs_client(
    name: Annotated[str, typer.Argument(help="The client's name.")],
    folder: CertsFolder = Path("certs"),
    days: CertsDays = 397,
) -> None:
    """Make a client's certificate. Send it its NAME.pem, NAME.key and ca.pem, nothing else.

    Example: `cloister certs client cleveland --folder simulations/heart/certs`
    """
    from common.certificates import authority

    authority.create_client(folder, name, days=days)
    print(f"{folder / f'{name}.pem'} and {folder / f'{name}.key'}, for {name}")
    print(f"keep a copy of {name}.pem here: it is what `cloister certs revoke {name}` needs")


@certs_app.command("operator")
@verb
def certs_operator(
    name: Annotated[str, typer.Argument(help="What to call it.")] = "operator",
    folder: CertsFolder = Path("certs"),
    days: CertsDays = 397,
) -> None:
    """Make a certificate for whoever runs the federation: it may see all clients, so it is for no client.

    Example: `cloister certs operator --folder simulations/heart/certs`
    """
    from common.certificates import authority

    authority.create_operator(folder, name, days=days)
    print(f"{folder / f'{name}.pem'} and {folder / f'{name}.key'}, for whoever runs the federation")
    print("`cloister status` shows every client to those who have them; send them to none of the clients")


@certs_app.command("revoke")
@verb
def certs_revoke(
    name: Annotated[str, typer.Argument(help="Which certificate: NAME for NAME.pem.")],
    folder: CertsFolder = Path("certs"),
) -> None:
    """Revoke a certificate, for good: the server lets nobody in with it any more. Its files are moved aside.

    Example: `cloister certs revoke cleveland --folder simulations/heart/certs`
    """
    from common.certificates import authority

    aside, again = authority.revoke(folder, name)
    print(f"{name} is revoked, and its certificate is now {aside}; `{again}` makes a new one")
    print(
        "a running server rereads revoked.pem by itself; "
        f"copy {folder / 'revoked.pem'} to where `cloister serve` finds its certificates, if that is elsewhere"
    )
    if name == "server":
        print("warning: clients read no such list, and trust who has the old server.key until it expires")


@certs_app.command("list")
@verb
def certs_list(folder: CertsFolder = Path("certs"), as_json: JSONOption = False) -> None:
    """Show every certificate of a folder: for whom, until when, and whether it still holds.

    Example: `cloister certs list --folder simulations/heart/certs`
    """
    from rich.console import Console

    from common.certificates.listing import certificates_in

    found = certificates_in(folder)
    if as_json:
        print_told({"certificates": [one.describe() for one in found]}, [], as_json=True)
    else:
        show(found, Console())


def show(listed: Sequence[Listed], console: Console) -> None:
    """A table for a terminal; plain columns for a pipe or a narrow one, so that no column is cut or folded."""
    from rich.table import Table
    from rich.text import Text

    if not console.is_terminal or console.width < WIDE:
        console.print("\n".join(_lines(listed)), markup=False, highlight=False, soft_wrap=True)
        return
    table = Table(header_style="bold")
    for title in HEADER:
        table.add_column(
            title, justify="right" if title == "days left" else "left", no_wrap=title != "name", overflow="fold"
        )
    for one in listed:
        table.add_row(*map(Text, _cells(one)[:-1]), Text(one.state, style=STYLES[one.state]))
    console.print(table)


def _cells(one: Listed) -> tuple[str, ...]:
    return one.name, one.kind, one.serial[:8], f"{one.expires:%Y-%m-%d}", str(one.days_left), one.state


def _lines(listed: Sequence[Listed]) -> list[str]:
    rows = [HEADER, *map(_cells, listed)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
