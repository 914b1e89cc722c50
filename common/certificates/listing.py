"""The certificates of a folder, as a table: whose they are, how long they last, and what became of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from cryptography import x509
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.certificates import files
from common.certificates.files import EXPIRES_SOON_DAYS, REVOKED, Kind


class State(StrEnum):
    """What a certificate is worth. Of those that apply, the first one is shown."""

    FOREIGN = "foreign"  # not signed by the authority of the folder
    REVOKED = "revoked"
    EXPIRED = "expired"
    NOT_YET_VALID = "not yet valid"
    EXPIRES_SOON = "expires soon"
    VALID = "valid"


@dataclass(frozen=True)
class Listed:
    """One certificate. `file` is its name in the folder; `name` is what `cloister certs` calls it."""

    name: str
    kind: Kind
    serial: str  # hexadecimal
    expires: datetime
    days_left: int  # negative if it has expired
    state: State
    file: str

    def describe(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"expires": self.expires.isoformat()}


STYLES = {
    State.VALID: "green",
    State.EXPIRES_SOON: "yellow",
    State.NOT_YET_VALID: "yellow",
    State.EXPIRED: "red",
    State.REVOKED: "red",
    State.FOREIGN: "magenta",
}
WIDE = 80  # columns that the table needs, if names are folded
HEADER = ("name", "kind", "serial", "valid until", "days left", "state")


def certificates_in(folder: Path, *, now: datetime | None = None) -> list[Listed]:
    """Every certificate of a folder: the authority's, the server's, operators', clients', those revoked among them.

    Raises:
        CertificateError: there is no authority, or a file that should be a certificate or the list is not one.
    """
    now = now or datetime.now(UTC)
    authority = files.parse(files.read(folder / "ca.pem"), folder / "ca.pem")
    revoked: frozenset[int] = frozenset()
    if (folder / REVOKED).exists():
        revoked = files.revoked_in(files.read(folder / REVOKED), folder / REVOKED, authority)
    found = []
    for path in folder.glob("*.pem"):
        if path.name != REVOKED:
            certificate = files.parse(files.read(path), path)
            found.append(_listed(path, certificate, _state(certificate, authority, revoked, now), now))
    return sorted(found, key=lambda listed: (list(Kind).index(listed.kind), listed.name, listed.expires))


def show(listed: Sequence[Listed], console: Console) -> None:
    """A table for a terminal; plain columns for a pipe or a narrow one, so that no column is cut or folded."""
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


def _listed(path: Path, certificate: x509.Certificate, state: State, now: datetime) -> Listed:
    serial = f"{certificate.serial_number:x}"
    return Listed(
        name=path.stem.removesuffix(f".revoked-{serial}"),  # as `authority.revoke` moved it aside
        kind=files.kind_of(certificate),
        serial=serial,
        expires=certificate.not_valid_after_utc,
        days_left=files.days_left(certificate, now),
        state=state,
        file=path.name,
    )


def _state(certificate: x509.Certificate, authority: x509.Certificate, revoked: frozenset[int], now: datetime) -> State:
    if not files.is_issued_by(certificate, authority):
        return State.FOREIGN
    if certificate.serial_number in revoked:
        return State.REVOKED
    if now > certificate.not_valid_after_utc:
        return State.EXPIRED
    if now < certificate.not_valid_before_utc:
        return State.NOT_YET_VALID
    if files.days_left(certificate, now) <= EXPIRES_SOON_DAYS:
        return State.EXPIRES_SOON
    return State.VALID


def _cells(one: Listed) -> tuple[str, ...]:
    return one.name, one.kind, one.serial[:8], f"{one.expires:%Y-%m-%d}", str(one.days_left), one.state


def _lines(listed: Sequence[Listed]) -> list[str]:
    rows = [HEADER, *map(_cells, listed)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
