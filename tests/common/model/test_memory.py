from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import OutOfMemory
from common.model.memory import room_for
from common.model.weights import initial_weights
from server.folder.folder import RunFolder
from server.rounds.events import RoundEnded
from simulations.engine import simulate
from simulations.sources import sites_from_table
from tests.support import PRIVATE, document, federation

# Limits the memory of a process once its libraries are there, by 512 MiB: the first weights alone need 800 MB.
LIMITED = """
import resource, sys
import cloister, simulations.engine, server.observers.scoring
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29,) * 2)
sys.argv = ["cloister", "simulate", "big.yaml", "--generate", "100", "--clients", "2"]
cloister.main()
"""


# The limit is on address space, of which each thread takes 8 to 72 MB: without this a machine of many cores has
# none left before the model is made.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}


@pytest.mark.parametrize("take", [lambda: np.empty(2**58), lambda: torch.empty(2**58)], ids=["numpy", "torch"])
def test_memory_that_runs_out_is_told_with_the_models_size(take):
    # 5 inputs: (5 + 1) x 8 + (8 + 1) x 2 = 66 numbers
    with pytest.raises(OutOfMemory, match=r"model of 66 parameters: .* make model\.hidden smaller, or use a machine"):
        with room_for(federation()):
            take()


def test_a_gpus_memory_that_runs_out_is_told_as_well():
    with pytest.raises(OutOfMemory), room_for(federation()):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory")])
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error), match=str(error)), room_for(federation()):
        raise error


@pytest.mark.parametrize("hidden", [[], [8], [5, 7]])
def test_a_models_size_is_known_before_it_is_made(hidden):
    fed = federation(model__hidden=hidden)
    assert fed.model_bytes == sum(array.nbytes for array in initial_weights(fed).values())


def test_a_client_without_the_memory_answers_that_its_task_failed_and_goes_on(tmp_path, monkeypatch):
    fits = [0]

    def fit(*arguments: object, **options: object) -> float:
        fits[0] += 1
        if fits[0] == 1:
            torch.empty(2**58)
        return 0.5

    monkeypatch.setattr("client.training.plain.fit", fit)
    fed, told = federation(training__rounds=2), []
    sites = sites_from_table(fed, 200, clients=3, how="iid", seed=0, device=torch.device("cpu"))
    folder = RunFolder.create(fed, path=tmp_path / "run")
    result = simulate(fed, sites, folder, run="test", engine="inline", observe=told.append)
    first, second = [event for event in told if isinstance(event, RoundEnded)]
    assert "too little memory for a model of 66 parameters" in first.rejected[0].reason
    assert (result["status"], second.clients) == ("completed", 3)


def test_where_rows_are_private_nobody_else_hears_that_memory_ran_out():
    # How much a step takes depends on how many rows it draws.
    with pytest.raises(OutOfMemory) as open_, room_for(federation()):
        torch.empty(2**58)
    with pytest.raises(OutOfMemory) as private, room_for(federation(**PRIVATE)):
        torch.empty(2**58)
    assert (open_.value.public, private.value.public) == (str(open_.value), None)
    assert "model of 66 parameters" in str(private.value)


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
def test_a_model_that_does_not_fit_is_one_line_of_error(tmp_path):
    (tmp_path / "big.yaml").write_text(json.dumps(document(model__hidden=[10_000, 10_000])))  # JSON is YAML
    root = Path(__file__).parents[3]
    env = {"PYTHONPATH": str(root), **ONE_THREAD}
    done = subprocess.run([sys.executable, "-c", LIMITED], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-2000:]
    said = "error: this machine has too little memory for a model of 100,090,002 parameters: 0.37 GiB"
    assert done.stderr.strip().splitlines()[-1].startswith(said)
    assert "Traceback" not in done.stderr
