"""How long a table takes from its file to training and validation tensors, and how much memory, beside polars alone.

Two tables of numbers: 1,000,000 rows x 31 columns, as a bank might have, and 100,000 x 2,000, as a laboratory might.
Each is read as CSV and as Parquet, in a process of its own on one core: by `client.data`, which encodes it, hashes its
rows and deals them, and by polars, which reads it into typed columns and no more. Memory is the process's peak resident
set, with what Python and the libraries take themselves, which is shown as well, beside the size of the encoded table.

    python -m simulations.benchmarks.tables [--quick]
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import polars as pl

TABLES = ((1_000_000, 31, 5), (100_000, 2_000, 1))  # rows, columns, runs
MIB = 2**20


def paths_of(folder: Path, rows: int, columns: int) -> list[Path]:
    return [folder / f"{rows}x{columns}.csv", folder / f"{rows}x{columns}.parquet"]


def write(path: Path) -> dict[str, Any]:
    """A table of numbers, the last its target, as CSV and as Parquet. By a process of its own, since what a process has
    used at most counts for those that it starts."""
    rows, columns = map(int, path.stem.split("x"))
    rng = np.random.default_rng(0)
    frame = pl.DataFrame(
        {f"f{i}": rng.normal(size=rows).round(1 + i % 3) for i in range(columns - 1)} | {"y": rng.integers(0, 2, rows)}
    )
    frame.write_csv(path.with_suffix(".csv"))
    frame.write_parquet(path.with_suffix(".parquet"))
    return {}


def read_here(path: Path) -> dict[str, Any]:
    """Reads a table in this process, as a client does."""
    import torch

    from client import data
    from common.document import documents
    from common.document.schema import Schema

    torch.set_num_threads(1)
    columns = int(path.stem.split("x")[1])
    schema = documents.validate(
        {
            "features": [{"name": f"f{i}", "type": "numeric", "bounds": [-4, 4]} for i in range(columns - 1)],
            "target": {"name": "y", "classes": [0, 1]},
        },
        Schema,
    )
    before, started = _peak(), time.perf_counter()
    rows = data.read(path, schema, key=b"benchmark")
    encoded = rows.x.nbytes
    dataset = data.split(rows, schema, key=b"benchmark", device=torch.device("cpu"), use_up=True)
    seconds = time.perf_counter() - started
    assert len(dataset.y) + len(dataset.validation_y) == int(path.stem.split("x")[0])
    return {"seconds": seconds, "imports": before, "peak": _peak(), "encoded": encoded}


def read_by_polars(path: Path) -> dict[str, Any]:
    """Reads a table in this process by polars alone."""
    before, started = _peak(), time.perf_counter()
    frame = pl.read_csv(path) if path.suffix == ".csv" else pl.read_parquet(path)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "imports": before, "peak": _peak(), "encoded": int(frame.estimated_size())}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _apart(how: str, path: Path) -> dict[str, Any]:
    """In a process of its own, on one core."""
    env = os.environ | {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "simulations.benchmarks.tables", how, str(path)],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def main(*, quick: bool) -> None:
    print(f"{'table':<24}{'by':<10}{'seconds':>9}{'peak MiB':>10}{'imports':>9}{'encoded':>9}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for rows, columns, runs in TABLES:
            paths = paths_of(Path(folder), rows // 20 if quick else rows, columns)
            _apart("write", paths[0])
            for path in paths:
                found: dict[str, list[dict[str, Any]]] = {"cloister": [], "polars": []}
                for _ in range(runs):
                    for how, told in found.items():
                        told.append(_apart(how, path))
                for how, told in found.items():
                    seconds = median(one["seconds"] for one in told)
                    peak, imports, encoded = (max(one[k] for one in told) / MIB for k in ("peak", "imports", "encoded"))
                    print(
                        f"{path.name:<24}{how:<10}{seconds:>9.2f}{peak:>10.0f}{imports:>9.0f}{encoded:>9.0f}",
                        flush=True,
                    )
                path.unlink()


if __name__ == "__main__":
    if (
        work := {"cloister": read_here, "polars": read_by_polars, "write": write}.get(" ".join(sys.argv[1:2]))
    ) is not None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        print(json.dumps(work(Path(sys.argv[-1]))))
    else:
        main(quick="--quick" in sys.argv)
