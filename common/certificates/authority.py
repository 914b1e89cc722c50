"""A federation's own authority: makes certificates and keys, and revokes them.

Elliptic-curve keys (P-256), extensions as RFC 5280 wants them, so that strict verifiers are content. A client's name
is its certificate's common name; an operator's certificate is a client's with the organizational unit `operator`.
Private keys are written for their owner's eyes only; nothing that exists is overwritten.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.certificates import files
from common.certificates.files import CLIENT, CLIENT_RULE, OPERATOR, REVOKED
from common.errors import CertificateError
from common.files import replacing

AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 397
MAX_DAYS = 825
CLOCKS_DIFFER = timedelta(minutes=5)

HOST = r"(?=.{1,253}$)[A-Za-z0-9_*]([A-Za-z0-9_.-]*[A-Za-z0-9_])?"


def create_authority(folder: Path) -> None:
    """Writes ca.pem and ca.key. Raises `CertificateError` if there is an authority already."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)  # a folder that was there keeps its mode
    except OSError as error:
        raise CertificateError(f"{folder}: cannot be made ({error.strerror})") from error
    if (folder / REVOKED).exists():
        raise CertificateError(f"{folder / REVOKED}: exists, and is another authority's; move it away first")
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("Cloister federation authority")
    certificate = (
        _builder(name, name, key.public_key(), datetime.now(UTC) + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_pair(folder, "ca", certificate, key)


def create_server(folder: Path, hosts: Sequence[str], *, days: int = CERTIFICATE_DAYS) -> None:
    """Writes server.pem and server.key, valid for `hosts` (names or addresses), signed by the folder's authority."""
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            if not re.fullmatch(HOST, host):
                raise CertificateError(f"{host!r} is neither a host's name nor an address") from None
            names.append(x509.DNSName(host))
    purpose = ExtendedKeyUsageOID.SERVER_AUTH
    _create(folder, "server", _name(hosts[0][:64]), purpose, days, x509.SubjectAlternativeName(names))


def create_client(folder: Path, name: str, *, days: int = CERTIFICATE_DAYS) -> None:
    """Writes NAME.pem and NAME.key for a client, signed by the folder's authority."""
    _check_name("a client", name)
    _create(folder, name, _name(name), ExtendedKeyUsageOID.CLIENT_AUTH, days)


def create_operator(folder: Path, name: str = "operator", *, days: int = CERTIFICATE_DAYS) -> None:
    """Writes NAME.pem and NAME.key for whoever runs the federation, signed by the folder's authority."""
    _check_name("an operator", name)
    _create(folder, name, _name(name, unit=OPERATOR), ExtendedKeyUsageOID.CLIENT_AUTH, days)


def revoke(folder: Path, name: str) -> tuple[Path, str]:
    """Puts NAME.pem on the folder's revocation list, and moves it and its key aside.

    Returns where NAME.pem is now, and the command that makes a new one. Only servers read the list: whoever has the
    key of a revoked server's certificate can pose as the server until it expires.

    Raises:
        CertificateError: there is no such certificate, it is another authority's, or was revoked before; or the list
            that is there cannot be trusted. The list is as it was then.
    """
    authority, signer = _authority(folder)
    certificate = _revocable(folder, name, authority)
    with _replacing(folder / REVOKED) as file:
        revoked = _extended(folder, name, certificate.serial_number, authority, signer)
        file.write(revoked.public_bytes(serialization.Encoding.PEM))
    aside = f"{name}.revoked-{certificate.serial_number:x}"
    for suffix in ("key", "pem"):
        try:
            (folder / f"{name}.{suffix}").rename(folder / f"{aside}.{suffix}")
        except FileNotFoundError:  # the key may have been sent to its client, and kept nowhere else
            pass
        except OSError as error:
            raise CertificateError(
                f"{folder / f'{name}.{suffix}'}: revoked, but cannot be moved ({error.strerror}); move it away"
            ) from error
    return folder / f"{aside}.pem", files.command_for(certificate, name)


def _revocable(folder: Path, name: str, authority: x509.Certificate) -> x509.Certificate:
    path = folder / f"{name}.pem"
    if name == "ca":
        raise CertificateError(
            "the authority cannot revoke itself: `cloister certs init --folder NEW` makes another, "
            "which every client and the server need new certificates from"
        )
    if not re.fullmatch(CLIENT, name):
        raise CertificateError(f"no certificate can be called {name!r}: {CLIENT_RULE}")
    if not path.exists():
        if earlier := sorted(folder.glob(f"{name}.revoked-*.pem")):
            again = files.command_for(files.parse(files.read(earlier[0]), earlier[0]), name)
            raise CertificateError(f"{name} was revoked already, see {earlier[0]}; `{again}` makes a new certificate")
        raise CertificateError(
            f"{path}: no such certificate; `cloister certs list` shows those that are there. "
            f"If it was sent away, put a copy of {name}.pem back to revoke it"
        )
    certificate = files.parse(files.read(path), path)
    if not files.is_issued_by(certificate, authority):
        raise CertificateError(
            f"{path}: was not issued by the authority in {folder / 'ca.pem'}; only the one that issued it can revoke it"
        )
    return certificate


def _extended(
    folder: Path, name: str, serial: int, authority: x509.Certificate, signer: ec.EllipticCurvePrivateKey
) -> x509.CertificateRevocationList:
    """The folder's revocation list, or a first one, with one more serial number on it."""
    path, now, number = folder / REVOKED, datetime.now(UTC), 1
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.subject)
        .last_update(now - CLOCKS_DIFFER)
        # A list that expires would lock everyone out, or be ignored, once nobody had revoked for a while. This one is
        # a file beside the server, replaced when something is revoked and by no clock: it holds as long as its signer.
        .next_update(authority.not_valid_after_utc)
        .add_extension(_issued_with(authority), critical=False)
    )
    if path.exists():
        earlier = files.parse_list(files.read(path), path, authority)
        if earlier.get_revoked_certificate_by_serial_number(serial) is not None:
            raise CertificateError(
                f"{folder / f'{name}.pem'}: was revoked already; move it and {name}.key away to make a new one"
            )
        for entry in earlier:
            builder = builder.add_revoked_certificate(entry)
        number += _number(earlier)
    entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
    return (
        builder.add_revoked_certificate(entry)
        .add_extension(x509.CRLNumber(number), critical=False)
        .sign(signer, hashes.SHA256())
    )


def _number(revoked: x509.CertificateRevocationList) -> int:
    try:
        return revoked.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except x509.ExtensionNotFound:  # a list that other tools made
        return 0


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file in place of an old one, by one writer at a time: a second one would lose what the first one adds."""
    try:
        with replacing(path, exclusive=True, mode=0o644) as file:
            yield file
    except FileExistsError as error:
        raise CertificateError(
            f"{error.filename}: exists: another `cloister certs revoke` is at work, or was interrupted; "
            "if none is, remove the file and try again"
        ) from None
    except OSError as error:
        raise CertificateError(f"{error.filename or path}: cannot be written ({error.strerror})") from error


def _check_name(whose: str, name: str) -> None:
    if name.lower() in files.RESERVED:  # some file systems do not tell CA.pem from ca.pem
        other = "revocation list" if name.lower() == "revoked" else name.lower()
        raise CertificateError(f"{whose} cannot be called {name}: its files would be the {other}'s")
    if not re.fullmatch(CLIENT, name):
        raise CertificateError(f"{whose} cannot be called {name!r}: {CLIENT_RULE}")


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate = files.parse(files.read(folder / "ca.pem"), folder / "ca.pem")
    signer = files.parse_key(files.read(folder / "ca.key", private=True), folder / "ca.key")
    if not isinstance(signer, ec.EllipticCurvePrivateKey) or signer.public_key() != certificate.public_key():
        raise CertificateError(f"{folder / 'ca.key'}: is not the elliptic-curve key of {folder / 'ca.pem'}")
    files.check_dates(certificate, folder / "ca.pem")
    return certificate, signer


def _create(
    folder: Path,
    file: str,
    subject: x509.Name,
    purpose: x509.ObjectIdentifier,
    days: int,
    names: x509.SubjectAlternativeName | None = None,
) -> None:
    if not 1 <= days <= MAX_DAYS:
        raise CertificateError(f"a certificate can be valid for 1 to {MAX_DAYS} days, not {days}")
    authority, signer = _authority(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    end = min(datetime.now(UTC) + timedelta(days=days), authority.not_valid_after_utc)  # never outlives its authority
    builder = (
        _builder(subject, authority.subject, key.public_key(), end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(_issued_with(authority), critical=False)
    )
    if names is not None:
        builder = builder.add_extension(names, critical=False)
    _write_pair(folder, file, builder.sign(signer, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - CLOCKS_DIFFER)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _issued_with(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    """Which of its issuer's keys signed something: as the issuer calls it, or as RFC 5280 does if it does not say."""
    try:
        known = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        key = authority.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)  # as `_authority` found
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(key)
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(known)


def _name(common_name: str, *, unit: str | None = None) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    if unit is not None:
        parts.insert(0, x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit))
    return x509.Name(parts)


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
