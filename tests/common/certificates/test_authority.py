"""Certificates made for a time, revoked and listed: the authority's folder, and the verbs on it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import ssl
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from rich.console import Console
from typer.testing import CliRunner, Result

import cloister
from cloister.certs import show
from common.certificates import authority
from common.certificates.listing import Listed, certificates_in
from common.errors import CertificateError
from tests.common.certificates.test_identity import DAY, certificate, handshake, write_dated


@pytest.fixture(scope="module")
def federation(tmp_path_factory) -> Path:
    """An authority's folder, before anything is revoked. Tests work on copies."""
    folder = tmp_path_factory.mktemp("federation")
    authority.create_authority(folder)
    authority.create_server(folder, ["localhost"])
    authority.create_operator(folder)
    for name in ("ada", "bob"):
        authority.create_client(folder, name)
    return folder


@pytest.fixture
def certs(federation, tmp_path) -> Path:
    return shutil.copytree(federation, tmp_path / "certs")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cloister.app, ["certs", *map(str, arguments)])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def revoked(folder: Path) -> list[int]:
    found = x509.load_pem_x509_crl((folder / "revoked.pem").read_bytes())
    return [entry.serial_number for entry in found]


def write_authority(folder: Path, *, end: timedelta, digest: bytes | None = None) -> None:
    """An authority that other tools made, which calls its key `digest`, or does not say what it calls it."""
    now, key = datetime.now(UTC), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ours")])
    builder = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - 2 * DAY, now + end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(authority._key_usage(signs=True), critical=True)
    )
    if digest is not None:
        builder = builder.add_extension(x509.SubjectKeyIdentifier(digest), critical=False)
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(pem))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "ca.key").write_bytes(key.private_bytes(pem, *plain))
    (folder / "ca.key").chmod(0o600)


# Making


def test_a_new_authoritys_folder_is_its_owners_alone(tmp_path):
    authority.create_authority(tmp_path / "new" / "certs")
    assert (tmp_path / "new" / "certs").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_was_there_keeps_its_mode(tmp_path):
    tmp_path.chmod(0o750)
    authority.create_authority(tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o750


def test_an_authority_is_not_made_beside_the_list_of_another(tmp_path):
    (tmp_path / "revoked.pem").write_text("precious")
    with pytest.raises(CertificateError, match=r"revoked\.pem: exists, and is another authority's; move it away"):
        authority.create_authority(tmp_path)
    assert files(tmp_path) == {"revoked.pem": b"precious"}


@pytest.mark.parametrize("name", ["server", "operator", "ada"])
def test_a_certificate_lasts_thirteen_months_and_an_authority_ten_years(federation, name):
    for file, days in ((name, 397), ("ca", 3650)):
        left = certificate(federation, file).not_valid_after_utc - datetime.now(UTC)
        assert abs(left - days * DAY) < timedelta(minutes=30)


CREATE: dict[str, Callable[..., None]] = {
    "server": lambda folder, **days: authority.create_server(folder, ["localhost"], **days),
    "client": lambda folder, **days: authority.create_client(folder, "eve", **days),
    "operator": lambda folder, **days: authority.create_operator(folder, "boss", **days),
}


@pytest.mark.parametrize("kind, file", [("server", "server"), ("client", "eve"), ("operator", "boss")])
@pytest.mark.parametrize("days", [1, 825])
def test_a_certificate_lasts_as_long_as_asked(certs, kind, file, days):
    (certs / "server.pem").unlink()
    (certs / "server.key").unlink()
    CREATE[kind](certs, days=days)
    left = certificate(certs, file).not_valid_after_utc - datetime.now(UTC)
    assert abs(left - days * DAY) < timedelta(minutes=1)


@pytest.mark.parametrize("kind", list(CREATE))
@pytest.mark.parametrize("days", [-1, 0, 826])
def test_a_certificate_cannot_last_no_time_or_for_years(certs, kind, days):
    before = files(certs)
    with pytest.raises(CertificateError, match=f"a certificate can be valid for 1 to 825 days, not {days}"):
        CREATE[kind](certs, days=days)
    assert files(certs) == before


def test_a_certificate_does_not_outlive_its_authority(tmp_path):
    write_authority(tmp_path, end=10 * DAY)
    authority.create_client(tmp_path, "ada")
    assert certificate(tmp_path, "ada").not_valid_after_utc == certificate(tmp_path, "ca").not_valid_after_utc


def test_an_authority_that_expired_signs_nothing(tmp_path):
    write_authority(tmp_path, end=-DAY)
    with pytest.raises(CertificateError, match=r"ca\.pem: expired on \d{4}-\d\d-\d\d"):
        authority.create_client(tmp_path, "ada")
    assert not (tmp_path / "ada.key").exists()


def test_what_an_authority_of_other_tools_signs_names_its_key_as_it_does(tmp_path):
    write_authority(tmp_path, end=DAY, digest=b"of their own choice")
    authority.create_server(tmp_path, ["localhost"])
    authority.create_client(tmp_path, "ada")
    assert handshake((tmp_path, "server"), (tmp_path, "ada")) == "ada"


def test_an_authority_that_does_not_name_its_key_signs_too(tmp_path):
    write_authority(tmp_path, end=DAY)
    authority.create_client(tmp_path, "ada")
    named = certificate(tmp_path, "ada").extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    expected = x509.SubjectKeyIdentifier.from_public_key(certificate(tmp_path, "ca").public_key())
    assert named.key_identifier == expected.digest


def test_an_authority_whose_key_others_can_read_is_warned_of(certs, caplog):
    path = certs / "ca.key"
    path.chmod(0o644)
    authority.create_client(certs, "eve")
    assert caplog.messages == [f"{path}: open to others than its owner (mode 644); run `chmod 600 {path}`"]


def test_an_operator_is_a_client_with_a_unit_and_a_client_has_none(federation):
    units = {
        name: [
            a.value
            for a in certificate(federation, name).subject.get_attributes_for_oid(x509.NameOID.ORGANIZATIONAL_UNIT_NAME)
        ]
        for name in ("operator", "ada", "server")
    }
    assert units == {"operator": ["operator"], "ada": [], "server": []}
    assert handshake((federation, "server"), (federation, "operator")) == "operator"


def test_an_operators_key_is_its_owners_alone(federation):
    assert (federation / "operator.key").stat().st_mode & 0o777 == 0o600


def test_an_operator_is_not_made_over_a_client(certs):
    with pytest.raises(CertificateError, match=r"ada\.key: exists; move it away first"):
        authority.create_operator(certs, "ada")


@pytest.mark.parametrize("name", ["", "../x", "a b"])
def test_an_operator_needs_a_name_that_a_file_can_have(certs, name):
    with pytest.raises(CertificateError, match=r"an operator cannot be called .* letters, digits"):
        authority.create_operator(certs, name)


# Revoking


def test_a_revoked_client_is_turned_away_by_any_tls_server_that_reads_the_list(certs):
    authority.revoke(certs, "bob")  # so that there is a list
    assert handshake((certs, "server"), (certs, "ada"), revoked=certs / "revoked.pem") == "ada"
    aside, _ = authority.revoke(certs, "ada")
    with pytest.raises(ssl.SSLError, match="alert certificate revoked"):
        handshake((certs, "server"), (certs, aside.stem), revoked=certs / "revoked.pem")


def test_openssl_finds_the_list_signed_by_the_authority_and_lasting_as_long(certs):
    authority.revoke(certs, "ada")

    def openssl(*arguments: str) -> str:
        done = subprocess.run(["openssl", *arguments], cwd=certs, check=True, capture_output=True, text=True)
        return done.stdout + done.stderr

    assert "verify OK" in openssl("crl", "-in", "revoked.pem", "-CAfile", "ca.pem", "-noout")
    end = openssl("x509", "-in", "ca.pem", "-noout", "-enddate").removeprefix("notAfter=")
    assert openssl("crl", "-in", "revoked.pem", "-noout", "-nextupdate").removeprefix("nextUpdate=") == end


def test_a_list_grows_and_its_number_with_it(certs):
    serials = [certificate(certs, name).serial_number for name in ("ada", "operator", "server")]
    for count, name in enumerate(("ada", "operator", "server"), start=1):
        authority.revoke(certs, name)
        assert revoked(certs) == serials[:count]
        found = x509.load_pem_x509_crl((certs / "revoked.pem").read_bytes())
        assert found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == count


def test_a_list_without_a_number_is_continued(certs):
    now, ca = datetime.now(UTC), certificate(certs, "ca")
    signer = serialization.load_pem_private_key((certs / "ca.key").read_bytes(), password=None)
    builder = x509.CertificateRevocationListBuilder(ca.subject, now, now + DAY)
    builder = builder.add_revoked_certificate(
        x509.RevokedCertificateBuilder().serial_number(5).revocation_date(now).build()
    )
    signed = builder.sign(signer, hashes.SHA256())
    (certs / "revoked.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    serial = certificate(certs, "ada").serial_number
    authority.revoke(certs, "ada")
    assert revoked(certs) == [5, serial]


@pytest.mark.parametrize(
    "name, command",
    [
        ("ada", "cloister certs client ada"),
        ("operator", "cloister certs operator operator"),
        ("server", "cloister certs server HOST..."),
    ],
)
def test_a_revoked_certificate_is_moved_aside_with_its_key(certs, name, command):
    before, serial = files(certs), certificate(certs, name).serial_number
    aside, again = authority.revoke(certs, name)
    after = files(certs)
    assert (aside, again) == (certs / f"{name}.revoked-{serial:x}.pem", command)
    for suffix in ("pem", "key"):
        assert after.pop(f"{name}.revoked-{serial:x}.{suffix}") == before.pop(f"{name}.{suffix}")
    del after["revoked.pem"]
    assert after == before


def test_a_fresh_certificate_can_be_made_at_once_and_is_not_revoked(certs):
    authority.revoke(certs, "ada")
    authority.create_client(certs, "ada")
    assert certificate(certs, "ada").serial_number not in revoked(certs)
    assert handshake((certs, "server"), (certs, "ada"), revoked=certs / "revoked.pem") == "ada"


def test_a_certificate_whose_key_was_sent_away_can_be_revoked(certs):
    (certs / "ada.key").unlink()
    serial = certificate(certs, "ada").serial_number
    authority.revoke(certs, "ada")
    assert revoked(certs) == [serial]


def unchanged(folder: Path, name: str, message: str) -> None:
    """Revoking `name` fails so, and changes no file."""
    before = files(folder)
    with pytest.raises(CertificateError, match=message):
        authority.revoke(folder, name)
    assert files(folder) == before


@pytest.mark.parametrize(
    "name, command",
    [("ada", "cloister certs client ada"), ("server", r"cloister certs server HOST\.\.\.")],
)
def test_revoking_twice_says_how_to_make_a_new_one(certs, name, command):
    authority.revoke(certs, name)
    unchanged(certs, name, rf"{name} was revoked already, see .*{name}\.revoked-.*\.pem; `{command}` makes a new")


def test_a_revoked_certificate_that_was_put_back_cannot_be_revoked_again(certs):
    aside, _ = authority.revoke(certs, "ada")
    shutil.copy(aside, certs / "ada.pem")
    unchanged(certs, "ada", r"ada\.pem: was revoked already; move it and ada\.key away to make a new one")


def test_an_unknown_name_says_where_the_names_are(certs):
    unchanged(certs, "zoe", r"zoe\.pem: no such certificate; `cloister certs list` .* put a copy of zoe\.pem back")


@pytest.mark.parametrize("name", ["", "../ada", "a*", "-x"])
def test_what_can_be_no_name_is_not_looked_for(certs, name):
    unchanged(certs, name, r"no certificate can be called .*: a name is 1 to 64 letters")


def test_an_authority_cannot_revoke_itself(certs):
    unchanged(certs, "ca", "the authority cannot revoke itself: `cloister certs init --folder NEW` makes another")


def test_only_the_authority_that_issued_a_certificate_can_revoke_it(certs, tmp_path):
    authority.create_authority(tmp_path / "other")
    authority.create_client(tmp_path / "other", "eve")
    shutil.copy(tmp_path / "other" / "eve.pem", certs)
    unchanged(certs, "eve", r"eve\.pem: was not issued by the authority in .*ca\.pem; only the one that issued it")


def test_what_is_no_certificate_cannot_be_revoked(certs):
    (certs / "eve.pem").write_text("rubbish")
    unchanged(certs, "eve", r"eve\.pem: not a certificate in PEM")


@pytest.mark.parametrize(
    "content, message", [(b"rubbish", "not a revocation list in PEM"), (None, "was not signed by")]
)
def test_a_list_that_cannot_be_trusted_is_not_replaced(certs, tmp_path, content, message):
    authority.create_authority(tmp_path / "other")
    authority.create_client(tmp_path / "other", "eve")
    authority.revoke(tmp_path / "other", "eve")
    (certs / "revoked.pem").write_bytes(content or (tmp_path / "other" / "revoked.pem").read_bytes())
    unchanged(certs, "ada", rf"revoked\.pem: {message}")


def test_without_the_authoritys_key_nothing_is_revoked(certs):
    (certs / "ca.key").unlink()
    unchanged(certs, "ada", r"ca\.key: cannot be read")


def test_one_revocation_at_a_time(certs):
    (certs / "revoked.pem.new").write_text("of another process")
    unchanged(
        certs, "ada", r"revoked\.pem\.new: exists: another `cloister certs revoke` is at work, or was interrupted"
    )


def broken(*_: object, **__: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step, owner", [("open", os), ("fsync", os), ("replace", Path)])
def test_a_list_is_written_whole_or_not_at_all(certs, monkeypatch, step, owner):
    authority.revoke(certs, "bob")
    monkeypatch.setattr(owner, step, broken)
    unchanged(certs, "ada", r"revoked\.pem(\.new)?: cannot be written \(No space left on device\)")


def test_a_list_is_on_the_disk_before_it_takes_the_place_of_the_old_one(certs, monkeypatch):
    did = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (did.append("fsync"), fsync(file))[1])
    monkeypatch.setattr(Path, "replace", lambda path, target: (did.append(target.name), replace(path, target))[1])
    authority.revoke(certs, "ada")
    assert did == ["fsync", "revoked.pem", "fsync"]  # the list, its place, the folder


def test_a_certificate_that_cannot_be_moved_is_revoked_all_the_same(certs, monkeypatch):
    serial = certificate(certs, "ada").serial_number
    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(
        CertificateError, match=r"ada\.key: revoked, but cannot be moved \(No space left.*; move it away"
    ):
        authority.revoke(certs, "ada")
    assert revoked(certs) == [serial]


# Listing


def made(folder: Path) -> datetime:
    """When ada's certificate was made, so that no midnight comes between."""
    return certificate(folder, "ada").not_valid_before_utc + timedelta(minutes=5)


def states(folder: Path, *, now: datetime | None = None) -> dict[str, str]:
    return {one.file: one.state for one in certificates_in(folder, now=now)}


def test_a_list_shows_every_certificate_with_whom_it_is_for(certs):
    listed = certificates_in(certs, now=made(certs))
    assert [(one.name, one.kind, one.state) for one in listed] == [
        ("ca", "authority", "valid"),
        ("server", "server", "valid"),
        ("operator", "operator", "valid"),
        ("ada", "client", "valid"),
        ("bob", "client", "valid"),
    ]
    assert [one.serial for one in listed] == [f"{certificate(certs, one.name).serial_number:x}" for one in listed]
    assert [one.days_left for one in listed] == [3650, 397, 397, 397, 397]


def test_a_certificate_for_neither_side_is_listed_as_other(certs):
    write_dated(certs, "plain", start=-DAY, end=DAY, authority=certs)
    assert certificates_in(certs)[-1].kind == "other"


def test_a_revoked_certificate_is_listed_by_the_name_it_had(certs):
    aside, _ = authority.revoke(certs, "ada")
    authority.create_client(certs, "ada")
    found = {one.file: (one.name, one.state) for one in certificates_in(certs) if one.name == "ada"}
    assert found == {"ada.pem": ("ada", "valid"), aside.name: ("ada", "revoked")}


def test_a_certificate_of_another_authority_is_foreign_and_so_is_that_authority(certs, tmp_path):
    authority.create_authority(tmp_path / "other")
    authority.create_client(tmp_path / "other", "eve")
    shutil.copy(tmp_path / "other" / "eve.pem", certs)
    shutil.copy(tmp_path / "other" / "ca.pem", certs / "theirs.pem")
    found = states(certs)
    assert (found["eve.pem"], found["theirs.pem"], found["ca.pem"]) == ("foreign", "foreign", "valid")


@pytest.mark.parametrize(
    "days, state, left",
    [(366, "valid", 31), (367, "expires soon", 30), (396, "expires soon", 1), (398, "expired", -1)],
)
def test_the_state_follows_the_calendar(certs, days, state, left):
    now = certificate(certs, "ada").not_valid_after_utc - 397 * DAY + days * DAY
    (ada,) = (one for one in certificates_in(certs, now=now) if one.name == "ada")
    assert (ada.state, ada.days_left) == (state, left)


def test_a_certificate_is_expired_from_the_second_it_ends(certs):
    end = certificate(certs, "ada").not_valid_after_utc
    second = timedelta(seconds=1)
    assert states(certs, now=end)["ada.pem"] == "expires soon"
    assert states(certs, now=end + second)["ada.pem"] == "expired"


def test_a_certificate_of_the_future_is_not_yet_valid(certs):
    write_dated(certs, "later", start=DAY, end=100 * DAY, authority=certs)
    assert states(certs)["later.pem"] == "not yet valid"


def test_what_is_revoked_stays_so_when_it_expires(certs):
    aside, _ = authority.revoke(certs, "ada")
    assert states(certs, now=datetime.now(UTC) + 400 * DAY)[aside.name] == "revoked"


@pytest.mark.parametrize(
    "file, message",
    [("eve.pem", "not a certificate in PEM"), ("revoked.pem", "not a revocation list in PEM")],
)
def test_a_file_that_is_not_what_it_is_called_is_named(certs, file, message):
    (certs / file).write_text("rubbish")
    with pytest.raises(CertificateError, match=rf"{file}: {message}"):
        certificates_in(certs)


def test_a_folder_without_an_authority_has_nothing_to_list(tmp_path):
    with pytest.raises(CertificateError, match=r"ca\.pem: cannot be read .*`cloister certs` makes certificates"):
        certificates_in(tmp_path)


def shown(listed: list[Listed], *, terminal: bool, width: int) -> str:
    out = StringIO()
    show(listed, Console(file=out, force_terminal=terminal, width=width, color_system=None))
    return out.getvalue()


def test_a_pipe_gets_one_whole_line_a_certificate(certs):
    authority.create_client(certs, "x" * 64)
    lines = shown(certificates_in(certs, now=made(certs)), terminal=False, width=40).splitlines()
    assert lines[0].split()[:3] == ["name", "kind", "serial"]
    assert [line.split()[0] for line in lines[1:]] == ["ca", "server", "operator", "ada", "bob", "x" * 64]
    day = f"{certificate(certs, 'ada').not_valid_after_utc:%Y-%m-%d}"
    serial = f"{certificate(certs, 'ada').serial_number:x}"[:8]
    assert lines[4].split() == ["ada", "client", serial, day, "397", "valid"]


def test_a_terminal_gets_a_table_that_fits_and_loses_nothing(certs):
    authority.create_client(certs, "x" * 64)
    text = shown(certificates_in(certs), terminal=True, width=80)
    assert "│ ada" in text and "valid until" in text and "authority" in text
    assert text.count("x") == 64  # folded, not cut
    assert max(map(len, text.splitlines())) <= 80


def test_a_narrow_terminal_gets_plain_columns(certs):
    assert "│" not in shown(certificates_in(certs), terminal=True, width=79)


# Verbs


def test_the_verbs_make_list_and_revoke(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("init").exit_code == 0
    assert run("server", "localhost", "--days", 100).exit_code == 0
    done = run("client", "ada", "--days", 20)
    assert done.exit_code == 0
    assert "keep a copy of ada.pem here: it is what `cloister certs revoke ada` needs" in done.stdout
    done = run("operator", "--days", 200)
    assert done.exit_code == 0
    assert "certs/operator.pem and certs/operator.key" in done.stdout
    assert "`cloister status` shows every client" in done.stdout
    done = run("revoke", "ada")
    assert done.exit_code == 0
    assert "`cloister certs client ada` makes a new one" in done.stdout
    assert "a running server rereads revoked.pem by itself; copy certs/revoked.pem to where" in done.stdout
    assert "warning" not in done.output
    listed = json.loads(run("list", "--json").stdout)["certificates"]
    assert [(one["name"], one["kind"], one["state"]) for one in listed] == [
        ("ca", "authority", "valid"),
        ("server", "server", "valid"),
        ("operator", "operator", "valid"),
        ("ada", "client", "revoked"),
    ]
    for one, days in zip(listed, (3650, 100, 200, 20), strict=True):
        assert one["days_left"] in (days - 1, days)  # a midnight may have come between
    assert datetime.fromisoformat(listed[3]["expires"]) > datetime.now(UTC) + 19 * DAY
    plain = run("list")
    assert [line.split()[0] for line in plain.stdout.splitlines()] == ["name", "ca", "server", "operator", "ada"]


def test_revoking_the_server_warns_that_no_client_reads_the_list(certs):
    done = run("revoke", "server", "--folder", certs)
    assert done.exit_code == 0
    assert "warning: clients read no such list, and trust who has the old server.key until it expires" in done.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("revoke", "zoe"), "zoe.pem: no such certificate"),
        (("client", "eve", "--days", "826"), "valid for 1 to 825 days, not 826"),
        (("operator", "ada"), "ada.key: exists; move it away first"),
        (("list", "--folder", "nowhere"), "nowhere/ca.pem: cannot be read"),
    ],
)
def test_a_verb_that_fails_is_one_line_and_code_two(certs, arguments, message):
    done = run(arguments[0], "--folder", certs, *arguments[1:])
    assert done.exit_code == 2
    (line,) = done.output.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize("verb", ["init", "server", "client", "operator", "revoke", "list"])
def test_the_help_of_each_verb_ends_with_an_example(verb):
    assert f"   cloister certs {verb} " in run(verb, "--help").output
