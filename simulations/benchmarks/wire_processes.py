"""Child processes that end with the benchmark, what they cost, and the folder that they share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from common.certificates import authority
from common.certificates.identity import TLSMaterial
from common.model.weights import Weights

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
TICKS = os.sysconf("SC_CLK_TCK")
SMALL, MIDDLE, LARGE = (10, 50, 2), (10, 230, 2), (784, 200, 200, 10)  # 652, 2,992 and 199,210 parameters
PEOPLE = ("ada", "ben")


class Children(ExitStack):
    """Processes, each in a group of its own; leaving the block ends the groups by id."""

    def start(self, *command: object, cwd: Path = ROOT, **environment: object) -> subprocess.Popen[str]:
        """A process whose output goes to a file in `cwd`'s logs, so that nothing waits for a reader."""
        log = self._log(cwd, command)
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            env=_environment(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.callback(end, process)
        return process

    def role(self, module: str, *arguments: object, **environment: object) -> Role:
        """A process of this benchmark that is told what to do, one JSON object a line."""
        process = subprocess.Popen(
            [sys.executable, "-m", f"simulations.benchmarks.{module}", *map(str, arguments)],
            cwd=ROOT,
            env=_environment(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if "-v" in sys.argv else subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self.callback(end, process)
        return Role(process)

    def _log(self, cwd: Path, command: tuple[object, ...]) -> Any:
        (cwd / "logs").mkdir(exist_ok=True)
        name = "-".join(Path(str(word)).name for word in command if not str(word).startswith("-"))[:80]
        return self.enter_context((cwd / "logs" / f"{time.monotonic_ns()}-{name}").open("w"))


class Role:
    """The end of a pipe at which one asks; `serve_role` is the other."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.pid = process, process.pid
        self.greeting = self.answer()

    def ask(self, **command: Any) -> dict[str, Any]:
        self.tell(**command)
        return self.answer()

    def tell(self, **command: Any) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # `answer` says that it has ended
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args!r} ended with {self.process.wait(10)}; run with -v to see why")
        answer: dict[str, Any] = json.loads(line)
        return answer


def say(**answer: Any) -> None:
    """A role's answer."""
    print(json.dumps(answer), flush=True)


def end(process: subprocess.Popen[str]) -> None:
    """Ends a process and what it has started."""
    for number, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()


def _environment(changes: dict[str, object]) -> dict[str, str]:
    kept = {
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "COLUMNS": "200",
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    return {**os.environ, **kept, **{name: str(value) for name, value in changes.items()}}


def wait_for(found: Callable[[], T | None], process: subprocess.Popen[str], *, seconds: float = 60) -> T:
    """What `found` finds, once it does."""
    deadline = time.monotonic() + seconds
    while (value := found()) is None:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{process.args!r}: nothing within {seconds:g} s")
        time.sleep(0.02)
    return value


# What a process costs


def megabytes(pid: int | str, what: str = "VmRSS") -> float:
    """Resident memory now (VmRSS) or at its highest (VmHWM), in 10^6 bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(what)


def forget_highest(pid: int | str) -> None:
    """VmHWM starts again from what is resident now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def cpu_seconds(pid: int | str) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


# What is sent, and who may send it


def state(widths: tuple[int, ...], seed: int = 0) -> Weights:
    """The arrays of an MLP with layers of these widths."""
    rng = np.random.default_rng(seed)
    arrays: Weights = {}
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        arrays[f"layers.{i}.weight"] = rng.normal(size=(fan_out, fan_in)).astype(np.float32)
        arrays[f"layers.{i}.bias"] = rng.normal(size=fan_out).astype(np.float32)
    return arrays


def size(arrays: Weights) -> int:
    """Bytes of the bare tensors."""
    return sum(array.nbytes for array in arrays.values())


def document(widths: tuple[int, ...], **training: Any) -> dict[str, Any]:
    """The article's federation for an MLP of these widths, without evaluation."""
    article: dict[str, Any] = yaml.safe_load((ROOT / "simulations" / "article.yaml").read_text())
    inputs, *hidden, classes = widths
    features = [{"name": f"x{i}", "type": "numeric", "bounds": [-3, 3]} for i in range(inputs)]
    article["schema"] |= {"features": features, "target": {"name": "label", "classes": list(range(classes))}}
    article["model"]["hidden"] = hidden
    article["training"] |= training
    article["strategy"]["min_clients"] = len(PEOPLE)
    article["privacy"]["evaluation"] = {"every": 0}
    return article


def write_table(path: Path, widths: tuple[int, ...], *, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(rows, widths[0])), rng.integers(widths[-1], size=(rows, 1))
    header = ",".join([*(f"x{i}" for i in range(widths[0])), "label"])
    np.savetxt(path, np.hstack([x, y]), fmt=["%.4f"] * widths[0] + ["%d"], delimiter=",", header=header, comments="")


def certificates(folder: Path, names: tuple[str, ...] | list[str]) -> Path:
    """A folder with an authority, the server's certificate for loopback, and one for each name."""
    certs = folder / "certs"
    if not certs.exists():
        authority.create_authority(certs)
        authority.create_server(certs, ["127.0.0.1"])
    for name in names:
        authority.create_client(certs, name)
    return certs


def material(certs: Path, name: str) -> TLSMaterial:
    return TLSMaterial(
        ca=(certs / "ca.pem").read_bytes(),
        certificate=(certs / f"{name}.pem").read_bytes(),
        key=(certs / f"{name}.key").read_bytes(),
    )


def events(run: Path) -> list[dict[str, Any]]:
    path = run / "events.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


# What is printed


def table(title: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    print(f"\n{title}\n")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, tuple("-" * width for width in widths), *rows):
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(["", *cells]))
    sys.stdout.flush()
