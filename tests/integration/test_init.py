"""A federation from `cloister init` to its model, by the commands that it writes down."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.integration.federation import Process

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


def commands(guide: Path) -> list[list[str]]:
    """What a guide says to type, without `cloister`."""
    lines = re.findall(r"^ {7}cloister (.*)$", guide.read_text(), re.M)
    assert lines
    return [line.split() for line in lines]


def test_what_init_writes_runs_as_it_is(tmp_path):
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    begun = ["init", "fed", "--example", "regression", "--participants", "ada,ben", "--server", address]
    with ExitStack() as processes:

        def start(arguments: list[str], folder: Path) -> Process:
            process = Process(arguments, folder)
            processes.callback(process.end)
            return process

        start(begun, tmp_path).output()
        folder = tmp_path / "fed"
        script = {**os.environ, "CLOISTER": str(Path(sys.executable).with_name("cloister"))}
        subprocess.run(["sh", "certificates.sh"], cwd=folder, env=script, check=True, stdout=subprocess.DEVNULL)
        assert not (folder / "certs/ada.key").exists()  # it lies with its owner alone
        simulate, serve = commands(folder / "README.md")
        assert simulate[0] == "simulate"
        doctor, join, *after = commands(folder / "participants/ada/README.md")
        server = start(serve, folder)
        server.until("waiting for clients: 0 of 2")
        assert start(doctor, folder / "participants/ada").output().endswith("ready\n")
        clients = [start(join, folder / "participants" / name) for name in ("ada", "ben")]
        for client in clients:
            assert "the run is over: completed" in client.output()
        assert "completed after 60 rounds" in server.output()
        assert [verb for verb, *_ in after] == ["evaluate", "predict", "budget"]
        for each in after:
            start(each, folder / "participants/ada").output()
        assert (folder / "participants/ada/predictions.csv").exists()
