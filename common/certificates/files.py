"""Certificates, keys and revocation lists as files: read and checked, every failure an error of ours."""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import CertificateError
from common.text import PLAIN_NAME

EXPIRES_SOON_DAYS = 30

REVOKED = "revoked.pem"  # the revocation list, beside ca.pem
OPERATOR = "operator"  # the organizational unit of those who run the federation; clients have none

RESERVED = ("ca", "server", "revoked")  # names of the folder's own files
CLIENT = PLAIN_NAME
CLIENT_RULE = "a name is 1 to 64 letters, digits, dots, dashes and underscores, and begins with a letter or digit"

log = logging.getLogger("cloister.certificates")

# What the library raises for bytes that are no certificate, key or list, or that hold what it does not know.
_UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


class Kind(StrEnum):
    """Whom a certificate is for."""

    AUTHORITY = "authority"
    SERVER = "server"
    OPERATOR = "operator"
    CLIENT = "client"
    OTHER = "other"  # made by other tools, and for nothing that a federation knows


def open_to_others(path: Path) -> tuple[str, str] | None:
    """What is wrong with who may read a private file, and what mends it; None where nothing is, or nothing can tell."""
    try:
        mode = path.stat().st_mode & 0o777
    except OSError:
        return None
    if not mode & 0o077 or os.name != "posix":
        return None
    return f"{path}: open to others than its owner (mode {mode:03o})", f"run `chmod 600 {path}`"


def read(path: Path, *, private: bool = False) -> bytes:
    """Reads a file. Warns of a `private` one that is open to others than its owner."""
    try:
        pem = path.read_bytes()
    except OSError as error:
        raise CertificateError(
            f"{path}: cannot be read ({error.strerror}); `cloister certs` makes certificates"
        ) from error
    if private and (said := open_to_others(path)) is not None:
        log.warning("%s; %s", *said)
    return pem


def parse(pem: bytes, path: Path | str) -> x509.Certificate:
    """The first certificate in a PEM text, all of it readable. `path` is what messages call it."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        # These are decoded when they are first asked for: what is damaged in them is found here.
        certificate.subject, certificate.issuer, certificate.extensions, certificate.public_key()
    except _UNREADABLE as error:
        raise CertificateError(f"{path}: not a certificate in PEM") from error
    return certificate


def parse_key(pem: bytes, path: Path) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(pem, password=None)
    except _UNREADABLE as error:
        raise CertificateError(f"{path}: not a private key in PEM without password") from error


def parse_list(pem: bytes, path: Path, authority: x509.Certificate) -> x509.CertificateRevocationList:
    """A revocation list that `authority` signed. When it should be followed by a newer one is not asked: see
    `authority.revoke`."""
    try:
        found = x509.load_pem_x509_crl(pem)
        list(found), found.extensions  # decoded when they are first asked for, as above
    except _UNREADABLE as error:
        raise CertificateError(f"{path}: not a revocation list in PEM; put back a copy that is whole") from error
    if found.issuer != authority.subject or not _signed(found, authority):
        raise CertificateError(
            f"{path}: was not signed by the authority beside it; put back the list that `cloister certs revoke` wrote"
        )
    return found


def revoked_in(pem: bytes, path: Path, authority: x509.Certificate) -> frozenset[int]:
    """The serial numbers on a revocation list that `authority` signed."""
    return frozenset(entry.serial_number for entry in parse_list(pem, path, authority))


def _signed(revocations: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    try:
        return revocations.is_signature_valid(authority.public_key())  # type: ignore[arg-type]  # others raise
    except (TypeError, UnsupportedAlgorithm):  # the authority's key is of a kind that signs no lists
        return False


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception:  # whatever the library holds against it
        return False
    return True


def check_dates(certificate: x509.Certificate, path: Path) -> None:
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise CertificateError(f"{path}: expired on {certificate.not_valid_after_utc:%Y-%m-%d}; ask for a new one")
    if now < certificate.not_valid_before_utc:
        raise CertificateError(
            f"{path}: not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M}; is the clock right?"
        )


def days_left(certificate: x509.Certificate, now: datetime) -> int:
    """Days by the calendar (UTC), so that they agree with the date that is shown beside them."""
    return (certificate.not_valid_after_utc.date() - now.date()).days


def kind_of(certificate: x509.Certificate) -> Kind:
    if is_authority(certificate):
        return Kind.AUTHORITY
    purposes = purposes_of(certificate)
    if ExtendedKeyUsageOID.SERVER_AUTH in purposes:
        return Kind.SERVER
    if ExtendedKeyUsageOID.CLIENT_AUTH in purposes:
        return Kind.OPERATOR if is_operator(certificate) else Kind.CLIENT
    return Kind.OTHER


def command_for(certificate: x509.Certificate, name: str) -> str:
    """The command that makes a certificate like this one anew."""
    match kind_of(certificate):
        case Kind.AUTHORITY:
            return "cloister certs init"
        case Kind.SERVER:
            return "cloister certs server HOST..."
        case Kind.OPERATOR:
            return f"cloister certs operator {name}"
        case _:
            return f"cloister certs client {name}"


def is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def is_operator(certificate: x509.Certificate) -> bool:
    """Only that one organizational unit alone will do: what says two things says neither."""
    return attributes(certificate, NameOID.ORGANIZATIONAL_UNIT_NAME) == [OPERATOR]


def purposes_of(certificate: x509.Certificate) -> list[x509.ObjectIdentifier]:
    """What its extended key usage allows. Empty if it does not say."""
    try:
        return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return []


def hosts(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def is_for(host: str, names: Iterable[str]) -> bool:
    """Is a host, without brackets, among a certificate's names? `*.example.org` is any one name there (RFC 6125,
    6.4.3)."""
    try:
        return str(ipaddress.ip_address(host)) in names
    except ValueError:
        host = host.lower().rstrip(".")
    parent = host.partition(".")[2]
    return any(name.lower() in (host, f"*.{parent}" if parent else host) for name in names)


def attributes(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> list[str | bytes]:
    return [found.value for found in certificate.subject.get_attributes_for_oid(oid)]
