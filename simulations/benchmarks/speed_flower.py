"""Flower's own simulation on Ray, as its documentation has one write it: a workload's rounds, timed.

python -m simulations.benchmarks.speed_flower WORKLOAD ROUNDS FOLDER prints what speed_engines.py prints.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from simulations.benchmarks.speed_workloads import CLIENTS, NOISE_MULTIPLIER, TABLES, WORKLOADS, Workload, read_tables

client = ClientApp()


def net_of(work: Workload) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, out in pairwise(work.sizes):
        layers += [nn.Linear(fan_in, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def optimizer_of(net: nn.Module, work: Workload) -> torch.optim.Optimizer:
    kind = torch.optim.SGD if work.optimizer == "sgd" else torch.optim.Adam
    return kind(net.parameters(), lr=work.rate)


def epoch(work: Workload, net: nn.Module, x: torch.Tensor, y: torch.Tensor, *, mode: str = "hooks") -> None:
    """Trains `net` in place: the loop of a tutorial, by Opacus' engine where the workload is private."""
    optimizer, loss = optimizer_of(net, work), nn.CrossEntropyLoss()
    loader: Any = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=work.batch, shuffle=True)
    if work.private:
        from opacus import PrivacyEngine

        made = PrivacyEngine(accountant="rdp").make_private(
            module=net,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=NOISE_MULTIPLIER,
            max_grad_norm=1.0,
            grad_sample_mode=mode,
            **({"criterion": loss} if mode == "ghost" else {}),
        )
        if mode == "ghost":
            net, optimizer, loss, loader = made
        else:
            net, optimizer, loader = made
    for xb, yb in loader:
        if len(xb):
            optimizer.zero_grad()
            loss(net(xb), yb).backward()
            optimizer.step()


@client.train()
def train(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    work = WORKLOADS[os.environ["CLOISTER_WORKLOAD"]]
    x, y = read_tables(Path(os.environ["CLOISTER_TABLES"]), work)
    place = int(context.node_config["partition-id"]) % TABLES
    net = net_of(work)
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    net.load_state_dict(arrays.to_torch_state_dict())
    epoch(work, net, torch.from_numpy(x[place].copy()), torch.from_numpy(y[place].copy()))
    state = {name.removeprefix("_module."): value for name, value in net.state_dict().items()}
    metrics = MetricRecord({"num-examples": work.rows})
    return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)


def main(name: str, rounds: int, folder: str) -> None:
    os.environ |= {
        "CLOISTER_WORKLOAD": name,
        "CLOISTER_TABLES": folder,
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_MEMORY_MONITOR": "1",
    }
    from flwr.simulation import run_simulation

    work = WORKLOADS[name]
    torch.set_num_threads(1)
    stamps: list[float] = []

    class Timed(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            moved = super().aggregate_train(server_round, replies)
            stamps.append(time.perf_counter())
            return moved

    server = ServerApp()

    @server.main()
    def run(grid: Grid, context: Context) -> None:
        strategy = Timed(fraction_train=work.cohort / CLIENTS, fraction_evaluate=0.0)
        strategy.start(grid=grid, initial_arrays=ArrayRecord(net_of(work).state_dict()), num_rounds=rounds)

    started = time.perf_counter()
    backend = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"num_cpus": os.cpu_count(), "object_store_memory": 300 * 2**20},
    }
    run_simulation(server_app=server, client_app=client, num_supernodes=CLIENTS, backend_config=backend)  # type: ignore[arg-type]
    rates = [work.cohort / (b - a) for a, b in pairwise(stamps)]
    print(json.dumps({"first": stamps[0] - started, "rates": rates}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
