"""Accuracy against a run's reach: how far clipped steps can carry the model (common/privacy/reach.py).

The hospitals of simulations/heart, and made-up tables of 20,000 rows at ten clients. All vary the learning rate, which
costs no privacy, the first two the rounds, and the others features and model. Each figure is the exact accuracy of the
last model on all clients' validation rows, as a mean over seeds; beside it, how far the model has moved.

    python -m simulations.benchmarks.reach
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import polars as pl
import torch

from common.document import documents
from common.document.federation import Federation
from common.document.federation import load as load_federation
from common.logs import quiet_flower
from common.model.weights import initial_weights
from common.privacy import reach
from simulations import HEART
from simulations.engine import run_once
from simulations.sites import Sites
from simulations.sources import sites_from_files, sites_from_table
from simulations.vector.score import scores_on_validation_rows

SEEDS, RATES, ROUNDS = 3, (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0), (15, 30)
CPU = torch.device("cpu")
FEATURES, ROWS, CLIENTS = 24, 20_000, 10
OTHERS: tuple[tuple[int, list[int]], ...] = ((6, [50]), (96, [50]), (24, []), (24, [200]), (24, [50, 50]))


def hospitals(rounds: int, rate: float, seed: int) -> Federation:
    return _changed(load_federation(HEART / "federation.yaml"), rounds=rounds, learning_rate=rate, seed=seed)


def made_up(
    rounds: int, rate: float, seed: int, *, features: int = FEATURES, hidden: Sequence[int] = (50,)
) -> Federation:
    columns = [{"name": f"x{i}", "type": "numeric", "bounds": [-3, 3]} for i in range(features)]
    training = {"rounds": rounds, "local_steps": 2, "batch_size": 256, "learning_rate": rate, "seed": seed}
    value = {
        "name": "made-up",
        "schema": {"features": columns, "target": {"name": "y", "classes": [0, 1]}, "validation_fraction": 0.2},
        "model": {"hidden": list(hidden)},
        "training": training,
        "strategy": {"name": "fedavg", "min_clients": CLIENTS},
        "privacy": {"row": {"epsilon": 1.0, "delta": 1e-5, "clip": 0.5}, "evaluation": {"every": 0}},
    }
    return documents.validate(value, Federation)


def _changed(fed: Federation, **training: Any) -> Federation:
    value = json.loads(fed.canonical)
    value["training"] |= training
    value["privacy"]["evaluation"]["every"] = 0
    return documents.validate(value, Federation)


def made_up_table(path: Path, features: int) -> None:
    """The label is a blurred sign of a sum with a product in it."""
    rng = np.random.default_rng(7)
    x = np.clip(rng.normal(size=(ROWS, features)), -3, 3)
    score = x @ rng.normal(size=features) / 3 + x[:, 0] * x[:, 1] + rng.normal(size=ROWS) * 0.5
    pl.DataFrame({f"x{i}": x[:, i] for i in range(features)} | {"y": (score > 0).astype(int)}).write_csv(path)


def measured(fed: Federation, sites: Sites) -> tuple[float, float]:
    """Exact accuracy in percent on all validation rows, and how far the model has moved."""
    state, _ = run_once(fed, sites)
    start = initial_weights(fed)
    moved = sum(float(np.square(state[name] - start[name]).sum()) for name in start) ** 0.5
    return 100 * float(scores_on_validation_rows(fed, state, sites)["accuracy"]), moved


def _grid(
    name: str,
    document: Callable[[int, float, int], Federation],
    sites: Callable[[Federation, int], Sites],
    *,
    rounds: Sequence[int] = ROUNDS,
    seeds: int = SEEDS,
) -> None:
    print(f"{name}: rounds, rate, reach, moved, accuracy", flush=True)
    for number in rounds:
        for rate in RATES:
            found = []
            for seed in range(seeds):
                fed = document(number, rate, seed)
                found.append(measured(fed, sites(fed, seed)))
            accuracy, moved = (mean(column) for column in zip(*found, strict=True))
            print(f"  {number:>4} {rate:>6g} {reach.reach(fed):>8.1f} {moved:>8.2f} {accuracy:>6.1f} %", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    quiet_flower()
    _grid("hospitals", hospitals, lambda fed, seed: sites_from_files(fed, HEART, seed=seed, device=CPU))
    _made_up_grid(FEATURES, [50])
    for features, hidden in OTHERS:
        _made_up_grid(features, hidden, rounds=ROUNDS[1:], seeds=1)


def _made_up_grid(features: int, hidden: Sequence[int], **options: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.csv"
        made_up_table(table, features)
        _grid(
            f"made up, {features} features, hidden {list(hidden)}",
            partial(made_up, features=features, hidden=hidden),
            lambda fed, seed: sites_from_table(fed, table, clients=CLIENTS, how="iid", seed=seed, device=CPU),
            **options,
        )


if __name__ == "__main__":
    main()
