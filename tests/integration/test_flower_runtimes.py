"""The two apps, unchanged, under Flower's own runtimes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support import PRIVATE, ROOT, document, table

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SIMULATION = """
import warnings
warnings.filterwarnings("ignore")
from flwr.simulation import run_simulation
from client.app import app as client_app
from server.app import app as server_app

# One worker: the test takes about as long as Ray and its workers take to start.
run_simulation(
    server_app,
    client_app,
    num_supernodes=2,
    backend_config={"init_args": {"num_cpus": 1}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
)
"""


@pytest.fixture
def short_tmp() -> Iterator[str]:
    """Ray's sockets lie deep below it, and the path of a socket has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="c") as folder:
        yield folder


def test_the_apps_run_under_flowers_ray_simulation(tmp_path, short_tmp, monkeypatch):
    (tmp_path / "federation.yaml").write_text(yaml.safe_dump(document(**PRIVATE, strategy__round_timeout=200)))
    (tmp_path / "data").mkdir()
    for i in range(2):
        table(seed=i).write_csv(tmp_path / "data" / f"hospital-{i}.csv")
    settings = {
        "CLOISTER_FEDERATION": tmp_path / "federation.yaml",
        "CLOISTER_DATA_DIR": tmp_path / "data",
        "CLOISTER_RUNS": tmp_path / "runs",
        "TMPDIR": short_tmp,
        "PYTHONPATH": ROOT,
        "RAY_DEDUP_LOGS": "0",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    done = subprocess.run([sys.executable, "-c", SIMULATION], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (tmp_path / "runs").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["rounds"]) == ("completed", 3)
    assert result["clients"] == ["hospital-0", "hospital-1"]
    # A site is opened anew for each message, yet the charges of all rounds add up.
    statement = json.loads((run / "privacy.json").read_text())["row"]["per_client"]
    assert [client["released"][1]["steps"] for client in statement.values()] == [6, 6]


def test_flwr_build_accepts_the_project(tmp_path):
    import shutil

    project = tmp_path / "cloister"
    keep = shutil.ignore_patterns(".*", "__pycache__", "runs", "cloister-demo", "*.egg-info")
    shutil.copytree(ROOT, project, ignore=keep)
    flwr = Path(sys.executable).with_name("flwr")
    built = subprocess.run(
        [str(flwr), "build", "--app", str(project)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (bundle,) = tmp_path.glob("*.fab")
    names = set(zipfile.ZipFile(bundle).namelist())
    assert {"client/app.py", "server/app.py", "pyproject.toml"} <= names
