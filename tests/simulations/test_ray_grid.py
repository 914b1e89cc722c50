"""Flower's own simulation on Ray: what one client after another would do, on workers of more than one machine."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.errors import ConfigError
from server.folder.folder import RunFolder, load_model, read_run
from simulations.engine import simulate
from simulations.ray_grid import RayGrid
from tests.simulations.vector.test_grid import frozen, run, same_bits, sites_of, told
from tests.support import PRIVATE, ROOT, WHOLE, federation

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

TOOLS = {
    "training__schedule": {"name": "cosine", "over": "steps"},
    "training__augmentation": {"copies": 2, "drop": 0.2},
    **frozen(0),
    "strategy__average": 0.9,
    "schema__group": {"name": "c", "groups": ["red", "green"], "calibration": True},
    "schema__also": [{"name": "size", "bounds": [10, 30], "optional": True, "weight": 0.5}],
}
PATIENT = {"strategy__round_timeout": 200}  # on a busy machine Ray's workers take longer to start than a round may
RUNS = {
    "row": {**PRIVATE, "strategy__fraction": 0.6, "strategy__over_selection": 0.4, **TOOLS, **PATIENT},
    "client": {**WHOLE, "wire__dtype": "int8", "training__augmentation": {"mixup": 0.5, "jitter": 0.1}, **PATIENT},
}


@pytest.fixture(scope="module")
def runs() -> Iterator[Path]:
    """The run folders of ray_runs.py, by name. The path of a socket has at most 107 characters, and Ray's lie deep."""
    with tempfile.TemporaryDirectory(prefix="c") as short:
        folder = Path(short)
        done = subprocess.run(
            [sys.executable, "-m", "tests.simulations.ray_runs", str(folder / "runs")],
            cwd=ROOT,
            env={**os.environ, "RAY_TMPDIR": str(folder / "ray"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        yield folder / "runs"


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_two_machines_is_that_of_one_client_after_another(tmp_path, runs, name):
    found = load_model(runs / name / "ray")
    expected, result, events = run(federation(**RUNS[name]), tmp_path, "inline")
    assert told(runs / name / "ray") == (result, events)
    assert same_bits(found, expected)


def test_a_worker_that_is_lost_ends_the_run_with_the_last_rounds_model(tmp_path, runs):
    assert (runs / "lost" / "said").read_text().startswith("a worker on Ray has ended: ")
    assert read_run(runs / "lost").standing.state == "failed"
    expected, *_ = run(federation(), tmp_path, "inline")
    assert same_bits(load_model(runs / "lost"), expected)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_where_there_is_no_cluster_it_is_said_at_once(scheme):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
    fed = federation()
    with pytest.raises(ConfigError, match=f"no Ray cluster at {address}: .*refused"):
        RayGrid(sites_of(fed), run="test", address=address)


def test_what_is_missing_or_does_not_go_together_is_said(tmp_path, monkeypatch):
    fed = federation()
    folder = RunFolder.create(fed, path=tmp_path / "run")
    for options in ({"engine": "vector"}, {"engine": "ray", "workers": 2}):
        with pytest.raises(ConfigError, match="--ray-address belongs to --engine ray, and uses all of the cluster"):
            simulate(fed, sites_of(fed), folder, run="test", ray_address="auto", **options)
    one_gpu = sites_of(fed)
    one_gpu.device = torch.device("cuda:1")
    with pytest.raises(ConfigError, match="--device cuda, not cuda:1"):
        RayGrid(one_gpu, run="test")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'cloister\[ray\]'"):
        simulate(fed, sites_of(fed), folder, run="test", engine="ray")


def test_workers_measure_what_their_clients_take(runs):
    rounds = read_run(runs / "energy" / "ray").rounds
    assert rounds and all(event.energy["joules"] > 0 and event.energy["grams"] > 0 for event in rounds)
