"""Certificates in use: what one side loads, what it may know of the other, and what the server keeps watching.

Mutual TLS. A client's name is its certificate's common name. `common/certificates/authority.py` makes and revokes them.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.certificates import files
from common.certificates.files import CLIENT, CLIENT_RULE, EXPIRES_SOON_DAYS, REVOKED
from common.errors import CertificateError

log = logging.getLogger("cloister.server")


@dataclass(frozen=True)
class TLSMaterial:
    """PEM texts: the authority's certificate, and one's own certificate and key."""

    ca: bytes
    certificate: bytes
    key: bytes


@dataclass(frozen=True)
class Peer:
    """Who is at the other end, by its certificate."""

    name: str
    operator: bool  # runs the federation, and may see every client
    serial: int
    key: bytes  # SHA-256 of the public key (SubjectPublicKeyInfo, DER)
    expires: datetime  # UTC


def key_digest(path: Path) -> str:
    """SHA-256 of a certificate's public key, in hex: the same when the certificate is renewed. Raises
    `CertificateError`."""
    return _key(files.parse(files.read(path), path)).hex()


def load(ca: Path, certificate: Path, key: Path) -> TLSMaterial:
    """Reads TLS files. Raises `CertificateError` if one is missing, unreadable, expired, foreign or mismatched.

    Warns of a key that others than its owner can read.
    """
    material = TLSMaterial(
        ca=files.read(ca),
        certificate=files.read(certificate),
        key=files.read(key, private=True),
    )
    authority = files.parse(material.ca, ca)
    own = files.parse(material.certificate, certificate)
    for parsed, path in ((authority, ca), (own, certificate)):
        files.check_dates(parsed, path)
    if not files.is_issued_by(own, authority):
        raise CertificateError(f"{certificate}: was not issued by the authority in {ca}")
    if files.parse_key(material.key, key).public_key() != own.public_key():
        raise CertificateError(f"{key}: is not the key of {certificate}")
    return material


def expiry_warning(pem: bytes, path: Path | str, *, now: datetime | None = None) -> str | None:
    """One line if a certificate has expired or will within `EXPIRES_SOON_DAYS`. Raises `CertificateError` if `pem` is
    no certificate."""
    certificate, now = files.parse(pem, path), now or datetime.now(UTC)
    days = files.days_left(certificate, now)
    if days > EXPIRES_SOON_DAYS:
        return None
    if now > certificate.not_valid_after_utc:
        when = f"expired on {certificate.not_valid_after_utc:%Y-%m-%d}"
    else:
        soon = {0: "today", 1: "tomorrow"}.get(days, f"in {days} days")
        when = f"expires on {certificate.not_valid_after_utc:%Y-%m-%d}, {soon}"
    command = files.command_for(certificate, Path(path).stem)
    return f"{path} {when}; `{command}`, where the federation's authority is, makes a new one"


def peer(pem: bytes) -> Peer:
    """Who a client's certificate says it is. That the certificate holds is TLS's to find out, and was before this.

    Raises:
        CertificateError: it is no certificate, is not for clients, or its common name cannot be a client's.
    """
    found = files.parse(pem, "the peer's certificate")
    if ExtendedKeyUsageOID.CLIENT_AUTH not in files.purposes_of(found):
        raise CertificateError("the peer's certificate is not a client's; `cloister certs client` makes those")
    names = files.attributes(found, NameOID.COMMON_NAME)
    if len(names) != 1:
        raise CertificateError(f"the peer's certificate has {len(names)} common names; it must have one, its name")
    (name,) = names
    if not isinstance(name, str) or not re.fullmatch(CLIENT, name):
        raise CertificateError(f"the peer's certificate is called {name!r}; {CLIENT_RULE}")
    return Peer(
        name=name,
        operator=files.is_operator(found),
        serial=found.serial_number,
        key=_key(found),
        expires=found.not_valid_after_utc,
    )


def _key(certificate: x509.Certificate) -> bytes:
    public = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(public).digest()


@dataclass(frozen=True)
class _Held:
    material: TLSMaterial
    revoked: frozenset[int]  # serial numbers


class ServerIdentity:
    """A server's own certificate and its authority's revocation list, kept up to date with their files.

    Any thread may call anything. What is held is one frozen value that is replaced as a whole, so that `material`
    and `is_revoked` never wait for a disk; a lock lets one `refresh` run at a time.
    """

    def __init__(self, folder: Path) -> None:
        """Reads ca.pem, server.pem, server.key and, if there is one, revoked.pem.

        Raises:
            CertificateError: one of them is missing, unreadable, expired, foreign or mismatched, the certificate is
                no server's or was revoked, or the list is not one that the authority signed.
        """
        self._lock = threading.Lock()
        self._files = tuple(folder / name for name in ("ca.pem", "server.pem", "server.key", REVOKED))
        self._seen = self._stamps()
        material = self._read_material()
        self._held = _Held(material, self._read_list(material) or frozenset())
        self._check_own(material, self._held.revoked)

    @property
    def material(self) -> TLSMaterial:
        return self._held.material

    def warnings(self) -> list[str]:
        """One line for each of our certificates that expires soon."""
        found = [(self.material.ca, self._files[0]), (self.material.certificate, self._files[1])]
        return [warning for pem, path in found if (warning := expiry_warning(pem, path)) is not None]

    def is_revoked(self, serial: int) -> bool:
        return serial in self._held.revoked

    def refresh(self) -> bool:
        """Rereads the files if one has changed since they were last read. Returns whether what is held is now other.

        Never raises: what is unusable is warned of once, and what was held instead of it stays. What was once revoked
        stays so for as long as this object lives, whatever becomes of the list.
        """
        with self._lock:
            seen = self._stamps()  # before reading: what changes meanwhile is read again the next time
            if seen == self._seen:
                return False
            self._seen = seen
            before = self._held
            self._held, problems = self._reread(before)
            if problems:
                log.warning("certificates that changed are not all usable: %s", "; ".join(problems))
            return self._held != before

    def _reread(self, held: _Held) -> tuple[_Held, list[str]]:
        """The list and the rest are taken each for itself: a revocation counts though the server's own new
        certificate is half-copied. Only a new authority comes with its own list, or not at all."""
        problems, material, revoked = [], held.material, held.revoked
        try:
            material = self._read_material()
        except CertificateError as error:
            problems.append(f"{error}; the earlier ones stay in use")
        try:
            listed = self._read_list(material)
        except CertificateError as error:
            problems.append(f"{error}; the earlier list stays in use")
            if material.ca != held.material.ca:
                material = held.material
        else:
            revoked |= listed or frozenset()
            if missing := revoked - (listed or frozenset()):
                lost = "is gone" if listed is None else f"lacks {len(missing)} that were revoked before"
                problems.append(f"{self._files[3]}: {lost}; put it back: they stay revoked until the server restarts")
        try:
            self._check_own(material, revoked)
        except CertificateError as error:
            problems.append(f"{error}; the earlier one stays in use")
            material = held.material
        return _Held(material, revoked), problems

    def _check_own(self, material: TLSMaterial, revoked: frozenset[int]) -> None:
        path = self._files[1]
        if files.parse(material.certificate, path).serial_number in revoked:
            raise CertificateError(f"{path}: was revoked; `cloister certs server HOST...` makes a new one")

    def _read_material(self) -> TLSMaterial:
        ca, certificate, key, _ = self._files
        material = load(ca, certificate, key)
        purposes = files.purposes_of(files.parse(material.certificate, certificate))
        if purposes and ExtendedKeyUsageOID.SERVER_AUTH not in purposes:  # one that does not say is for everything
            raise CertificateError(f"{certificate}: is not a server's; `cloister certs server HOST...` makes one")
        return material

    def _read_list(self, material: TLSMaterial) -> frozenset[int] | None:
        ca, *_, path = self._files
        try:
            pem = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CertificateError(f"{path}: cannot be read ({error.strerror})") from error
        return files.revoked_in(pem, path, files.parse(material.ca, ca))

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._files]


def fault_in(details: str) -> str | None:
    """What is wrong with the server's certificate, where gRPC's account of a broken link says that something is."""
    for mark, fault in (
        ("CERTIFICATE_VERIFY_FAILED", "its certificate is not from the authority we trust, or has expired"),
        ("Hostname Verification", "its certificate is for another host than the address that we were given"),
        ("WRONG_VERSION_NUMBER", "it does not speak TLS"),
    ):
        if mark in details:
            return fault
    return None


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What differs when a file was written or replaced. None if it is not there, or cannot be looked at."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
