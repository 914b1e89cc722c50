"""Certificates: a federation's own authority, and the keys it signs.

Elliptic-curve keys (P-256), mutual TLS. A client's name is its certificate's common name. Private keys are
written for their owner's eyes only; nothing that exists is overwritten.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import CertificateError

AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 397

HOST = r"(?=.{1,253}$)[A-Za-z0-9_*]([A-Za-z0-9_.-]*[A-Za-z0-9_])?"
CLIENT = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


@dataclass(frozen=True)
class TLSMaterial:
    """PEM texts: the authority's certificate, and one's own certificate and key."""

    ca: bytes
    certificate: bytes
    key: bytes


def load(ca: Path, certificate: Path, key: Path) -> TLSMaterial:
    """Reads TLS files. Raises `CertificateError` if one is missing, unreadable, expired, foreign or mismatched."""
    material = TLSMaterial(ca=_read(ca), certificate=_read(certificate), key=_read(key))
    authority, own = _parse(material.ca, ca), _parse(material.certificate, certificate)
    for parsed, path in ((authority, ca), (own, certificate)):
        _check_dates(parsed, path)
    try:
        own.verify_directly_issued_by(authority)
    except Exception as error:
        raise CertificateError(f"{certificate}: was not issued by the authority in {ca}") from error
    if _parse_key(material.key, key).public_key() != own.public_key():
        raise CertificateError(f"{key}: is not the key of {certificate}")
    return material


def create_authority(folder: Path) -> None:
    """Writes ca.pem and ca.key. Raises `CertificateError` if there is an authority already."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CertificateError(f"{folder}: cannot be made ({error.strerror})") from error
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("Cloister federation authority")
    certificate = (
        _builder(name, name, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write_pair(folder, "ca", certificate, key)


def create_server(folder: Path, hosts: Sequence[str]) -> None:
    """Writes server.pem and server.key, valid for `hosts` (names or addresses), signed by the folder's authority."""
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            if not re.fullmatch(HOST, host):
                raise CertificateError(f"{host!r} is neither a host's name nor an address") from None
            names.append(x509.DNSName(host))
    _create(folder, "server", hosts[0][:64], ExtendedKeyUsageOID.SERVER_AUTH, x509.SubjectAlternativeName(names))


def create_client(folder: Path, name: str) -> None:
    """Writes NAME.pem and NAME.key for a client, signed by the folder's authority."""
    if name in ("ca", "server"):
        raise CertificateError(f"a client cannot be called {name}: its files would be the {name}'s")
    if not re.fullmatch(CLIENT, name):
        raise CertificateError(
            f"a client cannot be called {name!r}: a name is 1 to 64 letters, digits, dots, dashes and underscores, "
            "and begins with a letter or digit"
        )
    _create(folder, name, name, ExtendedKeyUsageOID.CLIENT_AUTH, None)


def is_loopback(host: str) -> bool:
    """Does this host name mean the machine itself?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _create(
    folder: Path,
    file: str,
    name: str,
    purpose: x509.ObjectIdentifier,
    names: x509.SubjectAlternativeName | None,
) -> None:
    authority = _parse(_read(folder / "ca.pem"), folder / "ca.pem")
    signer = _parse_key(_read(folder / "ca.key"), folder / "ca.key")
    if not isinstance(signer, ec.EllipticCurvePrivateKey) or signer.public_key() != authority.public_key():
        raise CertificateError(f"{folder / 'ca.key'}: is not the elliptic-curve key of {folder / 'ca.pem'}")
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _builder(_name(name), authority.subject, key.public_key(), CERTIFICATE_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    )
    if names is not None:
        builder = builder.add_extension(names, critical=False)
    _write_pair(folder, file, builder.sign(signer, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _write_pair(folder: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    files = ((folder / f"{name}.key", private, 0o600), (folder / f"{name}.pem", public, 0o644))
    for path, _, _ in files:  # both, before either is written: no new key beside an old certificate
        if path.exists():
            raise CertificateError(f"{path}: exists; move it away first if it is to be replaced")
    for path, data, mode in files:
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
        except OSError as error:
            raise CertificateError(f"{path}: cannot be written ({error.strerror})") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(
            f"{path}: cannot be read ({error.strerror}); `cloister certs` makes certificates"
        ) from error


def _parse(pem: bytes, path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise CertificateError(f"{path}: not a certificate in PEM") from error


def _parse_key(pem: bytes, path: Path) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise CertificateError(f"{path}: not a private key in PEM without password") from error


def _check_dates(certificate: x509.Certificate, path: Path) -> None:
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise CertificateError(f"{path}: expired on {certificate.not_valid_after_utc:%Y-%m-%d}; ask for a new one")
    if now < certificate.not_valid_before_utc:
        raise CertificateError(
            f"{path}: not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M}; is the clock right?"
        )
