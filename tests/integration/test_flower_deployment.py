"""The two apps, unchanged, on Flower's own SuperLink and SuperNodes, with TLS and with the nodes' keys."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client.account.ledger import Ledger
from common.certificates import authority
from tests.support import PRIVATE, ROOT, document, table

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(240)]

T = TypeVar("T")
PATIENCE_S = 150.0  # for the run, on a machine that is busy
NAMES = ("ada", "ben")
ROUNDS = 2
CHARGED = ("evaluate/2", "rows", "train/1", "train/2")  # a noisy count of rows is told once in a run


class Flower:
    """Flower's commands in one folder. Those that stay are ended with the test, and so is what they have started: each
    has a process group of its own."""

    def __init__(self, folder: Path, processes: ExitStack) -> None:
        self.folder, self._processes = folder, processes
        self.port, *self.node_ports = free_ports(1 + len(NAMES))
        kept = {
            k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"
        }  # or each message compiles the app
        self._environment = {
            **kept,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",  # a second by default; Flower's other pauses are fixed
        }

    def start(self, *command: object, home: str = "home") -> subprocess.Popen[str]:
        """A command whose output goes to a file, so that it never waits for a reader. `home` is where it unpacks the
        app: flwr 1.41 takes one that another process is unpacking there for whole."""
        log = self._processes.enter_context((self.folder / f"{time.monotonic_ns()}.log").open("w"))
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=self.folder,
            env={**self._environment, "FLWR_HOME": str(self.folder / home)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._processes.callback(end, process)
        return process

    def done(self, *processes: subprocess.Popen[str]) -> None:
        """Waits until commands that end have ended well."""
        for process in processes:
            assert process.wait(60) == 0, self.said()

    def until(self, found: Callable[[], T | None], *running: subprocess.Popen[str]) -> T:
        """What `found` finds, once it does, while the processes run."""
        deadline = time.monotonic() + PATIENCE_S
        while (value := found()) is None:
            assert all(process.poll() is None for process in running), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)
        return value

    def said(self) -> str:
        """The end of all that was printed, for whoever reads why a test failed."""
        return "\n".join(f"{p.name}:\n{p.read_text()[-3000:]}" for p in sorted(self.folder.glob("*.log")))

    def listens(self) -> bool | None:
        with socket.socket() as probe:
            return True if probe.connect_ex(("127.0.0.1", self.port)) == 0 else None


def end(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
    process.wait()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def write_files(flower: Flower) -> None:
    """What docs/flower.md has the coordinator and the owners make."""
    folder = flower.folder
    authority.create_authority(folder / "certs")
    authority.create_server(folder / "certs", ["127.0.0.1"])
    (folder / "home").mkdir()
    (folder / "home" / "config.toml").write_text(
        f'[superlink.test]\naddress = "127.0.0.1:{flower.port}"\nroot-certificates = "{folder}/certs/ca.pem"\n'
    )
    asked = document(**PRIVATE, training__rounds=ROUNDS, strategy__round_timeout=100)
    asked["privacy"]["evaluation"]["every"] = ROUNDS
    (folder / "federation.yaml").write_text(yaml.safe_dump(asked))
    for i, name in enumerate(NAMES):
        write_key(folder / f"{name}.key")
        table(seed=i).write_csv(folder / f"{name}.csv")
        settings = {
            "server": f"127.0.0.1:{flower.port}",
            "tls": None,
            "name": name,
            "data": {"path": f"{name}.csv", "name": "table"},
            "state": f"state/{name}",
            "device": "cpu",
            "policy": {"epsilon": 8.0, "delta": 1e-3},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))


def write_key(path: Path) -> None:
    """What `ssh-keygen -t ecdsa -b 384` makes."""
    key = ec.generate_private_key(ec.SECP384R1())
    secret = serialization.NoEncryption()
    ours = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, secret)
    path.write_bytes(ours)
    theirs = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_suffix(".key.pub").write_bytes(theirs)


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[Flower]:
    with ExitStack() as processes:
        yield Flower(tmp_path, processes)


def test_a_run_with_tls_and_node_keys_shows_names_and_each_owner_is_charged_for_its_rounds_alone(flower):
    write_files(flower)
    folder, certs = flower.folder, flower.folder / "certs"
    link = flower.start(
        *("flower-superlink", "--host", "127.0.0.1", "--port", flower.port, "--enable-supernode-auth"),
        *("--ssl-ca-certfile", certs / "ca.pem", "--ssl-certfile", certs / "server.pem"),
        *("--ssl-keyfile", certs / "server.key", "--disable-runtime-dependency-installation"),
    )
    flower.until(flower.listens, link)
    register = ("flwr", "supernode", "register")
    flower.done(*[flower.start(*register, folder / f"{name}.key.pub", "test") for name in NAMES])
    nodes = [
        flower.start(
            *("flower-supernode", "--superlink", f"127.0.0.1:{flower.port}", "--port", port),
            *("--root-certificates", certs / "ca.pem", "--auth-supernode-private-key", folder / f"{name}.key"),
            *("--node-config", f'client-file="{folder}/{name}.yaml"'),
            home=f"home-{name}",
        )
        for name, port in zip(NAMES, flower.node_ports, strict=True)
    ]
    config = f'federation="{folder}/federation.yaml" runs="{folder}/runs"'
    flower.done(flower.start("flwr", "run", ROOT, "test", "--run-config", config))

    def finished() -> Path | None:
        return next((p.parent for p in (folder / "runs").glob("*/result.json")), None)

    run = flower.until(finished, link, *nodes)
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["rounds"], result["clients"]) == ("completed", ROUNDS, ["ada", "ben"])
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [e["members"] for e in events if e["event"] == "round"] == [["ada", "ben"]] * ROUNDS
    assert set(result["evaluation"]["per_client"]) == {"ada", "ben"}
    # Each message was answered by a process of its own: what they share is the ledger.
    number = events[0]["run"]
    for name in NAMES:
        ledger = Ledger(folder / "state" / name / "table.ledger")
        charged = sorted((e.run, e.task) for e in ledger.entries() if e.task)
        ledger.close()
        assert charged == [(number, f"{number}/{task}") for task in CHARGED]
