"""What a server reads from the certificate that a peer shows."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.certificates import authority, identity
from common.errors import CertificateError

CLIENT_AUTH = ExtendedKeyUsageOID.CLIENT_AUTH


@pytest.fixture(scope="module")
def certs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    authority.create_authority(folder)
    authority.create_server(folder, ["localhost"])
    authority.create_client(folder, "ada")
    authority.create_operator(folder)
    return folder


def pem(folder: Path, name: str) -> bytes:
    return (folder / f"{name}.pem").read_bytes()


def made(
    *subject: tuple[x509.ObjectIdentifier, str], purposes: Sequence[x509.ObjectIdentifier] = (CLIENT_AUTH,)
) -> bytes:
    """A certificate as other tools might make it, signed by itself: `peer` leaves signatures to TLS."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(oid, value) for oid, value in subject])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 7, now, now + timedelta(days=1))
    if purposes:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_a_peer_is_who_its_certificate_says_as_openssl_reads_it(certs):
    def openssl(*arguments: str) -> bytes:
        return subprocess.run(["openssl", *arguments], check=True, capture_output=True).stdout

    peer, path = identity.peer(pem(certs, "ada")), str(certs / "ada.pem")
    assert (peer.name, peer.operator) == ("ada", False)
    assert peer.serial == int(openssl("x509", "-in", path, "-noout", "-serial").split(b"=")[1], 16)
    public = openssl("pkey", "-in", str(certs / "ada.key"), "-pubout", "-outform", "DER")
    assert peer.key == hashlib.sha256(public).digest()
    end = openssl("x509", "-in", path, "-noout", "-enddate").decode().strip().removeprefix("notAfter=")
    assert peer.expires == datetime.strptime(end, "%b %d %H:%M:%S %Y GMT").replace(tzinfo=UTC)


def test_an_operator_is_known_by_its_organizational_unit(certs):
    peer = identity.peer(pem(certs, "operator"))
    assert (peer.name, peer.operator) == ("operator", True)


def test_being_called_operator_makes_nobody_one(tmp_path):
    authority.create_authority(tmp_path)
    authority.create_client(tmp_path, "operator")
    assert not identity.peer(pem(tmp_path, "operator")).operator


OU = NameOID.ORGANIZATIONAL_UNIT_NAME
ADA = (NameOID.COMMON_NAME, "ada")


@pytest.mark.parametrize(
    "subject, operator",
    [
        ((ADA, (OU, "operator")), True),
        ((ADA, (OU, "Operator")), False),
        ((ADA, (OU, "cardiology")), False),
        ((ADA, (OU, "cardiology"), (OU, "operator")), False),
        ((ADA, (OU, "operator"), (OU, "operator")), False),
        ((ADA, (NameOID.ORGANIZATION_NAME, "operator")), False),
    ],
)
def test_only_that_one_unit_alone_makes_an_operator(subject, operator):
    assert identity.peer(made(*subject)).operator is operator


@pytest.mark.parametrize("name", ["A", "x" * 64, "a.b_c-d", "0"])
def test_a_peer_may_have_any_name_that_a_client_may_have(name):
    assert identity.peer(made((NameOID.COMMON_NAME, name))).name == name


@pytest.mark.parametrize("name", ["-x", "a b", "a/b", "../ada", "naïve", "ada\n"])
def test_a_peer_with_a_name_that_no_client_may_have_is_refused(name):
    with pytest.raises(CertificateError, match=r"the peer's certificate is called '.*'; a name is 1 to 64 letters"):
        identity.peer(made((NameOID.COMMON_NAME, name)))


@pytest.mark.parametrize("subject, number", [(((OU, "operator"),), 0), ((ADA, (NameOID.COMMON_NAME, "eve")), 2)])
def test_a_peer_without_exactly_one_name_is_refused(subject, number):
    with pytest.raises(CertificateError, match=f"has {number} common names; it must have one, its name"):
        identity.peer(made(*subject))


@pytest.mark.parametrize("purposes", [(), (ExtendedKeyUsageOID.SERVER_AUTH,), (ExtendedKeyUsageOID.CODE_SIGNING,)])
def test_a_certificate_that_is_not_for_clients_is_refused(purposes):
    with pytest.raises(CertificateError, match="is not a client's; `cloister certs client` makes those"):
        identity.peer(made(ADA, purposes=purposes))


@pytest.mark.parametrize("name", ["ca", "server"])
def test_the_servers_certificate_and_the_authoritys_are_no_peers(certs, name):
    with pytest.raises(CertificateError, match="the peer's certificate is not a client's"):
        identity.peer(pem(certs, name))


@pytest.mark.parametrize("text", [b"", b"rubbish", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_peer_that_shows_no_certificate_is_refused(text):
    with pytest.raises(CertificateError, match="the peer's certificate: not a certificate in PEM"):
        identity.peer(text)


def test_a_certificate_whose_extensions_cannot_be_read_is_an_error_of_ours():
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(*ADA)])
    damaged = x509.UnrecognizedExtension(x509.ExtendedKeyUsage.oid, b"\x30\x03\x06\x05")
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), 7, now, now + timedelta(days=1))
        .add_extension(damaged, critical=False)
        .sign(key, hashes.SHA256())
    )
    with pytest.raises(CertificateError, match="the peer's certificate: not a certificate in PEM"):
        identity.peer(signed.public_bytes(serialization.Encoding.PEM))
