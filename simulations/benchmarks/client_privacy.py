"""`privacy.client` beside Flower's wrapper for central DP, on the same clients, model and number of rounds.

Flower 1.41's DifferentialPrivacyServerSideFixedClipping samples a fixed number of clients and accounts for it without
amplification; ours samples by Poisson and is amplified. Both clip to the same norm, weigh all clients the same (their
tables are of one size) and lose no reply.

    python -m simulations.benchmarks.client_privacy
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping

from client.app import client_app
from common.document.federation import Federation
from common.model import mlp
from common.privacy.noise import seeded
from common.privacy.releases import GaussianRelease, calibrate, client_releases, epsilon
from common.wire.identity import number
from server.observers.scoring import HeldOut
from server.rounds import strategies
from server.rounds.client_privacy import ClientLevelDP
from server.rounds.loop import run_rounds
from server.rounds.run import Progress, Run
from simulations.inline import InlineGrid
from simulations.small import federation, table
from simulations.sources import sites_from_table

CLIENTS, FRACTION, ROUNDS, CLIP, DELTA, SEEDS = 200, 0.1, 40, 0.5, 1e-3, 5


def document(target: float | None) -> Federation:
    client = {"epsilon": target, "delta": DELTA, "clip": CLIP, "clients": CLIENTS}
    return federation(
        schema__validation_fraction=0,
        training={"rounds": ROUNDS, "local_steps": 5, "batch_size": 10, "learning_rate": 0.3},
        strategy={"name": "fedavg", "min_clients": 2, "fraction": FRACTION},
        privacy={"row": None, "client": client if target else None, "evaluation": {"every": 0}},
    )


def accuracy(fed: Federation, folder: Path, seed: int, wrap: Callable[[Any], Any] = lambda s: s) -> float:
    """Of the last model, on a table that no client has."""
    path, held = folder / "train.csv", folder / "held.csv"
    table(20 * CLIENTS, seed=1).write_csv(path)
    table(4000, seed=2).write_csv(held)
    sites = sites_from_table(fed, path, clients=CLIENTS, how="iid", seed=seed, device=torch.device("cpu"))
    by_node = {number(site.name): site for site in sites}

    run = Run(
        federation=fed,
        name="benchmark",
        progress=Progress(weights=mlp.weights_of(mlp.build(fed))),
        observe=lambda event: None,
        client_privacy=ClientLevelDP(fed, seeded(seed)) if fed.privacy.client else None,
    )
    grid = InlineGrid(client_app(lambda context: nullcontext(by_node[context.node_id])), by_node, run="benchmark")
    run_rounds(run, grid, wrap(strategies.build(fed)), wait_s=0.0)
    return 100 * float(HeldOut(fed, held)(run.progress.weights)["accuracy"])


def main() -> None:
    torch.set_num_threads(1)
    cohort = round(FRACTION * CLIENTS)
    print(
        f"{CLIENTS} clients of 20 rows, {cohort} a round, {ROUNDS} rounds, clip {CLIP}, delta {DELTA:g}, {SEEDS} seeds"
    )
    for target in (2.0, 4.0, 8.0):
        ours = client_releases(document(target))[0].noise_multiplier
        theirs = calibrate(target, DELTA, sampling_rate=1.0, steps=ROUNDS)
        at_ours = epsilon([GaussianRelease(noise_multiplier=ours, steps=ROUNDS)], DELTA)
        print(
            f"epsilon {target:g}: noise multiplier {ours:.2f} (Flower's wrapper needs {theirs:.2f}; with {ours:.2f} it"
        )
        print(f"  would cost epsilon {at_ours:.1f} there)")

        def flower(strategy: Any, noise: float = theirs) -> Any:
            return DifferentialPrivacyServerSideFixedClipping(strategy, noise, CLIP, cohort)

        with tempfile.TemporaryDirectory() as folder:
            mine = [accuracy(document(target), Path(folder), s) for s in range(SEEDS)]
            others = [accuracy(document(None), Path(folder), s, flower) for s in range(SEEDS)]
        for name, found in (("ours", mine), ("Flower's wrapper", others)):
            print(f"  {name:<17} accuracy {mean(found):.1f} % (sd {stdev(found):.1f})")
    with tempfile.TemporaryDirectory() as folder:
        plain = [accuracy(document(None), Path(folder), s) for s in range(SEEDS)]
    print(f"without privacy     accuracy {mean(plain):.1f} %")


if __name__ == "__main__":
    main()
