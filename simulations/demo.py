"""The demo: four hospitals as a user would start them by hand.

One real `cloister serve` process and four real `cloister join` processes talk over mutual TLS on loopback. Each
client's folder holds its own hospital's table, file and keys, and nothing of the others.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from client import data
from client.settings import load_client_file
from client.site import split_key
from common.certificates import authority
from common.document import federation as federations
from common.document.federation import Federation
from common.errors import RunFailed
from common.model import mlp, objective
from common.model.scores import scores_of
from server.folder.folder import RunFolder, load_model
from server.rounds.events import Ended, Event, Serving, from_json
from simulations import HEART

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")

START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 20.0
POLL_S = 0.1


def new_folder(root: Path) -> Path:
    """Where one demo keeps its files: a folder of its own under `root`."""
    return (root / datetime.now().strftime("%Y-%m-%dT%H-%M-%S")).resolve()


def run_demo(folder: Path, *, observe: Callable[[Event], None]) -> tuple[dict[str, Any], Path]:
    """Runs the demo in a new folder. Returns what result.json holds, and the run folder.

    Args:
        observe: is given each event of the run, as the server writes it.

    Raises:
        RunFailed: a process ended with an error; the message says where its log lies.
    """
    federation = _lay_out(folder)
    run = folder / "server" / "run"
    with ExitStack() as processes:
        serving = ["serve", "federation.yaml", "--address", "127.0.0.1:0", "--certificates", "certs", "--out", "run"]
        serving.append("--no-report")  # which is made once held-out rows are scored
        server = processes.enter_context(_process(serving, folder / "server"))
        events = _events(run / "events.jsonl", server, folder / "server" / "log.txt")
        address = next(event.address for event in events if isinstance(event, Serving))
        hospitals = []
        for name in HOSPITALS:
            home = folder / name
            _set_server(home / "client.yaml", address)
            hospitals.append(processes.enter_context(_process(["join", "client.yaml"], home)))
        for event in events:
            observe(event)
            if isinstance(event, Ended):
                break
        for process, where in zip([server, *hospitals], ["server", *HOSPITALS], strict=True):
            if (code := process.wait(END_TIMEOUT_S)) != 0:
                raise RunFailed(f"the process of {where} ended with code {code}; see {folder / where / 'log.txt'}")
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    result["held_out"] = score_held_out(federation, folder, run)
    RunFolder(run).write_json("result.json", result)
    return result, run


def score_held_out(federation: Federation, folder: Path, run: Path) -> dict[str, Any]:
    """The final model's exact metrics on every hospital's validation rows, together and, in `per_client`, apart.

    Only the demo can do this, because it owns all four tables; a real client would score its own rows and keep
    the figure.
    """
    schema = federation.data_schema
    model = mlp.build(federation)
    mlp.load_weights(model, load_model(run))
    counts = {}
    for name in HOSPITALS:
        settings = load_client_file(folder / name / "client.yaml")
        key = split_key(Path(settings.state))
        rows = data.read(Path(settings.data.path), schema, key=key, form=settings.data.form, person=settings.data.id)
        own = data.split(rows, schema, key=key, device=torch.device("cpu"))
        loss = federation.loss
        counts[name] = objective.score(
            model, own.validation_x, own.validation_y, schema=schema, loss=loss, group=own.validation_group
        )
    together = scores_of(sum(counts.values()), schema)  # type: ignore[arg-type]  # a sum begins with 0
    return {**together, "per_client": {name: scores_of(c, schema) for name, c in counts.items()}}


def _lay_out(folder: Path) -> Federation:
    """The folders that five organisations would have, with their certificates."""
    server = folder / "server"
    certs = server / "certs"
    certs.mkdir(parents=True)
    shutil.copy(HEART / "federation.yaml", server)
    authority.create_authority(certs)
    authority.create_server(certs, ["127.0.0.1", "localhost"])
    for name in HOSPITALS:
        home = folder / name
        (home / "certs").mkdir(parents=True)
        shutil.copy(HEART / f"{name}.yaml", home / "client.yaml")
        shutil.copy(HEART / f"{name}.data", home)
        authority.create_client(certs, name)
        shutil.copy(certs / "ca.pem", home / "certs")
        for file in (f"{name}.pem", f"{name}.key"):
            shutil.move(certs / file, home / "certs" / file)
    return federations.load(server / "federation.yaml")


def _set_server(path: Path, address: str) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(f"server: {address}\n" if line.startswith("server:") else line for line in lines))


@contextmanager
def _process(arguments: list[str], home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A `cloister` process in a folder of its own, its output in log.txt; ended with the context."""
    # One thread a process: five processes that all take every core are slower than five that share them.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with (home / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cloister", *arguments],
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(END_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _events(path: Path, server: subprocess.Popen[bytes], log: Path) -> Iterator[Event]:
    """The run's events as they are written, until the server has ended."""
    started, position = time.monotonic(), 0
    while True:
        ended = server.poll() is not None  # before reading: what it wrote last must still be read
        text = path.read_text() if path.exists() else ""
        whole = text[position : text.rfind("\n") + 1]
        position += len(whole)
        yield from (from_json(json.loads(line)) for line in whole.splitlines())
        if ended:
            raise RunFailed(f"the server ended early, with code {server.returncode}; see {log}")
        if not text and time.monotonic() - started > START_TIMEOUT_S:
            raise RunFailed(f"the server did not start within {START_TIMEOUT_S:g} s; see {log}")
        time.sleep(POLL_S)
