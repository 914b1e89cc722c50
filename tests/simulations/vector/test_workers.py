"""Worker processes change no bit, and the end of one is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.document.federation import Federation
from common.errors import WorkerLost
from common.model.weights import initial_weights
from server.folder.folder import RunFolder, load_model, read_run
from server.rounds.aggregation import Mean
from server.rounds.events import Event, RoundEnded
from simulations import engine
from simulations.engine import devices_for, simulate
from simulations.sites import Sites
from simulations.sources import sites_from_files
from simulations.vector.fold import Folding
from simulations.vector.grid import VectorGrid
from simulations.vector.shared import SharedArray
from simulations.vector.workers import Workers
from tests.simulations.vector.test_grid import EACH, same_bits, sites_of
from tests.simulations.vector.test_train import jobs_of, private
from tests.support import PRIVATE, ROOT, WHOLE, document, federation, table

CPU = torch.device("cpu")
READY_S = 120.0


@pytest.fixture
def at_once(monkeypatch) -> list[Workers]:
    """Workers are started after the first round, and the next one waits for them; there is work for two. Returns those
    that were."""
    monkeypatch.setattr("simulations.vector.train.CHUNK_CLIENTS", 2)
    started: list[Workers] = []
    real = Workers.__init__

    def start(self: Workers, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        started.append(self)
        assert self.are_ready(wait_s=READY_S)

    monkeypatch.setattr(Workers, "__init__", start)
    monkeypatch.setattr(engine, "VectorGrid", partial(VectorGrid, worth_s=-1.0))
    return started


def run_with(workers: int, fed: Federation, where: Path, sites: Sites) -> Any:
    folder = RunFolder.create(fed, path=where / str(workers))
    simulate(fed, sites, folder, run="test", workers=workers)
    return load_model(folder.path)


@pytest.mark.parametrize(
    "changes",
    [
        {"training__optimizer": "adam", "model__dropout": 0.1},
        {
            "training__optimizer": "adamw",
            "model__activation": "sigmoid",
            "model__hidden": [37, 5],
            "wire__dtype": "int8",
        },
        {**PRIVATE, **EACH, "model__dropout": 0.3, "wire__dtype": "int8"},
        {**PRIVATE, "privacy__client": {**WHOLE["privacy"]["client"], "adaptive": {}, "weight_cap": 20}},
    ],
    ids=["plain", "plain, odd widths", "row", "both"],
)
def test_the_number_of_workers_changes_no_bit(tmp_path, at_once, changes):
    fed = federation(**changes)
    one, two = (run_with(workers, fed, tmp_path, sites_of(fed)) for workers in (1, 2))
    assert same_bits(one, two)
    (workers,) = at_once
    assert len(workers) == 2
    assert not any(process.is_alive() for process in workers._processes)


def test_workers_have_every_clients_own_table(tmp_path, at_once):
    fed = federation(schema__validation_fraction=0.1)
    for name, rows in (("a", 30), ("b", 50), ("c", 11)):
        table(rows, seed=rows).write_csv(tmp_path / f"{name}.csv")
    one, two = (
        run_with(workers, fed, tmp_path, sites_from_files(fed, tmp_path, seed=1, device=CPU)) for workers in (1, 2)
    )
    assert same_bits(one, two) and at_once


def test_a_worker_that_dies_ends_the_run_with_the_last_rounds_model(tmp_path, at_once):
    fed = federation(training__rounds=5)
    folder = RunFolder.create(fed, path=tmp_path / "run")

    def kill(event: Event) -> None:
        if isinstance(event, RoundEnded) and event.round == 3:
            os.kill(at_once[0]._processes[1].pid or 0, signal.SIGKILL)

    with pytest.raises(WorkerLost, match=r"a worker process \(pid \d+\) has ended by signal SIGKILL; the system may"):
        simulate(fed, sites_of(fed), folder, run="test", workers=2, observe=kill)
    standing = read_run(folder.path).standing
    assert standing.state == "failed"
    of_three_rounds = run_with(1, fed.with_rounds(3), tmp_path, sites_of(fed.with_rounds(3)))
    assert same_bits(load_model(folder.path), of_three_rounds)


@pytest.fixture(scope="module")
def workers() -> Any:
    fed = federation()
    tables = [(torch.ones(4, fed.layer_sizes[0]), torch.ones(4, dtype=torch.int64))]
    pool = Workers(fed, tables, devices=[CPU, CPU], width=8)
    pool.fed, pool.table = fed, tables[0]  # type: ignore[attr-defined]
    yield pool
    pool.close()


def test_an_error_in_a_worker_is_raised_here_and_it_goes_on(workers):
    assert workers.are_ready(wait_s=READY_S)
    fed, (x, y) = workers.fed, workers.table
    weights = initial_weights(fed)
    (recipe,) = private(fed, np.random.default_rng(0), 1)
    jobs = jobs_of(fed, [recipe] * 4, [4] * 4, seed=1, one_table=True)

    def train(rows: list[int]) -> Folding:
        some = [replace(job, x=x, y=y, index=np.array(rows)) for job in jobs]
        folding = Folding(weights, Mean(weights), dtype="float32")
        workers.train(
            [some[:2], some[2:]], folding, aggregator=lambda: Mean(weights), seconds=60.0, done=counted.append
        )
        return folding

    counted: list[int] = []
    with pytest.raises(RuntimeError, match="IndexError: index out of range"):
        train([0, 9])  # no such row
    counted.clear()
    assert sorted(train([0, 1, 2]).nodes) == [0, 1, 2, 3] and sum(counted) == 4


@pytest.mark.parametrize("array", [np.arange(12.0).reshape(3, 4), np.zeros((0, 5), np.float32), np.array(7)])
def test_an_array_in_shared_memory_is_the_same_one_wherever_it_is_mapped(array):
    shared = SharedArray(array)
    one, other = shared.array(), shared.array()
    shared.close()
    assert one.dtype == array.dtype and np.array_equal(one, array)
    if array.size:
        one.flat[0] = 5
        assert other.flat[0] == 5


def test_a_worker_for_each_core_or_as_many_as_asked():
    assert devices_for(CPU, 3) == [CPU] * 3
    assert devices_for(CPU, None) == [CPU] * len(os.sched_getaffinity(0))
    assert devices_for(torch.device("cuda", 1), None) == [torch.device("cuda", 1)]


def is_running(pid: int) -> bool:
    """Is the process there, and not only its last word, which nobody has asked for?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds child processes as Linux shows them")
def test_ctrl_c_keeps_what_is_done_and_leaves_no_worker(tmp_path):
    (tmp_path / "long.yaml").write_text(json.dumps(document(training__rounds=1_000_000)))  # JSON is YAML
    command = ["simulate", "long.yaml", "--generate", "2000", "--clients", "50", "--workers", "2", "--out", "run"]
    with subprocess.Popen(
        [sys.executable, "-m", "cloister", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + READY_S
        children: list[int] = []
        while len(children) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
            children = [
                int(pid)
                for task in Path(f"/proc/{process.pid}/task").iterdir()
                for pid in (task / "children").read_text().split()
            ]
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "stopped" and result["rounds"] > 0
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert "Traceback" not in said, said
    assert len(children) >= 2
    while any(map(is_running, children)):
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.1)
