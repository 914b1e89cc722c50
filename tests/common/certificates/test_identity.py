from __future__ import annotations

import errno
import os
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from common.certificates import authority, identity
from common.errors import CertificateError
from common.wire import channel


@pytest.fixture(scope="module")
def certs(tmp_path_factory) -> Path:
    """An authority, a server and two clients. Tests only read it."""
    folder = tmp_path_factory.mktemp("certs")
    authority.create_authority(folder)
    authority.create_server(folder, ["localhost", "127.0.0.1"])
    authority.create_client(folder, "cleveland")
    authority.create_client(folder, "hungary")
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """Another federation's, with the same names in it."""
    folder = tmp_path_factory.mktemp("foreign")
    authority.create_authority(folder)
    authority.create_client(folder, "cleveland")
    return folder


def load(folder: Path, name: str) -> identity.TLSMaterial:
    return identity.load(folder / "ca.pem", folder / f"{name}.pem", folder / f"{name}.key")


def certificate(folder: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / f"{name}.pem").read_bytes())


def write_dated(folder: Path, name: str, *, start: timedelta, end: timedelta, authority: Path) -> None:
    """A client's certificate and key, as an organisation's own tools might make them (RSA), valid between two
    moments counted from now."""
    now, key = datetime.now(UTC), rsa.generate_private_key(65537, 2048)
    signer = serialization.load_pem_private_key((authority / "ca.key").read_bytes(), password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    signed = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(certificate(authority, "ca").subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now + start)
        .not_valid_after(now + end)
        .sign(signer, hashes.SHA256())
    )
    (folder / f"{name}.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / f"{name}.key").write_bytes(key.private_bytes(*pem))


@pytest.mark.parametrize("name", ["server", "cleveland"])
def test_what_is_created_can_be_loaded(certs, name):
    material = load(certs, name)
    assert material.certificate == (certs / f"{name}.pem").read_bytes()
    assert material.ca == (certs / "ca.pem").read_bytes()


def test_a_client_is_called_as_its_certificate_says(certs):
    (name,) = certificate(certs, "cleveland").subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    assert name.value == "cleveland"


def test_a_client_cannot_sign_further_certificates(certs):
    constraints = certificate(certs, "cleveland").extensions.get_extension_for_class(x509.BasicConstraints).value
    assert not constraints.ca


@pytest.mark.parametrize("name", ["ca", "server", "cleveland"])
def test_only_its_owner_can_read_a_key(certs, name):
    assert (certs / f"{name}.key").stat().st_mode & 0o777 == 0o600


def test_no_key_stands_in_a_certificate(certs):
    assert all(b"PRIVATE" not in path.read_bytes() for path in certs.glob("*.pem"))


@pytest.mark.parametrize("kept", ["pem", "key"])
def test_a_file_that_exists_is_not_overwritten_and_nothing_is_written_beside_it(tmp_path, kept):
    (tmp_path / f"ca.{kept}").write_text("precious")
    with pytest.raises(CertificateError, match=rf"ca\.{kept}: exists; move it away first"):
        authority.create_authority(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(f"ca.{kept}", "precious")]


@pytest.mark.parametrize("create", [authority.create_authority, lambda f: authority.create_client(f, "cleveland")])
def test_what_was_created_stays_as_it_is(certs, create):
    before = {path.name: path.read_bytes() for path in certs.iterdir()}
    with pytest.raises(CertificateError, match="exists; move it away first"):
        create(certs)
    assert {path.name: path.read_bytes() for path in certs.iterdir()} == before


@pytest.mark.parametrize("name", ["", "../server", "a/b", "x" * 65, "-x", "naïve", "a b", "a\n"])
def test_a_client_whose_name_would_be_no_file_or_no_common_name_is_refused(certs, name):
    with pytest.raises(CertificateError, match=r"cannot be called .* letters, digits"):
        authority.create_client(certs, name)


@pytest.mark.parametrize("create", [authority.create_client, authority.create_operator])
@pytest.mark.parametrize(
    "name, role", [("ca", "ca"), ("server", "server"), ("revoked", "revocation list"), ("Server", "server")]
)
def test_nobody_can_take_the_files_of_another_role(certs, create, name, role):
    with pytest.raises(CertificateError, match=f"cannot be called {name}: its files would be the {role}'s"):
        create(certs, name)


@pytest.mark.parametrize("host", ["", "naïve.example", "a b", "https://x", "127.0.0.1:8080"])
def test_a_server_for_what_is_no_host_is_refused(certs, host):
    with pytest.raises(CertificateError, match="is neither a host's name nor an address"):
        authority.create_server(certs, [host])


def test_a_server_may_have_a_name_longer_than_a_common_name(certs, tmp_path):
    for name in ("ca.pem", "ca.key"):
        (tmp_path / name).write_bytes((certs / name).read_bytes())
    host = f"{'a' * 60}.{'b' * 60}.example"
    authority.create_server(tmp_path, [host, "::1"])
    names = certificate(tmp_path, "server").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [host]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["::1"]


def test_a_folder_without_authority_cannot_create_a_client(tmp_path):
    with pytest.raises(CertificateError, match=r"ca\.pem: cannot be read .*`cloister certs` makes certificates"):
        authority.create_client(tmp_path, "cleveland")


@pytest.mark.parametrize(
    "key, message", [(b"rubbish", "not a private key in PEM"), (None, "is not the elliptic-curve")]
)
def test_an_authority_whose_key_is_another_signs_nothing(certs, foreign, tmp_path, key, message):
    (tmp_path / "ca.pem").write_bytes((certs / "ca.pem").read_bytes())
    (tmp_path / "ca.key").write_bytes(key or (foreign / "ca.key").read_bytes())
    with pytest.raises(CertificateError, match=rf"ca\.key: {message}"):
        authority.create_client(tmp_path, "cleveland")
    assert not (tmp_path / "cleveland.key").exists()


def test_a_full_disk_is_an_error_of_ours(tmp_path, monkeypatch):
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(CertificateError, match=r"ca\.key: cannot be written \(No space left on device\)"):
        authority.create_authority(tmp_path)


def test_a_folder_that_is_a_file_is_an_error_of_ours(tmp_path):
    (tmp_path / "certs").write_text("")
    with pytest.raises(CertificateError, match="certs: cannot be made"):
        authority.create_authority(tmp_path / "certs")


@pytest.mark.parametrize("missing", ["ca.pem", "cleveland.pem", "cleveland.key"])
def test_a_missing_file_is_named(certs, tmp_path, missing):
    for name in {"ca.pem", "cleveland.pem", "cleveland.key"} - {missing}:
        (tmp_path / name).write_bytes((certs / name).read_bytes())
    with pytest.raises(CertificateError, match=rf"{missing}: cannot be read \(No such file or directory\)"):
        load(tmp_path, "cleveland")


@pytest.mark.parametrize(
    "damaged, message",
    [
        ("ca.pem", "not a certificate in PEM"),
        ("cleveland.pem", "not a certificate in PEM"),
        ("cleveland.key", "not a private key in PEM without password"),
    ],
)
@pytest.mark.parametrize("content", [b"", b"rubbish", b"\xff\xfe", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_a_file_that_is_not_pem_is_named(certs, tmp_path, damaged, message, content):
    for name in ("ca.pem", "cleveland.pem", "cleveland.key"):
        (tmp_path / name).write_bytes(content if name == damaged else (certs / name).read_bytes())
    with pytest.raises(CertificateError, match=f"{damaged}: {message}"):
        load(tmp_path, "cleveland")


def test_a_key_with_a_password_is_refused(certs, tmp_path):
    key = serialization.load_pem_private_key((certs / "cleveland.key").read_bytes(), password=None)
    locked = serialization.BestAvailableEncryption(b"secret")
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
    (tmp_path / "locked.key").write_bytes(pem)
    with pytest.raises(CertificateError, match=r"locked\.key: not a private key in PEM without password"):
        identity.load(certs / "ca.pem", certs / "cleveland.pem", tmp_path / "locked.key")


def test_a_certificate_of_another_authority_is_refused_though_its_names_are_the_same(certs, foreign):
    with pytest.raises(CertificateError, match=r"cleveland\.pem: was not issued by the authority in .*ca\.pem"):
        identity.load(certs / "ca.pem", foreign / "cleveland.pem", foreign / "cleveland.key")


def test_a_certificate_with_the_key_of_another_is_refused(certs):
    with pytest.raises(CertificateError, match=r"hungary\.key: is not the key of .*cleveland\.pem"):
        identity.load(certs / "ca.pem", certs / "cleveland.pem", certs / "hungary.key")


DAY = timedelta(days=1)


@pytest.mark.parametrize(
    "start, end, message",
    [
        (-2 * DAY, -DAY, r"dated\.pem: expired on \d{4}-\d\d-\d\d; ask for a new one"),
        (DAY, 2 * DAY, r"dated\.pem: not valid before .*; is the clock right\?"),
    ],
    ids=["expired", "not yet valid"],
)
def test_a_certificate_outside_its_time_is_refused(certs, tmp_path, start, end, message):
    write_dated(tmp_path, "dated", start=start, end=end, authority=certs)
    with pytest.raises(CertificateError, match=message):
        identity.load(certs / "ca.pem", tmp_path / "dated.pem", tmp_path / "dated.key")


def test_keys_that_other_tools_made_are_welcome(certs, tmp_path):
    write_dated(tmp_path, "dated", start=-DAY, end=DAY, authority=certs)
    identity.load(certs / "ca.pem", tmp_path / "dated.pem", tmp_path / "dated.key")


@pytest.mark.parametrize(
    "host, loopback",
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.1", False),
        ("example.org", False),
        ("127.0.0.1.example.org", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_only_the_machine_itself_is_loopback(host, loopback):
    assert channel.is_loopback(host) is loopback


def loopback() -> tuple[socket.socket, socket.socket]:
    """Two ends of one TCP connection over 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        theirs = socket.create_connection(listening.getsockname(), timeout=10)
        ours, _ = listening.accept()
    ours.settimeout(10)
    return ours, theirs


def handshake(
    server: tuple[Path, str], client: tuple[Path, str], *, host: str = "localhost", revoked: Path | None = None
) -> str:
    """One mutual TLS 1.3 connection with strict verifiers on both sides; the server looks into `revoked`, if given.
    Returns the client's name as the server sees it. Either side's refusal raises."""
    contexts = []
    for protocol, (folder, name) in ((ssl.PROTOCOL_TLS_SERVER, server), (ssl.PROTOCOL_TLS_CLIENT, client)):
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_verify_locations(folder / "ca.pem")
        context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
        contexts.append(context)
    if revoked is not None:
        contexts[0].load_verify_locations(revoked)
        contexts[0].verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    ours, theirs = loopback()
    seen: list[object] = []

    def serve() -> None:
        try:
            with contexts[0].wrap_socket(ours, server_side=True) as connection:
                subject = connection.getpeercert()["subject"]
                seen.append(dict(pair for group in subject for pair in group)["commonName"])
                connection.sendall(b"!")
        except OSError as error:
            seen.append(error)
            ours.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with contexts[1].wrap_socket(theirs, server_hostname=host) as connection:
            connection.recv(1)
    finally:
        theirs.close()
        thread.join(timeout=10)
    if isinstance(seen[0], OSError):
        raise seen[0]
    return str(seen[0])


def test_a_verifier_that_is_strict_about_rfc_5280_wants_more_than_other_tools_may_write(certs, tmp_path):
    # Without this, the connections below would pass if the verifiers were lax.
    write_dated(tmp_path, "plain", start=-DAY, end=DAY, authority=certs)
    (tmp_path / "ca.pem").write_bytes((certs / "ca.pem").read_bytes())
    with pytest.raises(ssl.SSLError, match="alert certificate unknown"):
        handshake((certs, "server"), (tmp_path, "plain"))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_server_and_client_trust_each_other_and_the_server_learns_the_clients_name(certs, host):
    assert handshake((certs, "server"), (certs, "cleveland"), host=host) == "cleveland"


def test_a_client_of_another_federation_is_turned_away(certs, foreign, tmp_path):
    for name in ("cleveland.pem", "cleveland.key"):
        (tmp_path / name).write_bytes((foreign / name).read_bytes())
    (tmp_path / "ca.pem").write_bytes((certs / "ca.pem").read_bytes())
    with pytest.raises(ssl.SSLError, match=r"alert (decrypt error|unknown ca)"):
        handshake((certs, "server"), (tmp_path, "cleveland"))


def test_a_client_cannot_pose_as_the_server(certs):
    with pytest.raises(ssl.SSLCertVerificationError, match="unsuitable certificate purpose"):
        handshake((certs, "cleveland"), (certs, "hungary"))


def test_a_server_is_not_trusted_under_another_name(certs):
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake((certs, "server"), (certs, "cleveland"), host="example.org")


@pytest.mark.parametrize("name", ["ca", "server", "cleveland"])
def test_what_is_signed_names_its_own_key_and_the_one_that_signed_it(certs, name):
    extensions = certificate(certs, name).extensions
    own = x509.SubjectKeyIdentifier.from_public_key(certificate(certs, name).public_key()).digest
    signer = x509.SubjectKeyIdentifier.from_public_key(certificate(certs, "ca").public_key()).digest
    assert extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest == own
    assert extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier == signer


@pytest.mark.parametrize("mode, warns", [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_a_key_that_others_can_read_is_warned_of(certs, tmp_path, caplog, mode, warns):
    key = tmp_path / "cleveland.key"
    key.write_bytes((certs / "cleveland.key").read_bytes())
    key.chmod(mode)
    identity.load(certs / "ca.pem", certs / "cleveland.pem", key)
    warning = f"{key}: open to others than its owner (mode {mode:o}); run `chmod 600 {key}`"
    assert caplog.messages == ([warning] if warns else [])


@pytest.mark.parametrize(
    "days, when",
    [
        (31, None),
        (30, "expires on 2030-05-31, in 30 days"),
        (8, "expires on 2030-05-09, in 8 days"),
        (1, "expires on 2030-05-02, tomorrow"),
        (0, "expires on 2030-05-01, today"),
        (-1, "expired on 2030-04-30"),
    ],
)
def test_a_certificate_that_expires_soon_is_warned_of_in_one_line(certs, tmp_path, days, when):
    now = datetime(2030, 5, 1, 12, tzinfo=UTC)
    end = now + timedelta(days=days, hours=1) - datetime.now(UTC)
    write_dated(tmp_path, "ada", start=-DAY, end=end, authority=certs)
    warning = identity.expiry_warning((tmp_path / "ada.pem").read_bytes(), "ada.pem", now=now)
    rest = "; `cloister certs client ada`, where the federation's authority is, makes a new one"
    assert warning == (f"ada.pem {when}{rest}" if when else None)


@pytest.mark.parametrize(
    "name, command",
    [
        ("ca", "cloister certs init"),
        ("server", "cloister certs server HOST..."),
        ("hungary", "cloister certs client hungary"),
        ("boss", "cloister certs operator boss"),
    ],
)
def test_a_warning_names_the_command_that_makes_a_new_one(certs, tmp_path, name, command):
    for file in ("ca.pem", "ca.key", "server.pem", "hungary.pem"):
        (tmp_path / file).write_bytes((certs / file).read_bytes())
    authority.create_operator(tmp_path, "boss")
    late = datetime(2100, 1, 1, tzinfo=UTC)
    warning = identity.expiry_warning((tmp_path / f"{name}.pem").read_bytes(), f"x/{name}.pem", now=late)
    assert warning is not None and f"x/{name}.pem expired on" in warning and f"`{command}`" in warning


def test_a_warning_about_what_is_no_certificate_is_an_error_of_ours():
    with pytest.raises(CertificateError, match=r"ada\.pem: not a certificate in PEM"):
        identity.expiry_warning(b"rubbish", "ada.pem")
