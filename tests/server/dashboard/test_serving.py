"""The dashboard over real sockets: who is let in, what answers carry, and that it leaves nothing behind."""

from __future__ import annotations

import http.client
import json
import logging
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from common.certificates import authority
from common.certificates.identity import ServerIdentity
from common.errors import ConfigError, ConnectionFailed
from common.wire.address import Address
from server.dashboard import serving
from server.dashboard.access import Access, access
from server.dashboard.serving import Dashboard
from server.rounds.events import Ended, Event, Refused, Resumed, RoundEnded, Started
from tests.support import federation

TOKEN = "0123456789abcdef0123"


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    authority.create_authority(folder)
    authority.create_server(folder, ["fed.example.org", "192.0.2.7"])
    (folder / "token").write_text(TOKEN + "\n")
    (folder / "token").chmod(0o600)
    return folder


def at_loopback(address: str = "127.0.0.1:0") -> Access:
    return access(address, token_file=None, identity=None, certificates=None)


def for_others(certs: Path) -> Access:
    return access("0.0.0.0:0", token_file=certs / "token", identity=ServerIdentity(certs), certificates=certs)


@contextmanager
def dashboard(allowed: Access | None = None, before: Sequence[Event] = ()) -> Iterator[Dashboard]:
    there: Future[dict[str, tuple[str, float, str]]] = Future()
    there.set_result({"ada": ("idle", 0.0, "")})
    served = Dashboard(federation(), "run-1", allowed or at_loopback(), clients=lambda: there)
    served.start(before)
    try:
        yield served
    finally:
        served.stop()


def test_connections_that_ask_for_nothing_leave_files_for_the_run(monkeypatch):
    monkeypatch.setattr(serving, "MOST_CONNECTIONS", 3)
    monkeypatch.setattr(serving, "MOST_TOLD", 2)
    with dashboard() as served, ExitStack() as links:
        idle = [links.enter_context(socket.create_connection(("127.0.0.1", served.port))) for _ in range(20)]
        time.sleep(0.5)
        assert sum(is_closed(link) for link in idle) == 15
        links.close()
        with browsing(served) as browser:
            assert browser.status("/") == 200


def is_closed(link: socket.socket) -> bool:
    link.setblocking(False)
    try:
        return link.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


class Browser:
    """Asks as a browser does."""

    def __init__(self, of: Dashboard, certs: Path | None = None) -> None:
        if certs is None:
            self._link = http.client.HTTPConnection("127.0.0.1", of.port, timeout=20)
        else:
            context = ssl.create_default_context(cafile=str(certs / "ca.pem"))
            context.check_hostname = False
            self._link = http.client.HTTPSConnection("127.0.0.1", of.port, timeout=20, context=context)

    def ask(self, path: str = "/", method: str = "GET", **headers: str) -> http.client.HTTPResponse:
        self._link.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        return self._link.getresponse()

    def status(self, path: str = "/", method: str = "GET", **headers: str) -> int:
        answer = self.ask(path, method, **headers)
        answer.read()
        return answer.status

    def close(self) -> None:
        self._link.close()


@contextmanager
def browsing(of: Dashboard, certs: Path | None = None) -> Iterator[Browser]:
    browser = Browser(of, certs)
    try:
        yield browser
    finally:
        browser.close()


def next_event(stream: http.client.HTTPResponse) -> tuple[str, Any]:
    """The next event of a stream."""
    kind = ""
    while line := stream.readline().decode().rstrip("\n"):
        name, _, value = line.partition(": ")
        if name == "event":
            kind = value
        if name == "data":
            told = json.loads(value)
    return kind, told


def test_a_page_on_loopback_needs_nothing_more_and_follows_the_run():
    with dashboard() as served, browsing(served) as browser:
        page = browser.ask()
        text = page.read().decode()
        assert page.status == 200 and "<title>Cloister</title>" in text
        stream = browser.ask("/events")
        assert stream.getheader("Content-Type") == "text/event-stream; charset=utf-8"
        assert next_event(stream)[0] == "now"
        kind, state = next_event(stream)
        assert (kind, state["run"]["run"]) == ("whole", "run-1")
        served(RoundEnded(round=1, rounds=3, loss=0.5))
        points = {}
        while "loss" not in points:
            kind, news = next_event(stream)
            points = news.get("more", {})
        assert points["loss"] == [0, [[1, 0.5]]]


def test_a_server_that_goes_on_with_a_run_shows_what_happened_before():
    before = [Started(rounds=3), *(RoundEnded(round=number, rounds=3, loss=number) for number in (1, 2, 3))]
    with dashboard(before=before) as served, browsing(served) as browser:
        served(Resumed(round=2, rounds=3))
        state: dict[str, Any] = {}
        while state.get("lines", {}).get("loss") != [[1, 1.0], [2, 2.0]]:  # the third is made again
            stream = browser.ask("/events")
            next_event(stream)
            state = next_event(stream)[1]
            stream.close()
            browser.close()


def test_the_page_runs_its_own_script_alone_and_loads_nothing():
    with dashboard() as served, browsing(served) as browser:
        page = browser.ask()
        text = page.read().decode()
        policy = dict(part.strip().split(" ", 1) for part in page.getheader("Content-Security-Policy", "").split(";"))
        assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
        assert policy["connect-src"] == "'self'"
        assert "unsafe" not in str(policy) and policy["script-src"].startswith("'sha256-")
        assert page.getheader("X-Frame-Options") == "DENY" and page.getheader("Referrer-Policy") == "no-referrer"
        assert "innerHTML" not in text and "http://" not in text.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize(
    "host, status",
    [
        ("127.0.0.1:1", 200),  # any port: a tunnel has its own
        ("localhost", 200),
        ("[::1]:8090", 200),
        ("evil.example", 421),
        ("evil.example:8090", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example:80", 421),
        ("", 421),
    ],
)
def test_a_name_that_leads_here_from_elsewhere_is_not_answered(host, status):
    with dashboard() as served, browsing(served) as browser:
        for path in ("/", "/nothing"):
            found = browser.status(path, Host=host)
            assert found == (status if path == "/" or status != 200 else 404)


def test_other_sites_get_nothing_and_nothing_can_be_changed():
    with dashboard() as served, browsing(served) as browser:
        for site in ("cross-site", "same-site"):
            assert browser.status("/events", Sec_Fetch_Site=site) == 403
        assert browser.status("/", Sec_Fetch_Site="cross-site") == 200  # a link to the page
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"):
            for path in ("/", "/events"):
                assert browser.status(path, method, Origin="https://evil.example") == 405
        answer = browser.ask("/", Origin="https://evil.example")
        answer.read()
        assert [name for name, _ in answer.getheaders() if name.lower().startswith("access-control")] == []


def test_elsewhere_a_token_is_given_once_and_kept_in_a_cookie(certs):
    with dashboard(for_others(certs)) as served, browsing(served, certs) as browser:
        host = {"Host": "fed.example.org:8090"}
        assert browser.status("/", **host) == 403
        assert browser.status("/events", **host) == 403
        assert browser.status(f"/?token={TOKEN}x", **host) == 403
        assert browser.status(f"/events?token={TOKEN}", **host) == 403  # only the page takes it
        answer = browser.ask(f"/?token={TOKEN}", **host)
        answer.read()
        cookie, *flags = (answer.getheader("Set-Cookie") or "").split("; ")
        assert answer.status == 200 and set(flags) == {"Path=/", "HttpOnly", "SameSite=Strict", "Secure"}
        assert cookie.startswith("__Host-") and TOKEN not in cookie
        page = browser.ask("/", Cookie=f"other=1; {cookie}", **host)
        page.read()
        assert (page.status, page.getheader("Set-Cookie")) == (200, None)
        assert browser.status("/", Cookie=cookie[:-1], **host) == 403
        assert browser.status("/", Cookie=cookie, Host="evil.example") == 421
        assert browser.status("/", Cookie=cookie, Host="192.0.2.7") == 200
        stream = browser.ask("/events", Cookie=cookie, **host)
        assert stream.status == 200 and next_event(stream)[0] == "now"


def test_elsewhere_nothing_but_tls_1_3_is_spoken(certs):
    with dashboard(for_others(certs)) as served:
        assert served.url == f"https://192.0.2.7:{served.port}/"
        old = ssl.create_default_context(cafile=str(certs / "ca.pem"))
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with socket.create_connection(("127.0.0.1", served.port)) as link, pytest.raises(ssl.SSLError):
            old.wrap_socket(link, server_hostname="fed.example.org")
        with browsing(served) as browser, pytest.raises((http.client.HTTPException, OSError)):
            browser.ask()


def test_a_token_on_loopback_is_asked_for_too(certs):
    allowed = access("127.0.0.1:0", token_file=certs / "token", identity=None, certificates=None)
    with dashboard(allowed) as served, browsing(served) as browser:
        assert browser.status() == 403
        answer = browser.ask(f"/?token={TOKEN}")
        answer.read()
        assert "Secure" not in (answer.getheader("Set-Cookie") or "Secure")  # there is no TLS on which it would be sent


def test_a_renewed_certificate_is_served_to_the_next_page(certs, tmp_path):
    folder = tmp_path / "certs"
    authority.create_authority(folder)
    authority.create_server(folder, ["fed.example.org"])
    identity = ServerIdentity(folder)
    allowed = Access(at_loopback().address, TOKEN, identity, folder)
    context = allowed.context()
    assert context is not None and allowed.is_ours("fed.example.org") and not allowed.is_ours("new.example.org")
    for name in ("server.pem", "server.key"):
        (folder / name).unlink()
    authority.create_server(folder, ["new.example.org"])
    assert identity.refresh()
    allowed.load_certificate(context)
    assert allowed.is_ours("new.example.org:8090") and not allowed.is_ours("fed.example.org")


@pytest.mark.parametrize(
    "given, problem",
    [
        (
            {},
            r"give --certificates FOLDER \(for TLS\) and --dashboard-token FILE \(.*\), or serve 127\.0\.0\.1:1",
        ),
        ({"identity": True}, "others than this machine can reach it: give --dashboard-token FILE"),
        ({"token": TOKEN}, r"others than this machine can reach it: give --certificates FOLDER \(for TLS\), or"),
        ({"token": "short", "identity": True}, "token: must be one line of 16 to 256 letters"),
        ({"token": "with a blank in it", "identity": True}, "must be one line of 16 to 256 letters"),
        ({"token": None, "identity": True}, r"--dashboard-token .*: cannot be read \(No such file"),
    ],
)
def test_what_is_missing_elsewhere_is_one_clear_error(certs, tmp_path, given, problem):
    file = tmp_path / "token" if "token" in given else None
    if file is not None and given["token"] is not None:
        file.write_text(given["token"])
        file.chmod(0o600)
    identity = ServerIdentity(certs) if "identity" in given else None
    with pytest.raises(ConfigError, match=problem) as raised:
        access("0.0.0.0:1", token_file=file, identity=identity, certificates=certs)
    assert len(raised.value.problems) == 1


def test_a_token_that_others_can_read_is_warned_of(certs, tmp_path, caplog):
    logging.getLogger("cloister").propagate = True
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o644)
    access("127.0.0.1:0", token_file=file, identity=None, certificates=None)
    assert "open to others than its owner (mode 644)" in caplog.text


def test_a_port_in_use_is_one_clear_error():
    with dashboard() as served, pytest.raises(ConnectionFailed, match=r"cannot be served: .*in use"):
        Dashboard(federation(), "other", at_loopback(f"127.0.0.1:{served.port}"), clients=Future)


def test_a_name_that_no_host_can_have_is_one_clear_error():
    """As `a..b`, for which Python's codec of host names raises an error of its own."""
    with pytest.raises(ConnectionFailed, match=r"a\.\.b:1: cannot be served: no such host"):
        serving._bound(Address("a..b", 1))


def test_in_the_end_pages_are_told_the_port_is_free_and_nothing_was_printed(capfd):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with dashboard() as served, browsing(served) as browser:
        served(Started(rounds=3))
        stream = browser.ask("/events")
        assert {number: signal.getsignal(number) for number in before} == before
        served(Ended(status="completed"))
        served.stop()
        told = [next_event(stream), next_event(stream)]
        while not told[-1][1].get("state", {}).get("over"):
            told.append(next_event(stream))
        assert stream.read() == b""  # the stream has ended as it should
        socket.create_server(("127.0.0.1", served.port)).close()
    assert "dashboard" not in [thread.name for thread in threading.enumerate()]
    assert capfd.readouterr() == ("", "")


def test_a_page_that_reads_nothing_holds_up_neither_others_nor_the_end(capfd):
    with dashboard() as served:
        served._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of connections that come
        for number in range(200):
            served(Refused(client=f"c{number}", kind="refused", reason="x" * 300))
        with socket.create_connection(("127.0.0.1", served.port)) as link:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            link.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            link.recv(1)  # its 60 kB are more than fit on the way
            with browsing(served) as browser:
                stream = browser.ask("/events")
                while '"of":200' not in json.dumps(next_event(stream), separators=(",", ":")):
                    pass
            started = time.monotonic()
            served.stop()
            assert time.monotonic() - started < 4
    assert "dashboard" not in [thread.name for thread in threading.enumerate()]
    assert capfd.readouterr() == ("", "")


def test_nonsense_on_the_port_prints_and_logs_nothing(capfd, caplog):
    with dashboard() as served, socket.create_connection(("127.0.0.1", served.port)) as link:
        link.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        link.settimeout(10)
        assert b"400" in link.recv(100)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
