"""The way to a server over real sockets, and what stands in it."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from client.doctor import link
from common.certificates import authority
from common.document.federation import Federation
from common.findings import Finding, State
from server.sessions.grid import GrpcGrid
from tests.client.doctor.support import client_file, drained, of, settings_in
from tests.server.sessions.test_grid import FEDERATION, serving


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("certs"))


def made(folder: Path, host: str = "127.0.0.1", **server: Any) -> Path:
    authority.create_authority(folder)
    authority.create_server(folder, [host], **server)
    authority.create_client(folder, "ada")
    return folder


def looked(folder: Path, **changes: Any) -> tuple[list[Finding], Federation | None]:
    document = client_file(folder, **changes)
    return drained(link.look(settings_in(folder, **changes), document))


def only_wrong(found: list[Finding]) -> str:
    (wrong,) = of(found, State.WRONG)
    return wrong


def test_the_whole_way_ends_with_the_servers_document(certs, tmp_path):
    with serving(certs) as grid:
        found, federation = looked(tmp_path, server=f"127.0.0.1:{grid.port}", certs=certs)
    assert federation == FEDERATION
    assert [f.what for f in found] == ["server", "TLS", "federation", "clock"]
    assert {f.state for f in found} == {State.OK}
    assert "for 127.0.0.1, valid until 20" in found[1].said
    assert FEDERATION.fingerprint in found[2].said and found[2].said.endswith("you are ada")


def test_plain_text_on_loopback_is_told_as_such(tmp_path):
    grid = GrpcGrid(FEDERATION, run="r", address="127.0.0.1:0", identity=None)
    grid.start()
    try:
        found, federation = looked(tmp_path, server=f"127.0.0.1:{grid.port}")
    finally:
        grid.stop("")
    assert federation == FEDERATION
    assert "TLS: none: plain text on loopback -> " in of(found, State.OK)


def test_who_asks_for_a_document_is_no_client_of_the_run(certs, tmp_path):
    with serving(certs) as grid:
        looked(tmp_path, server=f"127.0.0.1:{grid.port}", certs=certs)
        assert (grid.sessions.describe(), list(grid.get_node_ids())) == ({}, [])


def test_nobody_there_is_said_with_what_to_ask(certs, tmp_path):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    found, federation = looked(tmp_path, server=f"127.0.0.1:{port}", certs=certs)
    assert federation is None
    assert f"127.0.0.1:{port} refuses the connection: nothing listens there" in only_wrong(found)
    assert "ask whoever coordinates whether the server runs" in only_wrong(found)


@pytest.mark.parametrize("name", ["nobody.invalid", "two..dots", "a" * 64 + ".org"])
def test_a_name_that_nobody_has_is_said(certs, tmp_path, name):
    found, _ = looked(tmp_path, server=f"{name}:1", certs=certs)
    assert only_wrong(found).startswith(f"server: {name}: no such name -> check `server:`")


def test_a_port_that_never_answers_is_given_up(certs, tmp_path, monkeypatch):
    def never(*_: object, **__: object) -> socket.socket:
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", never)
    found, _ = looked(tmp_path, server="127.0.0.1:9", certs=certs)
    assert "127.0.0.1:9: no answer within 5 s -> a firewall" in only_wrong(found)


def test_plain_text_may_not_leave_the_machine(tmp_path):
    found, _ = looked(tmp_path, server="fed.example.org:8443")
    assert "plain text is for loopback only" in only_wrong(found)


@pytest.mark.parametrize("name", ["ca.pem", "ada.pem", "ada.key"])
def test_a_missing_file_of_ours_ends_the_way(certs, tmp_path, name):
    document = client_file(tmp_path, certs=certs)
    settings = settings_in(tmp_path, certs=certs)
    (tmp_path / "certs" / name).unlink()
    assert f"{name}: cannot be read" in only_wrong(list(link.look(settings, document)))


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_key_that_others_can_read_is_a_warning_and_no_more(certs, tmp_path):
    client_file(tmp_path, certs=certs)
    with serving(certs) as grid:
        settings = settings_in(tmp_path, server=f"127.0.0.1:{grid.port}", certs=certs)
        (tmp_path / "certs" / "ada.key").chmod(0o644)
        found = list(link.look(settings, tmp_path / "client.yaml"))
    (warning,) = of(found, State.WARNING)
    assert "ada.key: open to others than its owner (mode 644) -> run `chmod 600" in warning
    assert of(found, State.WRONG) == []


@contextmanager
def an_impostor(certs: Path, trusted: Path) -> Iterator[tuple[int, list[object]]]:
    """A TLS server with these certificates, which asks for a client's: its port, and what each client showed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certs / "server.pem", certs / "server.key")
    context.load_verify_locations(trusted / "ca.pem")
    context.verify_mode = ssl.CERT_OPTIONAL
    context.set_alpn_protocols(["h2"])
    showed: list[object] = []
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def listen() -> None:
            with suppress(OSError):  # the listener is closed
                while True:
                    link, _ = listener.accept()
                    with link, suppress(OSError), context.wrap_socket(link, server_side=True) as secured:
                        showed.append(secured.getpeercert())

        threading.Thread(target=listen, daemon=True).start()
        yield listener.getsockname()[1], showed
        listener.shutdown(socket.SHUT_RDWR)


def test_an_impostor_is_not_shown_who_asks(certs, tmp_path):
    with an_impostor(made(tmp_path / "other"), trusted=certs) as (port, showed):
        found, federation = looked(tmp_path / "ada", server=f"127.0.0.1:{port}", certs=certs)
    assert federation is None
    assert "is not from the authority in" in of(found, State.WRONG)[0]
    assert showed and not any(showed)  # one came so far that it would have shown it


def test_what_an_impostor_shows_may_be_no_certificate(certs, tmp_path, monkeypatch):
    def scrambled(self: ssl.SSLSocket, binary_form: bool = False) -> bytes:
        return made_up

    der = ssl.PEM_cert_to_DER_cert((certs / "server.pem").read_text())
    # The first byte of the names' list, in the extension subjectAltName, is no longer that of a list.
    at = der.index(bytes.fromhex("0603551d11")) + 7
    made_up = der[:at] + bytes([der[at] ^ 1]) + der[at + 1 :]
    monkeypatch.setattr(ssl.SSLSocket, "getpeercert", scrambled)
    with serving(certs) as grid:
        found, _ = looked(tmp_path, server=f"127.0.0.1:{grid.port}", certs=certs)
    assert "no certificate was shown (the server's: not a certificate in PEM)" in of(found, State.WRONG)[0]


def test_a_certificate_of_another_authority_is_named_as_that(certs, tmp_path):
    other = made(tmp_path / "other")
    with serving(other) as grid:
        found, federation = looked(tmp_path / "ada", server=f"127.0.0.1:{grid.port}", certs=certs)
    assert federation is None
    wrong = of(found, State.WRONG)
    assert "TLS: the server's certificate is not from the authority in" in wrong[0]
    assert "federation:" in wrong[1] and "the server is not accepted" in wrong[1]


def test_a_certificate_for_another_host_says_for_which(tmp_path):
    other = made(tmp_path / "other", "fed.example.org")
    with serving(other) as grid:
        found, _ = looked(tmp_path / "ada", server=f"127.0.0.1:{grid.port}", certs=other)
    assert "certificate is for fed.example.org, and not for 127.0.0.1 -> use one of those" in of(found, State.WRONG)[0]


def test_a_certificate_that_will_be_over_says_until_when(tmp_path, monkeypatch):
    """By a clock that is years ahead, since no server starts with an expired one."""
    certs = made(tmp_path / "certs")

    class Later(link.datetime):  # type: ignore[misc, name-defined]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz).replace(year=2199)

    with serving(certs) as grid:
        server = link.address.parse(f"127.0.0.1:{grid.port}")
        ours = settings_in(tmp_path / "ada", certs=certs).tls
        assert ours is not None
        assert [f.state for f in link._certificate(server, ours)] == [State.OK]
        monkeypatch.setattr(link, "datetime", Later)
        (found,) = link._certificate(server, ours)
    assert found.state == State.WRONG and "and by this clock it is 2199-" in found.said


def test_a_revoked_client_hears_that_it_is_not_accepted_and_no_more(tmp_path):
    certs = made(tmp_path / "certs")
    client_file(tmp_path / "ada", certs=certs)
    keep = {path.name: path.read_bytes() for path in (tmp_path / "ada" / "certs").iterdir()}
    authority.revoke(certs, "ada")
    authority.create_client(certs, "ada")
    with serving(certs) as grid:
        settings = settings_in(tmp_path / "ada", server=f"127.0.0.1:{grid.port}", certs=certs)
        for name, content in keep.items():
            (tmp_path / "ada" / "certs" / name).write_bytes(content)
        found = list(link.look(settings, tmp_path / "ada" / "client.yaml"))
    assert "the server does not accept this certificate" in only_wrong(found)


@contextmanager
def answering(text: bytes) -> Iterator[int]:
    """A port where whoever connects is told a text."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(10)
                    connection.sendall(text)

        threading.Thread(target=answer, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def test_a_port_that_speaks_no_tls_is_named_as_that(certs, tmp_path):
    with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        found, _ = looked(tmp_path, server=f"127.0.0.1:{port}", certs=certs)
    assert f"127.0.0.1:{port} does not speak TLS" in of(found, State.WRONG)[0]


def test_a_server_that_does_not_know_the_call_is_an_older_one(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        older = grpc.server(pool)
        port = older.add_insecure_port("127.0.0.1:0")
        older.start()
        found, _ = looked(tmp_path, server=f"127.0.0.1:{port}")
        older.stop(None).wait()
    assert "is no server that knows this call: an older Cloister" in only_wrong(found)


@pytest.mark.parametrize(
    "ahead, state, said",
    [
        (0.2, State.OK, "within 1 s of the server's"),
        (-59.0, State.OK, "within 59 s"),
        (3600.0, State.WARNING, "3,600 s behind the server's"),
        (-90.0, State.WARNING, "90 s ahead of the server's"),
    ],
)
def test_clocks_that_differ_by_more_than_a_minute_are_a_warning(ahead, state, said):
    found = link._clock(ahead)
    assert (found.state, said in found.said) == (state, True)


def test_the_clock_is_compared_with_the_servers(certs, tmp_path, monkeypatch):
    real = time.time
    with serving(certs) as grid:
        monkeypatch.setattr(link.time, "time", real)

        class Behind:
            time = staticmethod(lambda: real() - 600)

        monkeypatch.setattr(link, "time", Behind)
        found, _ = looked(tmp_path, server=f"127.0.0.1:{grid.port}", certs=certs)
    (warning,) = of(found, State.WARNING)
    assert "clock: 600 s behind the server's" in warning


def test_another_version_at_the_other_side_is_a_warning():
    assert list(link._versions(link.version("cloister"))) == []
    (found,) = link._versions("9.9")
    assert (found.state, "the server runs Cloister 9.9" in found.said) == (State.WARNING, True)
