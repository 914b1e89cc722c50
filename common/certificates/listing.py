"""The certificates of a folder, as a table: whose they are, how long they last, and what became of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from cryptography import x509

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
