"""How a run goes, for `cloister status`, for Prometheus and in a program's log."""

from __future__ import annotations

import io
import json
import logging
import re
import socket
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cloister import status
from common import logs
from common.certificates import authority
from common.certificates.identity import Peer
from common.errors import CertificateError, ConnectionFailed
from server.observers.prometheus import Prometheus
from server.observers.status import Watch
from server.rounds.events import State, from_json
from server.sessions.grid import GrpcGrid
from tests.server.sessions.test_grid import serving
from tests.support import ROOT, WHOLE, federation

FEDERATION = federation(training__rounds=9)
OPERATOR = Peer(name="operator", operator=True, serial=1, key=b"", expires=datetime.max.replace(tzinfo=UTC))
ADA = Peer(name="ada", operator=False, serial=2, key=b"", expires=datetime.max.replace(tzinfo=UTC))


def round_event(server_round: int, **changes: Any) -> dict[str, Any]:
    event = {
        "event": "round",
        "round": server_round,
        "rounds": 9,
        "clients": 2,
        "train": {"loss": 0.5},
        "rejected": [],
        "seconds": 0.2,
        "waiting": 1.5,
    }
    return {**event, **changes}


def rejection(client: str, kind: str = "late") -> dict[str, str]:
    return {"client": client, "kind": kind, "reason": f"{client} was {kind}"}


def watching(*events: dict[str, Any]) -> Watch:
    watch = Watch(FEDERATION, "run-1")
    watch.clients = lambda: {"ada": ("idle", 0.5, ""), "ben": ("away", 61.0, ""), "cyd": ("refused", 3.0, "policy")}
    for event in events:
        watch(from_json(event))
    return watch


def test_an_operator_sees_the_run_and_all_its_clients():
    told = watching({"event": "start", "rounds": 9}, round_event(1), round_event(2)).status(OPERATOR)
    assert (told.federation, told.fingerprint, told.run) == ("small", FEDERATION.fingerprint, "run-1")
    assert (told.round, told.rounds, told.state, told.problem) == (2, 9, "running", "")
    assert [(c.name, c.state, c.last_seen) for c in told.clients] == [
        ("ada", "idle", 0.5),
        ("ben", "away", 61.0),
        ("cyd", "refused", 3.0),
    ]
    assert told.clients[2].reason == "policy"


def test_a_client_sees_nothing_of_the_others():
    told = watching({"event": "start", "rounds": 9}).status(ADA)
    assert [c.name for c in told.clients] == ["ada"]
    assert b"ben" not in told.SerializeToString()


def test_strikes_and_their_reasons_are_told():
    told = watching(
        round_event(1, rejected=[rejection("ben"), rejection("ada", "refused")], strikes={"ben": 1}),
        round_event(2, rejected=[rejection("ben", "rejected")], strikes={"ben": 2}),
    ).status(OPERATOR)
    assert [(c.strikes, c.reason) for c in told.clients][:2] == [(0, "ada was refused"), (2, "ben was rejected")]


def test_strikes_are_those_in_a_row():
    told = watching(round_event(1, rejected=[rejection("ben")], strikes={"ben": 1}), round_event(2)).status(OPERATOR)
    assert [c.strikes for c in told.clients] == [0, 0, 0]


def test_the_protocol_names_the_states_that_are_sent():
    text = (ROOT / "common/wire/session.proto").read_text()
    (named,) = re.findall(r"string state = 6; // (.*)", text)
    assert [name.removesuffix(": N of M") for name in named.split(" | ")] == list(State)
    (clients,) = re.findall(r"string state = 2; +// (.*)", text)
    assert {"idle", "working", "joining", "away", "refused", "connected"} == set(clients.split(" | "))


def test_a_failed_round_a_wait_and_the_end_are_told():
    watch = watching(round_event(1), round_event(2, failed="no quorum"))
    assert (watch.status(OPERATOR).round, watch.status(OPERATOR).problem) == (1, "no quorum")
    watch(from_json({"event": "waiting", "clients": 1, "min_clients": 2}))
    assert watch.status(OPERATOR).state == "waiting for clients: 1 of 2"
    watch(from_json({"event": "end", "status": "budget_exhausted"}))
    assert watch.status(OPERATOR).state == "budget exhausted"
    assert watching({"event": "resumed", "round": 5, "rounds": 9}).status(OPERATOR).round == 5


# Asking a real server


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    authority.create_authority(folder)
    authority.create_server(folder, ["127.0.0.1"])
    authority.create_client(folder, "ada")
    authority.create_operator(folder)
    return folder


def test_status_is_asked_over_mutual_tls_and_shown_to_a_person(certs):
    watch = watching({"event": "start", "rounds": 9}, round_event(3, failed="no [quorum]"))
    with serving(certs, status=watch.status) as grid:
        told = status.ask(f"127.0.0.1:{grid.port}", certificates=certs, name="operator")
        own = status.ask(f"127.0.0.1:{grid.port}", certificates=certs, name="ada")
    assert (told["round"], told["rounds"], told["problem"]) == (0, 9, "no [quorum]")
    assert [c["name"] for c in told["clients"]] == ["ada", "ben", "cyd"]
    assert [c["name"] for c in own["clients"]] == ["ada"]
    assert json.loads(json.dumps(told)) == told
    page = io.StringIO()
    status.show(told, Console(file=page, width=100))
    text = page.getvalue()
    assert "small: round 0 of 9, running, up" in text
    assert "the last round failed: no [quorum]" in text
    (row,) = [line.split("│")[1:4] for line in text.splitlines() if "ben" in line]
    assert [cell.strip() for cell in row] == ["ben", "away", "1 min 1 s ago"]


def test_status_on_plain_text_is_for_loopback():
    with pytest.raises(CertificateError, match=r"example\.org:1: give --certificates FOLDER; plain text is for"):
        status.ask("example.org:1", certificates=None, name="operator")
    grid = GrpcGrid(FEDERATION, run="r", address="127.0.0.1:0", identity=None, status=watching().status)
    grid.start()
    try:
        told = status.ask(f"127.0.0.1:{grid.port}", certificates=None, name="operator")
    finally:
        grid.stop("")
    assert len(told["clients"]) == 3


def test_ipv6_is_served_and_asked_in_brackets():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    grid = GrpcGrid(FEDERATION, run="r", address="[::1]:0", identity=None, status=watching().status)
    grid.start()
    try:
        assert len(status.ask(f"[::1]:{grid.port}", certificates=None, name="operator")["clients"]) == 3
    finally:
        grid.stop("")


def test_a_server_that_is_not_there_or_not_ours_is_one_clear_error(certs, tmp_path):
    with pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:1: no answer"):
        status.ask("127.0.0.1:1", certificates=certs, name="operator")
    authority.create_authority(tmp_path / "other")
    authority.create_operator(tmp_path / "other")
    with serving(certs) as grid:
        with pytest.raises(CertificateError, match="the server is not accepted: its certificate is not from"):
            status.ask(f"127.0.0.1:{grid.port}", certificates=tmp_path / "other", name="operator")
    authority.create_operator(certs, "late")
    late = tmp_path / "late"
    late.mkdir()
    for name in ("ca.pem", "late.pem", "late.key"):
        (late / name).write_bytes((certs / name).read_bytes())
    authority.revoke(certs, "late")
    with serving(certs) as grid, pytest.raises(CertificateError, match="the server does not accept this certificate"):
        status.ask(f"127.0.0.1:{grid.port}", certificates=late, name="late")


# Prometheus


def scraped(port: int) -> dict[str, float]:
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_metrics_follow_the_events():
    metrics = Prometheus(connected=lambda: 3)
    for event in (
        {"event": "resumed", "round": 4, "rounds": 9},
        round_event(
            5,
            rejected=[rejection("ben")],
            evaluation={"accuracy": 0.75, "per_class": {}},
            privacy={"row": {"epsilon": 1.25}},
        ),
        round_event(6, failed="no quorum", rejected=[rejection("ben"), rejection("ada", "rejected")]),
        {"event": "end", "status": "completed"},
    ):
        metrics(from_json(event))
    found = scraped(metrics.serve(0))
    assert found["cloister_clients_connected"] == 3
    assert (found["cloister_round"], found["cloister_rounds"]) == (5, 9)
    assert (found["cloister_rounds_failed_total"], found["cloister_round_clients"]) == (1, 2)
    assert (found["cloister_round_seconds_count"], found["cloister_round_seconds_sum"]) == (2, pytest.approx(0.4))
    assert found["cloister_waiting_seconds_total"] == 3
    assert found['cloister_replies_rejected_total{kind="late"}'] == 2
    assert found['cloister_replies_rejected_total{kind="rejected"}'] == 1
    assert found['cloister_metric{name="accuracy"}'] == 0.75
    assert found['cloister_epsilon{unit="row"}'] == 1.25


def test_a_port_for_metrics_that_is_in_use_is_one_clear_error():
    port = Prometheus(connected=lambda: 0).serve(0)
    with pytest.raises(ConnectionFailed, match=rf"127\.0\.0\.1:{port}: metrics cannot be served: .*in use"):
        Prometheus(connected=lambda: 0).serve(port)


# Logs


def test_a_log_for_programs_is_one_json_object_a_line(capsys):
    def as_ray_makes_them(*of: Any, **more: Any) -> logging.LogRecord:
        record = logging.LogRecord(*of, **more)
        record.__dict__["_ray_timestamp_ns"] = 1  # which it adds to all, once it was imported
        return record

    before_ray = logging.getLogRecordFactory()
    logging.setLogRecordFactory(as_ray_makes_them)
    logger = logging.getLogger("cloister")
    before = logger.handlers, logger.propagate, logger.level
    try:
        logs.log_to(logs.json_handler())
        log = logging.getLogger("cloister.server")
        log.info("%s connected", "ada", extra={"client": "ada"})
        log.warning("round\n2", extra={"event": {"round": 2}})
        try:
            raise ValueError("broken")
        except ValueError:
            log.exception("a bug")
    finally:
        logger.handlers, logger.propagate, logger.level = before
        logging.setLogRecordFactory(before_ray)
    first, second, third = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert (first["level"], first["logger"], first["message"]) == ("info", "cloister.server", "ada connected")
    assert first["client"] == "ada"
    assert datetime.fromisoformat(first["time"]).tzinfo is not None
    assert (second["message"], second["event"]) == ("round\n2", {"round": 2})
    assert "ValueError: broken" in third["traceback"]
    assert set(first) == {"time", "level", "logger", "message", "client"}


def test_nobody_is_told_whom_a_round_asks_where_that_is_a_secret():
    watch = Watch(federation(**WHOLE, strategy__fraction=0.5), "run")
    watch.clients = lambda: {"ada": ("working", 0.1, ""), "ben": ("idle", 7.0, ""), "cyd": ("away", 9.0, "")}
    told = [(c.name, c.state, c.last_seen) for c in watch.status(OPERATOR).clients]
    assert told == [("ada", "connected", 0.0), ("ben", "connected", 0.0), ("cyd", "away", 9.0)]


def test_a_client_is_not_told_why_others_made_a_round_fail():
    watch = watching(round_event(2, failed="1 of at least 2 replies (ben's budget is spent)"))
    assert watch.status(ADA).problem == "the last round failed"
    assert "ben's budget" in watch.status(OPERATOR).problem
