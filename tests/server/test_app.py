"""The two apps as Flower's own runtimes call them, in one process: a grid and contexts, without ours around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import Context, Message, RecordDict

import client.app
import server.app
from client.account.ledger import Ledger
from common.certificates import authority
from tests.server.rounds.test_flower_grid import Link
from tests.support import PRIVATE, WHOLE, document, table

NODES = (11, 12)


def deploy(folder: Path, names: tuple[str, str], *, tls: tuple[str, str] | None = None, **changes: Any) -> Path:
    """Runs a federation of two nodes, whose client files have these names. Returns the run folder."""
    (folder / "federation.yaml").write_text(yaml.safe_dump(document(**changes)))
    for node, name, i in zip(NODES, names, range(2), strict=True):
        table(seed=i).write_csv(folder / f"{node}.csv")
        settings: dict[str, Any] = {"server": "127.0.0.1:1", "tls": None, "name": name, "device": "cpu"}
        if tls is not None:
            files = {"ca": "certs/ca.pem", "certificate": f"certs/{tls[i]}.pem", "key": f"certs/{tls[i]}.key"}
            settings |= {"tls": files, "name": None}
        settings |= {"data": {"path": f"{node}.csv", "name": "table"}, "state": f"state/{node}"}
        settings["policy"] = {"epsilon": 8.0, "delta": 1e-3, "without_privacy": True}
        (folder / f"{node}.yaml").write_text(yaml.safe_dump(settings))

    def node_app(message: Message, context: Context) -> Message:
        own = {"client-file": str(folder / f"{context.node_id}.yaml")}
        called = {"federation": str(folder / "federation.yaml")}
        return client.app.app(message, Context(5, context.node_id, own, RecordDict(), called))

    config = {"federation": str(folder / "federation.yaml"), "runs": str(folder / "runs"), "start-from": ""}
    server.app.main(Link(node_app, NODES, run="5"), Context(5, 1, {}, RecordDict(), config))
    (run,) = (folder / "runs").iterdir()
    return run


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr("server.rounds.flower_grid.POLL_S", 0.001)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if e["event"] == kind]


def test_a_run_folder_shows_clients_by_the_names_in_their_files(tmp_path):
    run = deploy(tmp_path, ("cleveland", "va"), **PRIVATE)
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["clients"]) == ("completed", ["cleveland", "va"])
    assert [e["members"] for e in events(run, "round")] == [["cleveland", "va"]] * 3
    assert set(result["evaluation"]["per_client"]) == {"cleveland", "va"}
    statement = json.loads((run / "privacy.json").read_text())["row"]["per_client"]
    assert set(statement) == {"cleveland", "va"}
    assert json.loads((run / "nodes.json").read_text()) == {"cleveland": "11", "va": "12"}
    # Three rounds and one evaluation, on each owner's ledger, by the number of Flower's run.
    for node in NODES:
        ledger = Ledger(tmp_path / "state" / str(node) / "table.ledger")
        charged = {(e.run, e.task) for e in ledger.entries() if e.task.startswith(("5/train/", "5/evaluate/"))}
        ledger.close()
        assert charged == {("5", f"5/train/{n}") for n in (1, 2, 3)} | {("5", "5/evaluate/3")}


def test_two_clients_of_one_name_are_two_clients_with_an_account_each(tmp_path):
    run = deploy(tmp_path, ("cleveland", "cleveland"), **PRIVATE)
    first = json.loads((run / "nodes.json").read_text())["cleveland"]
    (second,) = {"11", "12"} - {first}
    assert json.loads((run / "result.json").read_text())["clients"] == [second, "cleveland"]
    assert set(json.loads((run / "privacy.json").read_text())["row"]["per_client"]) == {second, "cleveland"}


def test_with_tls_files_a_client_says_the_name_in_its_certificate(tmp_path):
    authority.create_authority(tmp_path / "certs")
    for name in ("ada", "ben"):
        authority.create_client(tmp_path / "certs", name)
    run = deploy(tmp_path, ("x", "x"), tls=("ada", "ben"))
    assert json.loads((run / "result.json").read_text())["clients"] == ["ada", "ben"]


def test_with_privacy_for_whole_clients_no_name_is_said_and_none_is_told(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(server.app.FlowerGrid, "_heard", lambda self, reply: said.extend(reply.content) or reply)
    whole = {**WHOLE["privacy"]["client"], "clients": 2, "epsilon": 50.0}
    run = deploy(tmp_path, ("cleveland", "va"), **{**WHOLE, "privacy__client": whole})
    assert "arrays" in said and "client" not in said
    assert json.loads((run / "result.json").read_text())["clients"] == ["11", "12"]
    assert "cleveland" not in "".join(p.read_text() for p in run.glob("*.json*"))
    assert not (run / "nodes.json").exists()
