"""A federation of real processes over loopback, as a user starts them, and what a test wants to know of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from client.account.entries import Entry
from client.account.ledger import Ledger
from cloister import status
from common.certificates import authority
from tests.support import document, table

NAMES = ("ada", "ben", "cyd")
PATIENCE_S = 90.0  # for anything at all, on a machine that is busy


class Process(subprocess.Popen[str]):
    """A `cloister` process whose output is read as it comes, so that it never waits for its reader."""

    def __init__(self, arguments: list[str], folder: Path, **environment: str) -> None:
        super().__init__(
            [sys.executable, "-m", "cloister", *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONFAULTHANDLER": "1", **environment},
        )
        self._text = ""
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.stdout is not None
        for line in self.stdout:
            with self._changed:
                self._text += line
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self._text

    def until(self, pattern: str, *, times: int = 1) -> re.Match[str]:
        """Waits until it has printed what matches, so many times."""
        deadline = time.monotonic() + PATIENCE_S
        with self._changed:
            while len(found := list(re.finditer(pattern, self._text))) < times:
                left = deadline - time.monotonic()
                assert left > 0, f"{pattern!r} was not printed {times} times within {PATIENCE_S:g} s:\n{self._text}"
                assert self._reader.is_alive(), f"it ended without printing {pattern!r} {times} times:\n{self._text}"
                self._changed.wait(min(left, 0.5))
        return found[times - 1]

    def output(self, code: int = 0) -> str:
        """All that it printed, once it has ended with `code`."""
        try:
            self.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end within {PATIENCE_S:g} s:\n{self._text}") from None
        self._reader.join(PATIENCE_S)
        assert self.returncode == code, f"exit code {self.returncode}, expected {code}:\n{self._text}"
        return self._text

    def destroy(self) -> None:
        """kill -9, and waits until it is dead."""
        self.kill()
        self.wait()

    def end(self) -> None:
        """Leaves nothing behind."""
        if self.poll() is None:
            self.destroy()
        self._reader.join(PATIENCE_S)
        if self.stdout is not None:
            self.stdout.close()

    @property
    def memory_mb(self) -> float:
        """What it holds in memory now."""
        kilobytes = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text())
        assert kilobytes is not None
        return int(kilobytes[1]) / 1024


class Federation:
    """A folder with certificates, a federation file and client files, and the processes that run in it."""

    def __init__(
        self, folder: Path, processes: ExitStack, *, names: tuple[str, ...] = NAMES, rows: int = 200, **changes: Any
    ) -> None:
        self.folder, self._processes = folder, processes
        self.certs = folder / "certs"
        authority.create_authority(self.certs)
        authority.create_server(self.certs, ["127.0.0.1"])
        self.document = folder / "federation.yaml"
        self.document.write_text(yaml.safe_dump(document(**changes)))
        for i, name in enumerate(names):
            authority.create_client(self.certs, name)
            table(rows, seed=i).write_csv(folder / f"{name}.csv")
        self.run = folder / "run"
        self.address = ""

    # Processes

    def client_file(self, name: str, **changes: Any) -> Path:
        files = {"ca": "certs/ca.pem", "certificate": f"certs/{name}.pem", "key": f"certs/{name}.key"}
        policy = {"epsilon": 8.0, "delta": 1e-3, "without_privacy": True}
        value = {
            "server": self.address,
            "tls": files,
            "data": {"path": f"{name}.csv", "name": name},
            "device": "cpu",
            "state": f"state/{name}",
            "policy": policy,
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**value, **changes}))
        return path

    def start(self, *arguments: object, **environment: str) -> Process:
        """A `cloister` process, ended with the test."""
        process = Process([str(a) for a in arguments], self.folder, **environment)
        self._processes.callback(process.end)
        return process

    def join(self, name: str, *, server: str = "", **environment: str) -> Process:
        """A client, of `server` if that is not the server itself (a proxy)."""
        return self.start("join", self.client_file(name, **({"server": server} if server else {})), **environment)

    def serve(self, *arguments: object, **environment: str) -> Process:
        """A server of a new run."""
        return self._serve(self.document, "--out", self.run, "--address", "127.0.0.1:0", *arguments, **environment)

    def resume(self, *arguments: object, **environment: str) -> Process:
        """A server that goes on with the run, where the one before was."""
        return self._serve("--resume", self.run, "--address", self.address, *arguments, **environment)

    def stay(self) -> Process:
        """A server that has only the model of the finished run to give, where the one before was."""
        where = ("--address", self.address, "--certificates", self.certs)
        return self.start("serve", "--resume", self.run, "--stay", *where)

    def _serve(self, *arguments: object, **environment: str) -> Process:
        before = sum(e["event"] == "serving" for e in self.events())
        server = self.start("serve", *arguments, "--certificates", self.certs, **environment)
        until(lambda: sum(e["event"] == "serving" for e in self.events()) > before, "the server did not serve", server)
        self.address = [e for e in self.events() if e["event"] == "serving"][-1]["address"]
        return server

    # What the run folder says

    def events(self) -> list[dict[str, Any]]:
        """All events so far; a last one that is torn is left out."""
        path = self.run / "events.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def event(self, wanted: Callable[[dict[str, Any]], bool], server: Process) -> dict[str, Any]:
        """The first event that is wanted, once it is there."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found.extend(e for e in self.events() if wanted(e))
            return bool(found)

        until(look, "no such event", server)
        return found[0]

    def round_after(self, number: int, server: Process) -> int:
        """Waits until a round later than `number` is complete, and returns which."""
        done = self.event(lambda e: e["event"] == "round" and "failed" not in e and e["round"] > number, server)
        return int(done["round"])

    @property
    def complete(self) -> list[int]:
        """The rounds that events tell of as complete, in their order."""
        return [e["round"] for e in self.events() if e["event"] == "round" and "failed" not in e]

    @property
    def last(self) -> int:
        """The last complete round; 0 if there is none."""
        return max(self.complete, default=0)

    def result(self) -> dict[str, Any]:
        return json.loads((self.run / "result.json").read_text())

    def state_of(self, client: str) -> str:
        """What the server says a client is doing."""
        told = status.ask(self.address, certificates=self.certs, name=client)
        return next((c["state"] for c in told["clients"] if c["name"] == client), "away")

    # What clients keep

    def ledger(self, name: str) -> Path:
        return self.folder / "state" / name / f"{name}.ledger"

    def entries(self, name: str) -> list[Entry]:
        """A client's ledger, found to be whole; the client must have ended."""
        ledger = Ledger(self.ledger(name))
        try:
            ledger.verify()
            return ledger.entries()
        finally:
            ledger.close()

    def charged(self, name: str) -> int:
        """How many entries a running client's ledger has: its head is written last."""
        head = self.ledger(name).with_suffix(".head")
        return int(head.read_text().partition(":")[0]) if head.exists() else 0

    def kept(self, name: str) -> list[Path]:
        """A client's replies that the server has not acknowledged."""
        folder = self.ledger(name).with_suffix(".outbox")
        return [path for path in folder.rglob("*") if path.is_file()]

    def charges(self, name: str) -> Counter[int]:
        """How often each round of training was charged to a client that has ended."""
        return Counter(int(e.task.rpartition("/")[2]) for e in self.entries(name) if "/train/" in e.task)


def until(condition: Callable[[], Any], problem: str, *processes: Process, seconds: float = PATIENCE_S) -> None:
    """Waits for a condition, as long as the processes live."""
    deadline = time.monotonic() + seconds
    while not condition():
        for process in processes:
            assert process.poll() is None, f"{problem}: it ended: {process.output(process.returncode)}"
        told = "".join(f"\n{p.text[-3000:]}" for p in processes)
        assert time.monotonic() < deadline, f"{problem} within {seconds:g} s{told}"
        time.sleep(0.005)
