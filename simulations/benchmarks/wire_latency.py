"""What a round costs beside training: `serve` and two `join`, and the same two apps under Flower's own processes."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import textwrap
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import yaml

from simulations.benchmarks.wire_processes import (
    PEOPLE,
    ROOT,
    SMALL,
    Children,
    certificates,
    document,
    events,
    megabytes,
    table,
    wait_for,
    write_table,
)
from simulations.benchmarks.wire_timed import VARIABLE

ROUNDS, WARM_UP = 300, 30
FLOWER_ROUNDS, FLOWER_WARM_UP = 8, 1
ROWS = 200
PROJECT = """
    [build-system]
    requires = ["hatchling"]
    build-backend = "hatchling.build"
    [project]
    name = "timed"
    version = "1.0.0"
    dependencies = []
    [tool.flwr.app]
    publisher = "benchmark"
    [tool.flwr.app.components]
    serverapp = "timed.apps:server_app"
    clientapp = "timed.apps:client_app"
    [tool.flwr.app.config]
"""
APPS = """
    import server.app
    import simulations.benchmarks.wire_timed
    server_app = server.app.app
    client_app = simulations.benchmarks.wire_timed.app
"""
CONNECTION = """
    [superlink]
    default = "benchmark"
    [superlink.benchmark]
    address = "127.0.0.1:{port}"
    insecure = true
"""


class Measured:
    """Rounds of one run: how long each took, and the longer of the two clients' trainings."""

    def __init__(self, run: Path, times: list[Path], skip: int) -> None:
        rounds = [e for e in events(run) if e["event"] == "round"]
        trained = [[float(line) for line in path.read_text().split()] for path in times]
        if any(len(each) != len(rounds) for each in trained) or any(e["clients"] != len(times) for e in rounds):
            raise RuntimeError(f"{len(rounds)} rounds, but {[len(each) for each in trained]} trainings")
        slowest = [max(each) for each in zip(*trained, strict=True)]
        self.training = 1e3 * median(slowest[skip:])
        self.rest = [1e3 * (e["seconds"] - s) for e, s in zip(rounds, slowest, strict=True)][skip:]
        apart = [b["time"] - a["time"] for a, b in pairwise(rounds)]
        self.apart = [1e3 * (whole - s) for whole, s in zip(apart, slowest[1:], strict=True)][skip:]

    @property
    def figures(self) -> list[float]:
        return [f(times) for times in (self.rest, self.apart) for f in (median, _within_95_percent)]

    def row(self, name: str) -> tuple[str, ...]:
        return name, str(len(self.rest)), f"{self.training:.1f} ms", *(f"{ms:,.1f} ms" for ms in self.figures)


def _within_95_percent(times: list[float]) -> float:
    return quantiles(times, n=20, method="inclusive")[-1]


def main() -> None:
    ours, memory = _ours()
    theirs = _flower()
    head = ("", "rounds", "training", "beside it: median", "95 % within", "with saving: median", "95 % within")
    rows = [ours.row("serve and 2 join, TLS"), theirs.row("SuperLink and 2 SuperNodes, insecure")]
    ratios = [f"{a / b:,.0f} x" for a, b in zip(theirs.figures, ours.figures, strict=True)]
    rows.append(("Flower's / ours", "", "", *ratios))
    table(f"A round of two clients, {ROWS} rows each, MLP 10-50-2, Adam", head, rows)
    print("\n  Flower's training is that of a new process each time, whose first step is slow; it counts as training.")
    print(f"  Our server process at the end: {memory:.0f} MB.")


def write_files(folder: Path, widths: tuple[int, ...], *, server: str | None, **training: Any) -> Path:
    """The federation, tables and, for a server's address, the client files. Without one, they are for a SuperNode."""
    path = folder / "federation.yaml"
    path.write_text(yaml.safe_dump(document(widths, **training)))
    for i, name in enumerate(PEOPLE):
        if not (folder / f"{name}.csv").exists():
            write_table(folder / f"{name}.csv", widths, rows=ROWS, seed=i)
        files = {"ca": "certs/ca.pem", "certificate": f"certs/{name}.pem", "key": f"certs/{name}.key"}
        client = {
            "server": server or "127.0.0.1:1",
            "tls": files if server else None,
            "data": {"path": f"{name}.csv", "name": name},
            "device": "cpu",
            "state": f"state/{name}",
            "policy": {"epsilon": 8.0, "delta": 1e-3, "without_privacy": True},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(client if server else {**client, "name": name}))
    return path


def serve(children: Children, folder: Path, document: Path) -> tuple[subprocess.Popen[str], str]:
    """A `cloister serve` and its address; its run folder is `folder`/run."""
    command = ("serve", document, "--address", "127.0.0.1:0", "--certificates", folder / "certs")
    out = folder / "run"
    server = children.start(sys.executable, "-m", "cloister", *command, "--out", out, cwd=folder, PYTHONPATH=ROOT)
    serving = wait_for(lambda: next((e for e in events(out) if e["event"] == "serving"), None), server)
    return server, str(serving["address"])


def _ours() -> tuple[Measured, float]:
    with tempfile.TemporaryDirectory() as name, Children() as children:
        folder = Path(name)
        certificates(folder, PEOPLE)
        server, address = serve(children, folder, write_files(folder, SMALL, server="127.0.0.1:1", rounds=ROUNDS))
        write_files(folder, SMALL, server=address, rounds=ROUNDS)
        times = [folder / f"{person}.times" for person in PEOPLE]
        for person, file in zip(PEOPLE, times, strict=True):
            command = (sys.executable, "-m", "simulations.benchmarks.wire_timed", f"{person}.yaml")
            children.start(*command, cwd=folder, PYTHONPATH=ROOT, **{VARIABLE: file})
        last: list[float] = []

        def ended() -> bool | None:
            if server.poll() is None:
                last[:] = [megabytes(server.pid)]
            return True if any(e["event"] == "end" for e in events(folder / "run")) else None

        wait_for(ended, server, seconds=300)
        return Measured(folder / "run", times, WARM_UP), last[0]


def _flower() -> Measured:
    with tempfile.TemporaryDirectory() as name, Children() as children:
        folder = Path(name)
        path = write_files(folder, SMALL, server=None, rounds=FLOWER_ROUNDS)
        port, *ports = _free_ports(1 + len(PEOPLE))
        for file, text in {
            "app/pyproject.toml": PROJECT,
            "app/timed/__init__.py": "",
            "app/timed/apps.py": APPS,
            "home/config.toml": CONNECTION.format(port=port),
        }.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(textwrap.dedent(text))
        settings: dict[str, object] = {
            "FLWR_HOME": folder / "home",
            "FLWR_DISABLE_UPDATE_CHECK": 1,
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": 0.05,  # a second by default; the other pauses, of 3 s, are fixed
            "PYTHONPATH": ROOT,
            "CLOISTER_FEDERATION": path,
            "CLOISTER_RUNS": folder / "runs",
        }
        link = children.start(
            *("flower-superlink", "--insecure", "--disable-runtime-dependency-installation"),
            *("--host", "127.0.0.1", "--port", port),
            cwd=folder,
            **settings,
        )
        wait_for(lambda: _listens(port), link)
        times = [folder / f"{person}.times" for person in PEOPLE]
        for person, own, timed in zip(PEOPLE, ports, times, strict=True):
            command = ("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", own)
            where = ("--node-config", f"client-file='{folder / person}.yaml'")
            children.start(*command, *where, cwd=folder, **{**settings, VARIABLE: timed})
        run = children.start("flwr", "run", folder / "app", "benchmark", cwd=folder, **settings)
        if run.wait(60):
            raise RuntimeError(
                "flwr run failed: " + "".join(p.read_text() for p in (folder / "logs").glob("*flwr-run*"))
            )

        def finished() -> Path | None:
            runs = [p for p in (folder / "runs").glob("*") if any(e["event"] == "end" for e in events(p))]
            return runs[0] if runs else None

        return Measured(wait_for(finished, link, seconds=60 + 20 * FLOWER_ROUNDS), times, FLOWER_WARM_UP)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _listens(port: int) -> bool | None:
    with socket.socket() as probe:
        return True if probe.connect_ex(("127.0.0.1", port)) == 0 else None


if __name__ == "__main__":
    main()
