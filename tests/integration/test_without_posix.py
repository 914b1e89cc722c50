"""The client's path on a Python that lacks what only POSIX systems have, as Windows does. The shim takes it away; file
locks are then filelock's files, and not the ones of Windows: what this cannot show, docs/data-owner.md says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.federation import Federation
from tests.support import PRIVATE, ROOT

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

SHIM = str(Path(__file__).parent / "shim")
BARE = {"PYTHONPATH": os.pathsep.join([SHIM, str(ROOT)]), "WITHOUT_POSIX": "1"}

OPEN_LEDGER = "import pathlib; from client.account.ledger import Ledger; Ledger(pathlib.Path"


def python(code: str) -> str:
    """The last line of what a Python without POSIX says to a program that fails."""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **BARE}, capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_the_shim_takes_away_what_it_says():
    code = "import asyncio, os\nassert not hasattr(os, 'getuid')\nasyncio.new_event_loop().add_signal_handler(2, print)"
    assert python(code).startswith("NotImplementedError")
    assert python("import fcntl").startswith("ModuleNotFoundError")


def test_a_client_trains_charges_its_ledger_and_is_interrupted_without_posix(federation):
    fed: Federation = federation(**PRIVATE)
    server = fed.serve()
    ben = fed.join("ben", **BARE)
    ben.until("as ben, ready")
    assert "in use by another client" in python(f"{OPEN_LEDGER}({str(fed.ledger('ben'))!r}))")
    ben.send_signal(signal.SIGTERM)
    assert "left the federation" in ben.output(130)
    assert fed.start("doctor", fed.folder / "ben.yaml", **BARE).output().endswith("ready\n")
    for client in (fed.join("ada", **BARE), fed.join("ben", **BARE)):
        assert "the run is over: completed" in client.output()
    server.output()
    assert fed.charges("ada") == fed.charges("ben") == {1: 1, 2: 1, 3: 1}
