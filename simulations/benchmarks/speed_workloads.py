"""What simulations are measured on: four workloads, each as a federation document and a table on disk.

    W1    MLP 784-200-200-10, SGD, batches of 10, 600 rows a client, 50 clients a round
    W2    MLP 10-50-2, Adam, batches of 32, 200 rows a client, 100 clients a round
    W3a   W1 with DP-SGD: clip 1, expected batches of 32, one epoch
    W3b   W2 with DP-SGD, likewise
    W1b   W1 in batches of 32: what W3a is without privacy, as W2 is W3b

There are 1,000 clients; a hundred tables of normal numbers, labelled by a random projection, are dealt to them in turn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from client.data import Rows
from common.data.encoding_report import EncodingReport
from common.document.federation import Federation
from simulations.sites import SharedTable, Sites
from simulations.small import federation

CLIENTS = 1000
TABLES = 100
BATCH_UNDER_PRIVACY = 32
NOISE_MULTIPLIER = 1.0  # about, of those engines that are given one; ours plans its own, which costs the same time


@dataclass(frozen=True, kw_only=True)
class Workload:
    name: str
    sizes: tuple[int, ...]
    rows: int
    cohort: int
    batch: int
    optimizer: str
    rate: float
    private: bool = False

    @property
    def steps(self) -> int:
        """Of a client in a round: an epoch."""
        return math.ceil(self.rows / self.batch)

    def document(self, *, rounds: int, clients: int = CLIENTS, cohort: int | None = None) -> Federation:
        """The federation that does this work. Under privacy its sampling rate is fixed, so that no plan differs."""
        row = {"epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "sampling_rate": 1 / self.steps, "count_epsilon": None}
        changes: dict[str, Any] = {
            "name": self.name.lower(),
            "schema__features": [{"name": f"x{i}", "type": "numeric", "bounds": [-1, 1]} for i in range(self.sizes[0])],
            "schema__target": {"name": "y", "classes": list(range(self.sizes[-1]))},
            "schema__validation_fraction": 0,
            "model__hidden": list(self.sizes[1:-1]),
            "training__rounds": rounds,
            "training__local_steps": ...,
            "training__local_epochs": 1,
            "training__batch_size": self.batch,
            "training__optimizer": self.optimizer,
            "training__learning_rate": self.rate,
            "strategy__fraction": (cohort or self.cohort) / clients,
            "privacy": {"row": row if self.private else None, "evaluation": {"every": 0}},
        }
        return federation(**changes)


_IMAGES: dict[str, Any] = {"sizes": (784, 200, 200, 10), "rows": 600, "cohort": 50, "optimizer": "sgd", "rate": 0.1}
_TABLE: dict[str, Any] = {"sizes": (10, 50, 2), "rows": 200, "cohort": 100, "optimizer": "adam", "rate": 1e-3}
WORKLOADS = {
    each.name: each
    for each in (
        Workload(name="W1", batch=10, **_IMAGES),
        Workload(name="W2", batch=32, **_TABLE),
        Workload(name="W3a", batch=BATCH_UNDER_PRIVACY, private=True, **_IMAGES),
        Workload(name="W3b", batch=BATCH_UNDER_PRIVACY, private=True, **_TABLE),
        Workload(name="W1b", batch=BATCH_UNDER_PRIVACY, **_IMAGES),
    )
}


def write_tables(folder: Path) -> None:
    """The tables of all workloads, for every engine to map: x [tables, rows, inputs] and y [tables, rows]."""
    rng = np.random.default_rng(0)
    for work in (WORKLOADS["W1"], WORKLOADS["W2"]):
        x = rng.standard_normal((TABLES, work.rows, work.sizes[0]), dtype=np.float32)
        y = (x @ rng.standard_normal((work.sizes[0], work.sizes[-1]), dtype=np.float32)).argmax(-1)
        np.save(folder / f"x{work.sizes[0]}.npy", x)
        np.save(folder / f"y{work.sizes[0]}.npy", y.astype(np.int64))


def read_tables(folder: Path, work: Workload) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """x and y as `write_tables` has them, mapped."""
    x, y = (np.load(folder / f"{name}{work.sizes[0]}.npy", mmap_mode="r") for name in "xy")
    return x, y


def sites_of(work: Workload, document: Federation, folder: Path, *, clients: int = CLIENTS) -> Sites:
    """Simulated clients with those tables, in turn."""
    x, y = read_tables(folder, work)
    flat = np.array(x).reshape(-1, work.sizes[0])
    digests = np.random.default_rng(1).integers(0, 2**63, len(flat)).astype(np.uint64)
    rows = Rows(x=flat, y=np.array(y).reshape(-1), digests=digests, columns=("x",), report=EncodingReport())
    table = SharedTable(rows, document.data_schema, key=bytes(32), device=torch.device("cpu"))
    starts = [work.rows * (i % TABLES) for i in range(clients)]
    parts = {f"client-{i:06}": (table, np.arange(start, start + work.rows)) for i, start in enumerate(starts)}
    return Sites(document, parts, seed=0, device=torch.device("cpu"))
