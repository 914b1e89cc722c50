"""What a running server holds, as its files change under it."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from common.certificates import authority, files
from common.certificates.identity import ServerIdentity
from common.errors import CertificateError
from tests.common.certificates.test_identity import DAY, load, write_dated

FILES = ("ca.pem", "server.pem", "server.key")


@pytest.fixture(scope="module")
def federation(tmp_path_factory) -> Path:
    """An authority's folder, before anything is revoked. Tests work on copies."""
    folder = tmp_path_factory.mktemp("federation")
    authority.create_authority(folder)
    authority.create_server(folder, ["localhost"])
    for name in ("ada", "bob"):
        authority.create_client(folder, name)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Another federation's, with a revocation list."""
    folder = tmp_path_factory.mktemp("other")
    authority.create_authority(folder)
    authority.create_server(folder, ["localhost"])
    authority.create_client(folder, "eve")
    authority.revoke(folder, "eve")
    return folder


@pytest.fixture
def certs(federation, tmp_path) -> Path:
    return shutil.copytree(federation, tmp_path / "certs")


def serial(folder: Path, name: str) -> int:
    return x509.load_pem_x509_certificate((folder / f"{name}.pem").read_bytes()).serial_number


def replace(target: Path, source: Path | bytes) -> None:
    """As `mv` does: a new file, so that no two states of it look the same."""
    fresh = target.with_name("fresh")
    fresh.write_bytes(source if isinstance(source, bytes) else source.read_bytes())
    fresh.chmod(0o600)
    fresh.replace(target)


def renew(folder: Path) -> None:
    (folder / "server.pem").unlink()
    (folder / "server.key").unlink()
    authority.create_server(folder, ["localhost"])


def test_a_server_holds_what_its_files_hold(certs):
    identity = ServerIdentity(certs)
    assert identity.material == load(certs, "server")
    assert not identity.is_revoked(serial(certs, "ada"))


def test_a_server_starts_with_the_list_that_is_there(certs):
    ada, bob = serial(certs, "ada"), serial(certs, "bob")
    authority.revoke(certs, "ada")
    identity = ServerIdentity(certs)
    assert identity.is_revoked(ada)
    assert not identity.is_revoked(bob)


@pytest.mark.parametrize("name", FILES)
def test_a_server_does_not_start_without_a_file(certs, name):
    (certs / name).unlink()
    with pytest.raises(CertificateError, match=rf"{name}: cannot be read \(No such file"):
        ServerIdentity(certs)


@pytest.mark.parametrize("content", [b"", b"rubbish", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"])
def test_a_server_does_not_start_with_a_damaged_list(certs, content):
    (certs / "revoked.pem").write_bytes(content)
    with pytest.raises(CertificateError, match=r"revoked\.pem: not a revocation list in PEM; put back a copy"):
        ServerIdentity(certs)


def test_a_server_does_not_start_with_a_list_whose_extensions_cannot_be_read(certs):
    ca, now = x509.load_pem_x509_certificate((certs / "ca.pem").read_bytes()), datetime.now(UTC)
    signer = load_pem_private_key((certs / "ca.key").read_bytes(), password=None)
    damaged = x509.UnrecognizedExtension(x509.CRLNumber.oid, b"\x30\x03")
    builder = x509.CertificateRevocationListBuilder(ca.subject, now, now + DAY).add_extension(damaged, critical=False)
    (certs / "revoked.pem").write_bytes(builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM))
    with pytest.raises(CertificateError, match=r"revoked\.pem: not a revocation list in PEM"):
        ServerIdentity(certs)


def test_a_server_does_not_start_with_a_list_it_cannot_read(certs):
    (certs / "revoked.pem").mkdir()
    with pytest.raises(CertificateError, match=r"revoked\.pem: cannot be read \(Is a directory\)"):
        ServerIdentity(certs)


def test_a_server_does_not_start_with_the_list_of_another_authority(certs, other):
    shutil.copy(other / "revoked.pem", certs)
    with pytest.raises(CertificateError, match=r"revoked\.pem: was not signed by the authority beside it; put back"):
        ServerIdentity(certs)


def test_a_server_does_not_start_with_a_list_that_was_changed(certs):
    authority.revoke(certs, "ada")
    der = bytearray(x509.load_pem_x509_crl((certs / "revoked.pem").read_bytes()).public_bytes(Encoding.DER))
    der[-1] ^= 1  # the last byte of the signature
    (certs / "revoked.pem").write_bytes(x509.load_der_x509_crl(bytes(der)).public_bytes(Encoding.PEM))
    with pytest.raises(CertificateError, match=r"revoked\.pem: was not signed by the authority beside it"):
        ServerIdentity(certs)


def test_a_server_does_not_start_with_a_clients_certificate(certs):
    for suffix in ("pem", "key"):
        replace(certs / f"server.{suffix}", certs / f"ada.{suffix}")
    with pytest.raises(CertificateError, match=r"server\.pem: is not a server's; `cloister certs server HOST\.\.\.`"):
        ServerIdentity(certs)


def test_a_server_starts_with_a_certificate_that_says_nothing_of_its_purpose(certs):
    write_dated(certs, "server", start=-DAY, end=DAY, authority=certs)
    assert ServerIdentity(certs).material == load(certs, "server")


def test_a_server_does_not_start_with_a_certificate_that_was_revoked(certs):
    aside, _ = authority.revoke(certs, "server")
    aside.rename(certs / "server.pem")
    aside.with_suffix(".key").rename(certs / "server.key")
    with pytest.raises(CertificateError, match=r"server\.pem: was revoked; `cloister certs server HOST\.\.\.` makes"):
        ServerIdentity(certs)


def test_a_server_warns_of_a_key_that_others_can_read(certs, caplog):
    (certs / "server.key").chmod(0o644)
    ServerIdentity(certs)
    path = certs / "server.key"
    assert caplog.messages == [f"{path}: open to others than its owner (mode 644); run `chmod 600 {path}`"]


@pytest.mark.parametrize("days, soon", [(29, True), (32, False)])
def test_a_server_warns_of_its_own_certificate_that_expires_soon(certs, days, soon):
    (certs / "server.pem").unlink()
    (certs / "server.key").unlink()
    authority.create_server(certs, ["localhost"], days=days)
    found = ServerIdentity(certs).warnings()
    assert [warning.partition(" expires on ")[0] for warning in found] == ([str(certs / "server.pem")] if soon else [])


def test_nothing_is_reread_while_no_file_changes(certs, monkeypatch):
    identity = ServerIdentity(certs)
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("a file was read"))
    monkeypatch.setattr(Path, "read_bytes", lambda *_: pytest.fail("a file was read"))
    assert not identity.refresh()


def test_a_revocation_reaches_a_running_server(certs):
    identity, ada = ServerIdentity(certs), serial(certs, "ada")
    authority.revoke(certs, "ada")
    assert not identity.is_revoked(ada)
    assert identity.refresh()
    assert identity.is_revoked(ada)
    assert not identity.refresh()


def test_a_second_revocation_reaches_a_running_server_too(certs):
    ada, bob = serial(certs, "ada"), serial(certs, "bob")
    authority.revoke(certs, "ada")
    identity = ServerIdentity(certs)
    authority.revoke(certs, "bob")
    assert identity.refresh()
    assert identity.is_revoked(ada) and identity.is_revoked(bob)


def test_a_new_certificate_reaches_a_running_server(certs, caplog):
    identity = ServerIdentity(certs)
    renew(certs)
    assert identity.refresh()
    assert identity.material == load(certs, "server")
    assert caplog.messages == []


def test_a_file_that_was_only_touched_changes_nothing(certs):
    identity = ServerIdentity(certs)
    os.utime(certs / "server.pem", ns=(1, 1))
    assert not identity.refresh()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if (r.name, r.levelno) == ("cloister.server", logging.WARNING)]


def test_a_half_copied_certificate_is_warned_of_once_and_taken_when_it_is_whole(certs, caplog):
    identity, before = ServerIdentity(certs), load(certs, "server")
    old = before.key
    renew(certs)
    new = (certs / "server.key").read_bytes()
    replace(certs / "server.key", old)
    assert [identity.refresh() for _ in range(3)] == [False] * 3
    assert identity.material == before
    (warning,) = warnings(caplog)
    assert "server.key: is not the key of" in warning and "the earlier ones stay in use" in warning
    replace(certs / "server.key", new)
    assert identity.refresh()
    assert identity.material == load(certs, "server")
    assert len(warnings(caplog)) == 1


def test_each_unusable_change_is_warned_of(certs, caplog):
    identity = ServerIdentity(certs)
    for content in (b"rubbish", b"other rubbish"):
        replace(certs / "server.pem", content)
        assert not identity.refresh()
    assert len(warnings(caplog)) == 2


@pytest.mark.parametrize("content", [b"", b"rubbish"])
def test_a_damaged_list_lets_nobody_back_in(certs, caplog, content):
    ada = serial(certs, "ada")
    authority.revoke(certs, "ada")
    identity = ServerIdentity(certs)
    replace(certs / "revoked.pem", content)
    assert not identity.refresh()
    assert not identity.refresh()
    assert identity.is_revoked(ada)
    (warning,) = warnings(caplog)
    assert "revoked.pem: not a revocation list in PEM" in warning and "the earlier list stays in use" in warning


def test_the_list_of_another_authority_lets_nobody_back_in(certs, other, caplog):
    ada = serial(certs, "ada")
    authority.revoke(certs, "ada")
    identity = ServerIdentity(certs)
    replace(certs / "revoked.pem", other / "revoked.pem")
    assert not identity.refresh()
    assert identity.is_revoked(ada)
    (warning,) = warnings(caplog)
    assert "revoked.pem: was not signed by the authority beside it" in warning


def test_a_list_that_is_deleted_lets_nobody_back_in(certs, caplog):
    ada, bob = serial(certs, "ada"), serial(certs, "bob")
    authority.revoke(certs, "ada")
    identity = ServerIdentity(certs)
    (certs / "revoked.pem").unlink()
    assert [identity.refresh() for _ in range(2)] == [False] * 2
    assert identity.is_revoked(ada)
    (warning,) = warnings(caplog)
    assert "revoked.pem: is gone; put it back: they stay revoked until the server restarts" in warning
    authority.revoke(certs, "bob")  # begins a new list, without ada
    assert identity.refresh()
    assert identity.is_revoked(ada) and identity.is_revoked(bob)


def test_an_older_list_lets_nobody_back_in(certs, caplog):
    ada, bob = serial(certs, "ada"), serial(certs, "bob")
    authority.revoke(certs, "ada")
    old = (certs / "revoked.pem").read_bytes()
    authority.revoke(certs, "bob")
    identity = ServerIdentity(certs)
    replace(certs / "revoked.pem", old)
    assert not identity.refresh()
    assert identity.is_revoked(ada) and identity.is_revoked(bob)
    (warning,) = warnings(caplog)
    assert "revoked.pem: lacks 1 that were revoked before; put it back" in warning


@pytest.mark.parametrize("name", FILES)
def test_a_revocation_counts_though_the_servers_own_files_are_unusable(certs, name, caplog):
    identity, ada, before = ServerIdentity(certs), serial(certs, "ada"), load(certs, "server")
    authority.revoke(certs, "ada")
    replace(certs / name, b"rubbish")
    assert identity.refresh()
    assert identity.is_revoked(ada)
    assert identity.material == before
    assert len(warnings(caplog)) == 1


def test_a_server_whose_own_certificate_is_revoked_keeps_it_and_warns(certs, caplog):
    identity, before, pem = ServerIdentity(certs), load(certs, "server"), (certs / "server.pem").read_bytes()
    aside, _ = authority.revoke(certs, "server")
    (certs / "server.pem").write_bytes(pem)
    aside.with_suffix(".key").rename(certs / "server.key")
    assert identity.refresh()  # the list is another
    assert identity.material == before
    (warning,) = warnings(caplog)
    assert "server.pem: was revoked" in warning


def test_another_authority_is_taken_when_everything_is_its_own(certs, other, caplog):
    authority.revoke(certs, "ada")
    identity, before = ServerIdentity(certs), load(certs, "server")
    for name in FILES:
        replace(certs / name, other / name)
    assert not identity.refresh()  # its certificates, and the list of the one before
    assert identity.material == before
    replace(certs / "revoked.pem", other / "revoked.pem")
    assert identity.refresh()
    assert identity.material == load(other, "server")
    (aside,) = other.glob("eve.revoked-*.pem")
    assert identity.is_revoked(serial(other, aside.stem))


def test_refresh_never_raises(certs, caplog):
    identity, before = ServerIdentity(certs), load(certs, "server")
    shutil.rmtree(certs)
    assert not identity.refresh()
    certs.write_text("now a file")
    assert not identity.refresh()
    assert identity.material == before
    assert warnings(caplog)


def test_many_threads_may_refresh_and_ask_at_once(certs):
    identity, ada = ServerIdentity(certs), serial(certs, "ada")
    stop, wrong = threading.Event(), []

    def work() -> None:
        was_revoked = False
        while not stop.is_set():
            try:
                identity.refresh()
                now_revoked = identity.is_revoked(ada)
                if was_revoked and not now_revoked:
                    wrong.append("let back in")
                was_revoked = now_revoked
                material = identity.material
                own = x509.load_pem_x509_certificate(material.certificate).public_key()
                if files.parse_key(material.key, certs).public_key() != own:
                    wrong.append("a certificate with another's key")
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        renew(certs)
    authority.revoke(certs, "ada")
    for _ in range(10):
        renew(certs)
    stop.set()
    for thread in threads:
        thread.join(timeout=30)
    identity.refresh()
    assert wrong == []
    assert identity.is_revoked(ada)
    assert identity.material == load(certs, "server")
