"""`cloister sweep` as a person gives it, and as it ends."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

import cloister
from tests.support import PRIVATE, ROOT, document, table

pytestmark = pytest.mark.timeout(240)

GRID = ["--grid", "training.learning_rate=0.1,0.3", "privacy.row.epsilon=inf,8"]
DATA = ["--data", "table.csv", "--clients", "4", "--device", "cpu"]


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    Path("federation.yaml").write_text(yaml.safe_dump(document(**PRIVATE)))
    table(200).write_csv("table.csv")
    return tmp_path


def sweep(*arguments: str) -> Result:
    return CliRunner().invoke(cloister.app, ["sweep", "federation.yaml", *arguments])


def test_a_grid_becomes_a_table_two_files_and_a_picture(files):
    done = sweep(*GRID, "--seeds", "2", *DATA)
    assert done.exit_code == 0, done.output
    assert "sweep of small: 4 points, 2 seeds" in done.output and "8 of 8 runs" in done.output
    rows = [line.split() for line in done.output.splitlines() if "±" in line]
    assert [row[:2] for row in rows] == [["0.1", "∞"], ["0.1", "8"], ["0.3", "∞"], ["0.3", "8"]]
    with open("sweeps/small/results.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["runs"] for row in found] == ["2"] * 4
    for shown, row in zip(rows, found, strict=True):
        assert shown[2] == f"{100 * float(row['accuracy_mean']):.1f}"
    assert Path("sweeps/small/results.svg").read_text().startswith("<?xml")

    again = sweep(*GRID, "--seeds", "2", *DATA, "--metric", "recall")
    assert again.exit_code == 0 and "recall" in again.output and "accuracy" not in again.output


def test_a_search_tries_as_many_points_as_it_may(files):
    done = sweep("--search", "4", "--grid", "training.learning_rate=0.01..1", *DATA, "--out", "found")
    assert done.exit_code == 0, done.output
    with open("found/results.csv", newline="") as file:
        rates = [float(row["training.learning_rate"]) for row in csv.DictReader(file)]
    assert len(rates) == 4 and all(0.01 <= rate <= 1 for rate in rates)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--grid", "training.lerning_rate=1", *DATA], "did you mean learning_rate"),
        (["--grid", "training.learning_rate=0..1", *DATA], "a range is for --search"),
        (["rounds", *DATA], "--grid rounds: expected KEY=VALUE"),
        (["--metric", "mae", *DATA], "--metric mae: this target has accuracy, precision, recall, f1"),
        (["--data", "missing.csv", "--clients", "4"], "missing.csv: no such file"),
        ([*DATA, "--held-out", "missing.csv"], "missing.csv: no such file"),
        (["--clients", "4"], "give exactly one of --data TABLE"),
        ([*DATA, "--out", "."], ".: not the folder of a sweep"),
    ],
)
def test_a_wrong_sweep_is_said_and_writes_nothing(files, arguments, message):
    before = sorted(files.iterdir())
    done = sweep(*arguments)
    assert done.exit_code != 0 and "error: " in done.output and message in done.output
    assert "Traceback" not in done.output and sorted(files.iterdir()) == before


def test_a_sweep_without_any_model_fails(files):
    done = sweep("--grid", "privacy.row.epsilon=0.2", *DATA)
    assert done.exit_code == 1
    assert "seed 0: 4 of 4 clients refuse, and 2 are needed" in done.output


def running_in(group: int) -> list[str]:
    """The processes of a group, but for those of which only their last word is there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
            found += [path.parent.name] if int(pgrp) == group and state != "Z" else []
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="signals and processes as Linux has them")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_sweep_that_is_ended_keeps_what_is_complete_and_leaves_no_process(files, how):
    rounds = ["--grid", "training.rounds=3,1000000"]
    with subprocess.Popen(
        [sys.executable, "-m", "cloister", "sweep", "federation.yaml", *rounds, "--grid", "privacy.row=null", *DATA],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not (complete := list(files.glob("sweeps/small/runs/*/seed-0/scores.json"))):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does, to all of them
        else:
            process.kill()  # it alone: the others must find out
        said, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -how), said
    assert "Traceback" not in said
    if how == signal.SIGINT:
        assert "stopped: 1 of 2 runs are complete; start it again to go on" in said
    assert json.loads(complete[0].read_text())["rounds"] == 3
    while running_in(process.pid):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.1)


def test_a_private_sweep_says_what_choosing_would_cost(files):
    done = sweep("--preset", "rate", "--grid", "training.rounds=1", *DATA)
    assert done.exit_code == 0, done.output
    assert "sweep of small: 5 points, 1 seeds" in done.output
    said = " ".join(done.output.split())
    assert "choosing among the 5 points would have its own price. All 5 runs together cost a row epsilon" in said
    assert "a private tournament of 5 runs on average costs" in said
    free = sweep("--preset", "rate", "--grid", "training.rounds=1", "privacy.row=null", *DATA, "--out", "free")
    assert free.exit_code == 0 and "its own price" not in free.output
