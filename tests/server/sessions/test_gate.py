"""Who may come in, over real loopback sockets with real certificates."""

from __future__ import annotations

import logging
import os
import queue
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.certificates import authority, identity
from common.certificates.identity import ServerIdentity
from common.wire import protocol
from common.wire import session_pb2 as pb
from common.wire import session_pb2_grpc as service
from common.wire.identity import node_id
from server.sessions.gate import Gate, Limits, TurnedAway
from server.sessions.grid import GrpcGrid
from tests.server.sessions.test_grid import FEDERATION, Peer, asking, content_of, material, message, serving, until
from tests.support import ROOT

UNAUTHENTICATED, EXISTS, EXHAUSTED = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
GONE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    folder = tmp_path / "certs"
    authority.create_authority(folder)
    authority.create_server(folder, ["127.0.0.1"])
    for name in ("ada", "ben"):
        authority.create_client(folder, name)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.sessions.service.REFRESH_S", 0.05)


@contextmanager
def connected(grid: GrpcGrid, certs: Path, name: str) -> Iterator[Peer]:
    peer = Peer(grid.port, material(certs, name))
    try:
        peer.hello()
        yield peer
    finally:
        peer.close()


def turned_away(peer: Peer) -> tuple[grpc.StatusCode, str]:
    """How the stream ended."""
    with pytest.raises(grpc.RpcError) as error:
        next(peer.call)
    return error.value.code(), error.value.details()


def renewed(certs: Path, name: str) -> None:
    """Gives a name another certificate with another key."""
    for ending in ("pem", "key"):
        (certs / f"{name}.{ending}").unlink()
    authority.create_client(certs, name)


def test_a_revoked_client_is_not_accepted_and_only_the_log_says_why(certs, caplog):
    foreign = material(certs, "ada")
    authority.revoke(certs, "ada")
    with serving(certs) as grid:
        peer = Peer(grid.port, foreign)
        peer.hello()
        assert turned_away(peer) == (UNAUTHENTICATED, "not accepted")
        assert "the certificate of ada is revoked" in caplog.text
        peer.close()
        with connected(grid, certs, "ben") as ben:
            ben.hear("welcome")


def test_a_client_that_is_revoked_while_it_is_connected_is_sent_away(certs, caplog):
    with serving(certs) as grid, connected(grid, certs, "ada") as ada, connected(grid, certs, "ben") as ben:
        ada.hear("welcome")
        ben.hear("welcome")
        ben.say(ready=pb.Ready(fingerprint=FEDERATION.fingerprint))
        until(lambda: grid.get_node_ids() == [node_id("ben")])
        authority.revoke(certs, "ada")
        assert ada.hear("rejected").reason == "not accepted"
        assert "ada is sent away: its certificate is revoked" in caplog.text
        with asking(grid, message("ben")) as replies:  # the others go on
            task, _ = ben.take()
            ben.answer(task.id, content_of())
        assert len(replies) == 1


def test_a_renewed_server_certificate_is_served_without_a_restart_and_tasks_go_on(certs, caplog):
    caplog.set_level(logging.INFO)
    with serving(certs) as grid:
        with connected(grid, certs, "ada") as ada:
            ada.hear("welcome")
            ada.say(ready=pb.Ready(fingerprint=FEDERATION.fingerprint))
            until(lambda: grid.get_node_ids() == [node_id("ada")])
            with asking(grid, message("ada")) as replies:
                ada.take()
                before = served_certificate(grid, certs)
                renew_server(certs)
                assert turned_away(ada)[0] in GONE
                with again(grid, certs, "ada") as back:
                    task, _ = back.take()
                    back.answer(task.id, content_of(4.0))
                    until(lambda: not grid._asked)
        assert [r.content["arrays"]["w"].numpy()[0] for r in replies] == [4.0]
        assert served_certificate(grid, certs) != before
        assert "our certificate was renewed" in caplog.text


@contextmanager
def again(grid: GrpcGrid, certs: Path, name: str) -> Iterator[Peer]:
    """Comes back as a client does: tries until the server is there."""
    deadline = time.monotonic() + 20
    while True:
        peer = Peer(grid.port, material(certs, name))
        try:
            peer.join()
            break
        except grpc.RpcError as error:
            peer.close()
            assert error.code() in GONE and time.monotonic() < deadline
            time.sleep(0.1)
    try:
        yield peer
    finally:
        peer.close()


def renew_server(certs: Path) -> None:
    fresh = certs.parent / "fresh"
    fresh.mkdir()
    for name in ("ca.pem", "ca.key"):
        (fresh / name).write_bytes((certs / name).read_bytes())
    authority.create_server(fresh, ["127.0.0.1"])
    for name in ("server.key", "server.pem"):
        os.replace(fresh / name, certs / name)


def served_certificate(grid: GrpcGrid, certs: Path) -> bytes:
    with tls_socket(grid.port, certs) as link:
        shown = link.getpeercert(binary_form=True)
    assert shown
    return shown


@contextmanager
def tls_socket(port: int, certs: Path, **versions: Any) -> Iterator[ssl.SSLSocket]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certs / "ca.pem")
    context.load_cert_chain(certs / "ben.pem", certs / "ben.key")
    context.set_alpn_protocols(["h2"])
    for name, value in versions.items():
        setattr(context, name, value)
    with socket.create_connection(("127.0.0.1", port), 10) as link:
        with context.wrap_socket(link, server_hostname="127.0.0.1") as wrapped:
            yield wrapped


def test_only_tls_1_3_is_spoken(certs):
    # In a process of its own: which ciphers gRPC offers is decided when it is imported.
    code = (
        "import sys, time; from server.sessions.grid import GrpcGrid; "
        "from common.certificates.identity import ServerIdentity; "
        "from pathlib import Path; from tests.support import federation; "
        "g = GrpcGrid(federation(), run='r', address='127.0.0.1:0', identity=ServerIdentity(Path(sys.argv[1]))); "
        "g.start(); print(g.port, flush=True); sys.stdin.read(); g.stop('')"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(certs)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        with tls_socket(port, certs, minimum_version=ssl.TLSVersion.TLSv1_2) as link:
            assert link.version() == "TLSv1.3"
        with pytest.raises(OSError), tls_socket(port, certs, maximum_version=ssl.TLSVersion.TLSv1_2):
            pass
    finally:
        server.communicate("", timeout=30)


def test_a_servers_certificate_is_no_clients(certs):
    with serving(certs) as grid:
        peer = Peer(grid.port, material(certs, "server"))
        peer.hello()
        assert turned_away(peer)[0] in (UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE)
        peer.close()


def test_a_name_that_is_there_with_another_key_keeps_its_session(certs, caplog):
    with serving(certs) as grid, connected(grid, certs, "ada") as ada:
        ada.hear("welcome")
        ada.say(ready=pb.Ready(fingerprint=FEDERATION.fingerprint))
        until(lambda: grid.get_node_ids() == [node_id("ada")])
        renewed(certs, "ada")
        with connected(grid, certs, "ada") as other:
            assert turned_away(other) == (EXISTS, "a session of this name is there, with another key")
        assert "ada was turned away: a session of that name with another key is there" in caplog.text
        assert grid.get_node_ids() == [node_id("ada")]
    with serving(certs) as grid, connected(grid, certs, "ada") as other:
        other.hear("welcome")  # once the session has ended, the new key is as good


def test_as_many_sessions_as_there_may_be_and_no_more(certs):
    with serving(certs, Limits(sessions=1)) as grid, connected(grid, certs, "ada") as ada:
        ada.hear("welcome")
        with connected(grid, certs, "ben") as ben:
            assert turned_away(ben) == (EXHAUSTED, "the server is full; try again later")
        with connected(grid, certs, "ada") as newer:  # which replaces its older session
            newer.hear("welcome")


def test_a_client_that_connects_too_often_is_told_to_wait(certs, caplog):
    with serving(certs, Limits(attempts=2, attempt_every_s=3600)) as grid:
        for _ in range(2):
            with connected(grid, certs, "ada") as ada:
                ada.hear("welcome")
        with connected(grid, certs, "ada") as ada:
            assert turned_away(ada) == (EXHAUSTED, "too many attempts; wait before the next")
        with connected(grid, certs, "ben") as ben:  # which has tries of its own
            ben.hear("welcome")


def test_tries_come_back_as_time_passes(certs):
    now = [100.0]
    gate = Gate(None, Limits(attempts=2, attempt_every_s=5), clock=lambda: now[0])
    ada = gate.peer(None, said="ada")  # type: ignore[arg-type]

    def may() -> bool:
        try:
            gate.check_session(ada, None, 0)
        except TurnedAway:
            return False
        return True

    assert [may() for _ in range(3)] == [True, True, False]
    now[0] += 4.9
    assert not may()  # and asking in vain does not make it later
    now[0] += 0.2
    assert [may(), may()] == [True, False]
    now[0] += 3600
    assert [may() for _ in range(3)] == [True, True, False]


def test_plain_text_needs_a_name(caplog):
    for name in ("", "two words", "line\nbreak", "x" * 65):
        with pytest.raises(TurnedAway, match="has neither a certificate nor a fitting name"):
            Gate(None, Limits()).peer(None, said=name)  # type: ignore[arg-type]


def test_a_client_whose_certificate_ends_soon_is_noted_once(certs, caplog):
    for ending in ("pem", "key"):
        (certs / f"ada.{ending}").unlink()
    authority.create_client(certs, "ada", days=10)
    with serving(certs) as grid:
        for _ in range(2):
            with connected(grid, certs, "ada") as ada:
                ada.hear("welcome")
    assert caplog.text.count("the certificate of ada expires in") == 1


def test_a_reply_that_does_not_go_on_ends_its_session_and_frees_its_room(certs):
    limits = Limits(stall_s=0.3, replies=100_000)
    with serving(certs, limits) as grid, connected(grid, certs, "ada") as ada, connected(grid, certs, "ben") as ben:
        for peer in (ada, ben):
            peer.hear("welcome")
            peer.say(ready=pb.Ready(fingerprint=FEDERATION.fingerprint))
        until(lambda: len(grid.get_node_ids()) == 2)
        with asking(grid, message("ada"), message("ben"), timeout=30) as replies:
            slow, _ = ada.take()
            good, _ = ben.take()
            ada.say(reply=pb.Reply(id=slow.id, size=100_000, data=b"x"))  # all the room there is
            time.sleep(0.1)
            ben.answer(good.id, content_of())
            goodbye = ada.hear("goodbye")
            assert (goodbye.reason, goodbye.comes_back) == ("a reply that had begun did not go on", True)
            back = Peer(grid.port, material(certs, "ada"))
            back.join()
            task, _ = back.take()
            back.answer(task.id, content_of())
        assert len(replies) == 2
        back.close()


def test_no_more_replies_are_taken_in_than_there_is_room_for(certs):
    # Two replies of 60 kB in room for 100 kB: the second waits until the first has been added up.
    big = content_of(size=15_000)
    with serving(certs, Limits(replies=100_000)) as grid:
        peers = [Peer(grid.port, material(certs, name)) for name in ("ada", "ben")]
        for peer in peers:
            peer.join()
        until(lambda: len(grid.get_node_ids()) == 2)
        stream = grid.stream([message("ada"), message("ben")], timeout=30)
        threading.Thread(target=lambda: [peer.answer(peer.take()[0].id, big) for peer in peers], daemon=True).start()
        next(stream)
        time.sleep(0.5)
        assert grid.sessions.room._free < 60_000 and len(grid._arrived) == 0  # the other is not let in meanwhile
        assert len(list(stream)) == 1
        until(lambda: grid.sessions.room._free == 100_000)
        for peer in peers:
            peer.close()


# Status


def ask_status(grid: GrpcGrid, certs: Path, name: str) -> pb.StatusReply:
    m = material(certs, name)
    with grpc.secure_channel(
        f"127.0.0.1:{grid.port}", grpc.ssl_channel_credentials(m.ca, m.key, m.certificate)
    ) as channel:
        return service.SessionStub(channel).Status(pb.StatusRequest(), timeout=10)


def test_status_is_not_for_the_revoked(certs):
    revoked = material(certs, "ada")
    authority.revoke(certs, "ada")
    with serving(certs) as grid:
        credentials = grpc.ssl_channel_credentials(revoked.ca, revoked.key, revoked.certificate)
        with grpc.secure_channel(f"127.0.0.1:{grid.port}", credentials) as channel:
            with pytest.raises(grpc.RpcError) as error:
                service.SessionStub(channel).Status(pb.StatusRequest(), timeout=10)
        assert (error.value.code(), error.value.details()) == (UNAUTHENTICATED, "not accepted")


def test_who_asks_for_the_status_is_known_by_its_certificate(certs):
    authority.create_operator(certs)
    asked = []
    with serving(
        certs, status=lambda peer: asked.append((peer.name, peer.operator)) or pb.StatusReply(round=7)
    ) as grid:
        assert ask_status(grid, certs, "ada").round == 7
        assert ask_status(grid, certs, "operator").round == 7
    assert asked == [("ada", False), ("operator", True)]


def test_what_each_client_is_doing(certs):
    with serving(certs) as grid, connected(grid, certs, "ada") as ada, connected(grid, certs, "ben") as ben:
        states = lambda: {name: state for name, (state, _, _) in grid.sessions.describe().items()}  # noqa: E731
        ada.hear("welcome")
        ben.hear("welcome")
        assert states() == {"ada": "joining", "ben": "joining"}
        ada.say(ready=pb.Ready(fingerprint=FEDERATION.fingerprint))
        ben.say(failure=pb.Failure(code=1001, reason="policy says no"))
        until(lambda: states() == {"ada": "idle", "ben": "refused"})
        assert grid.sessions.describe()["ben"][2] == "policy says no"
        grid.push_messages([message("ada")])
        ada.take()
        assert states()["ada"] == "working"
        ada.close()
        until(lambda: states()["ada"] == "away")


def test_an_identity_that_cannot_be_read_is_refused_before_anything_is_served(tmp_path):
    with pytest.raises(Exception, match=r"ca\.pem: cannot be read"):
        ServerIdentity(tmp_path)


# Certificates that TLS itself refuses


def signed(certs: Path, name: str, *, by: str | None = "ca", days: tuple[int, int] = (-1, 30)) -> identity.TLSMaterial:
    """A client's certificate that is valid from and until so many days from now; `by` None signs with its own key."""
    key = ec.generate_private_key(ec.SECP256R1())
    authority_key = serialization.load_pem_private_key((certs / "ca.key").read_bytes(), None) if by else key
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer = x509.load_pem_x509_certificate((certs / "ca.pem").read_bytes()).subject if by else subject
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .sign(authority_key, hashes.SHA256())  # type: ignore[arg-type]
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return identity.TLSMaterial(
        ca=(certs / "ca.pem").read_bytes(), certificate=certificate.public_bytes(pem), key=private
    )


@pytest.mark.parametrize(
    "how, welcome",
    [({}, True), ({"days": (-9, -1)}, False), ({"days": (1, 9)}, False), ({"by": None}, False)],
    ids=["valid", "expired", "not yet valid", "self-signed"],
)
def test_a_certificate_that_does_not_hold_does_not_get_as_far_as_hello(certs, how, welcome):
    with serving(certs) as grid:
        peer = Peer(grid.port, signed(certs, "ada", **how))
        peer.hello()
        if welcome:
            peer.hear("welcome")
        else:
            assert turned_away(peer)[0] == grpc.StatusCode.UNAVAILABLE
        peer.close()


def test_a_server_for_another_host_is_not_spoken_to(certs):
    for ending in ("pem", "key"):
        (certs / f"server.{ending}").unlink()
    authority.create_server(certs, ["fed.example.org"])
    with serving(certs) as grid:
        peer = Peer(grid.port, material(certs, "ada"))
        peer.hello()
        code, details = turned_away(peer)
        assert code == grpc.StatusCode.UNAVAILABLE
        assert identity.fault_in(details) == "its certificate is for another host than the address that we were given"
        peer.close()


# What a hostile client may try


class Raw:
    """A client that sends bytes as they are."""

    def __init__(self, grid: GrpcGrid, certs: Path, name: str) -> None:
        m = material(certs, name)
        credentials = grpc.ssl_channel_credentials(m.ca, m.key, m.certificate)
        self._channel = grpc.secure_channel(f"127.0.0.1:{grid.port}", credentials)
        self.outbox: queue.Queue[bytes | None] = queue.Queue()
        method = self._channel.stream_stream("/cloister.session.v1.Session/Connect")
        self.call = method(iter(self.outbox.get, None))

    def say(self, **frame: Any) -> None:
        self.outbox.put(pb.ClientFrame(**frame).SerializeToString())

    def close(self) -> None:
        self.outbox.put(None)
        self.call.cancel()
        self._channel.close()


def raw_and_ready(grid: GrpcGrid, certs: Path, name: str = "ada") -> Raw:
    raw = Raw(grid, certs, name)
    raw.say(hello=pb.Hello(protocol=protocol.PROTOCOL))
    next(raw.call)
    raw.say(ready=pb.Ready(fingerprint=FEDERATION.fingerprint))
    until(lambda: grid.get_node_ids() == [node_id(name)])
    return raw


def test_a_frame_that_cannot_be_read_ends_its_session_and_leaves_nothing_behind(certs):
    with serving(certs) as grid:
        raw = raw_and_ready(grid, certs)
        raw.outbox.put(b"\xff\xff\xff")
        until(lambda: grid.get_node_ids() == [] and grid.sessions.describe()["ada"][0] == "away")
        raw.close()


def test_a_revoked_client_that_does_not_read_is_cut_off_and_heard_no_more(certs, monkeypatch):
    monkeypatch.setattr("server.sessions.service.FAREWELL_S", 0.3)
    with serving(certs) as grid:
        raw = raw_and_ready(grid, certs)
        grid.push_messages([message("ada", size=240_000, group=str(i)) for i in range(20)])  # far beyond its window
        authority.revoke(certs, "ada")
        until(lambda: grid.get_node_ids() == [] and grid.sessions.describe()["ada"][0] == "away")
        raw.close()


def test_tasks_that_are_not_waited_for_any_more_are_not_sent(certs):
    with serving(certs) as grid, connected(grid, certs, "ada") as ada:
        ada.hear("welcome")
        until(lambda: "ada" in grid.sessions.describe())
        for group in "123":
            assert list(grid.stream([message("ada", group=group)], timeout=0.05)) == []
        ada.say(ready=pb.Ready(fingerprint=FEDERATION.fingerprint))
        until(lambda: grid.get_node_ids())
        grid.push_messages([message("ada", group="4")])
        assert ada.take()[0].group == "4"


def test_an_answer_that_comes_before_its_question_is_kept_by_its_client(certs):
    # After a restart a client may finish a task that the new server is only about to ask for.
    with serving(certs) as grid, connected(grid, certs, "ada") as ada:
        ada.hear("welcome")
        ada.say(ready=pb.Ready(fingerprint=FEDERATION.fingerprint))
        until(lambda: grid.get_node_ids())
        ada.answer("run/train/1", content_of())
        until(lambda: grid.sessions._sessions["ada"].unasked == 1)
        with asking(grid, message("ada")) as replies:
            task, _ = ada.take()  # and no ack before it
            ada.answer(task.id, content_of(2.0))
        assert [r.content["arrays"]["w"].numpy()[0] for r in replies] == [2.0]


@pytest.mark.parametrize(
    "frames, reason",
    [
        ([{"ready": pb.Ready(fingerprint=FEDERATION.fingerprint)}] * 2, "is ready already"),
        ([{"reply": pb.Reply(id="x" * 301, size=1, data=b"x")}], "its task's name is too long"),
        ([{"reply": pb.Reply(id="t", size=1, data=b"x")}] * 101, "too many answers that nobody asked for"),
        ([{"reply": pb.Reply(id="t", size=9)}, {"chunk": pb.Chunk()}], "a frame chunk is not expected in a reply"),
        (
            [{"reply": pb.Reply(id="t", size=9)}, {"goodbye": pb.Goodbye()}],
            "a frame goodbye is not expected in a reply",
        ),
    ],
)
def test_what_only_a_hostile_client_says_ends_its_session(certs, frames, reason):
    with serving(certs) as grid, connected(grid, certs, "ada") as ada:
        ada.hear("welcome")
        for frame in frames:
            ada.say(**frame)
        assert reason in ada.hear("rejected").reason


def test_a_reply_that_nobody_waits_for_takes_no_room(certs):
    with serving(certs, Limits(replies=1000)) as grid, connected(grid, certs, "ada") as ada:
        ada.hear("welcome")
        ada.say(reply=pb.Reply(id="nobody asked", size=900_000, data=b"x"))
        with connected(grid, certs, "ben") as ben:
            ben.hear("welcome")
            ben.say(ready=pb.Ready(fingerprint=FEDERATION.fingerprint))
            until(lambda: grid.get_node_ids() == [node_id("ben")])
            with asking(grid, message("ben")) as replies:
                task, _ = ben.take()
                ben.answer(task.id, content_of())
            assert len(replies) == 1
