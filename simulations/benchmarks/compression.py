"""What `wire.dtype` costs in accuracy, and how many bytes an update has then.

Two problems, with and without `privacy.row`: the four hospitals, and a generated table of 5 classes dealt unevenly to
ten clients. The model is scored exactly, on all clients' validation rows. For each seed, first weights, split, batches
and noise are the same whatever the dtype: float32 here draws the random numbers that rounding would, and drops them.
Beside an accuracy stands the mean of its differences from float32, and their standard error.

    python -m simulations.benchmarks.compression
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any, get_args
from unittest.mock import patch

import torch
from numpy.typing import NDArray

from common.document import documents
from common.document import federation as federations
from common.document.federation import Dtype, Federation
from common.logs import quiet_flower
from common.model.weights import Weights, initial_weights
from common.wire import compression
from common.wire.compression import Uniform
from simulations import HEART
from simulations.engine import run_once
from simulations.sites import Sites
from simulations.small import federation
from simulations.sources import sites_from_files, sites_from_table
from simulations.vector.score import scores_on_validation_rows

SEEDS, CPU = 5, torch.device("cpu")
CLIENTS, ROWS = 10, 8000

original_pack = compression.pack
SitesOf = Callable[[Federation, int], Sites]


def hospitals(fed: Federation, seed: int) -> Sites:
    return sites_from_files(fed, HEART, seed=seed, device=CPU)


def dealt(fed: Federation, seed: int) -> Sites:
    return sites_from_table(fed, ROWS, clients=CLIENTS, how="dirichlet:1", seed=seed, device=CPU)


def synthetic() -> Federation:
    """20 numbers, 5 classes, and a model of 19,845 weights."""
    return federation(
        schema={
            "features": [{"name": f"x{i}", "type": "numeric", "bounds": [-1, 1]} for i in range(20)],
            "target": {"name": "y", "classes": list(range(5))},
            "validation_fraction": 0.25,
        },
        model={"hidden": [128, 128]},
        training={"rounds": 20, "local_steps": 5, "batch_size": 50, "learning_rate": 0.3},
        privacy={"row": {"epsilon": 8, "delta": 1e-4, "clip": 1}, "evaluation": {"every": 0}},
    )


def changed(fed: Federation, **parts: Any) -> Federation:
    """The document with whole parts replaced."""
    return documents.validate({**json.loads(fed.canonical), **parts}, Federation)


def pack(state: Weights, start: Weights, dtype: Dtype, uniform: Uniform) -> dict[str, NDArray[Any]]:
    """`compression.pack`, but float32 draws as many random numbers as the others."""
    if dtype == "float32":
        original_pack(state, start, "bfloat16", uniform)
    return original_pack(state, start, dtype, uniform)


def accuracy(fed: Federation, sites_of: SitesOf, seed: int) -> float:
    """Percent of all clients' validation rows that the last model tells."""
    fed = changed(fed, training={**json.loads(fed.canonical)["training"], "seed": seed})
    sites = sites_of(fed, seed)
    with patch.object(compression, "pack", pack):
        weights, _ = run_once(fed, sites)
    return 100 * float(scores_on_validation_rows(fed, weights, sites)["accuracy"])


def _bytes(fed: Federation, dtype: Dtype) -> int:
    """Of the bare tensors of an update."""
    sent = compression.expected(initial_weights(fed), dtype)
    return sum(kind.itemsize * math.prod(shape) for kind, shape in sent.values())


def main() -> None:
    torch.set_num_threads(1)
    quiet_flower()
    problems: dict[str, tuple[Federation, SitesOf]] = {
        "four hospitals": (federations.load(HEART / "federation.yaml"), hospitals),
        f"generated, {CLIENTS} clients": (synthetic(), dealt),
    }
    for title, (fed, sites_of) in problems.items():
        row = json.loads(fed.canonical)["privacy"]["row"]
        for unit in (None, row):
            privacy = f"epsilon {fed.privacy.limits['row']:g}" if unit else "without privacy"
            print(f"{title}, {privacy}, {SEEDS} seeds")
            exact: list[float] = []
            for dtype in get_args(Dtype):
                document = changed(fed, privacy={"row": unit, "evaluation": {"every": 0}}, wire={"dtype": dtype})
                found = [accuracy(document, sites_of, seed) for seed in range(SEEDS)]
                exact = exact or found
                gain = [a - b for a, b in zip(found, exact, strict=True)]
                print(
                    f"  {dtype:<9} {_bytes(fed, dtype):>6,} bytes  "
                    f"accuracy {mean(found):.1f} % (sd {stdev(found):.1f})  "
                    f"{mean(gain):+.2f} +- {stdev(gain) / math.sqrt(SEEDS):.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
