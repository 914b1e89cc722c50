"""One engine on one workload, in a process of its own: the speed benchmark's unit (simulations/benchmarks/speed.py).

python -m simulations.benchmarks.speed_engines ENGINE WORKLOAD FOLDER SECONDS [--clients N] [--cohort N]

Prints JSON: `rates`, client updates a second of each round or of each group of clients, in their order; `first`, the
seconds from the start of training to the end of the first round.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from common.logs import quiet_flower
from server.folder.folder import RunFolder
from server.rounds.events import Event, RoundEnded
from simulations.benchmarks.speed_flower import epoch, net_of
from simulations.benchmarks.speed_workloads import CLIENTS, TABLES, WORKLOADS, Workload, read_tables, sites_of
from simulations.engine import simulate

OURS = {"vector": None, "vector, one process": 1, "inline": 1}  # how many workers
LOOPS = {"loop": "", "opacus hooks": "hooks", "opacus ghost": "ghost"}
MOST_ROUNDS = 100_000  # never done: the clock ends a run


class _Enough(KeyboardInterrupt):
    """The time is up. A run ends as it does by Ctrl-C."""


def ours(engine: str, work: Workload, folder: Path, seconds: float, *, clients: int, cohort: int) -> dict[str, Any]:
    """A whole simulation: charges, messages, aggregation and the run folder are in its time."""
    # Under privacy the budget must last: a small number of rounds is planned, of which the clock may cut some.
    rounds = 2000 if work.private else MOST_ROUNDS
    document = work.document(rounds=rounds, clients=clients, cohort=cohort)
    sites = sites_of(work, document, folder, clients=clients)
    quiet_flower()  # as the command does
    stamps = [time.perf_counter()]

    def note(event: Event) -> None:
        if isinstance(event, RoundEnded):
            stamps.append(time.perf_counter())
            if stamps[-1] - stamps[0] > seconds and len(stamps) > 6:
                raise _Enough

    with tempfile.TemporaryDirectory() as where:
        run = RunFolder.create(document, path=Path(where) / "run")
        how: Any = "inline" if engine == "inline" else "vector"
        simulate(document, sites, run, run="benchmark", engine=how, workers=OURS[engine], observe=note)
    return {"first": stamps[1] - stamps[0], "rates": [cohort / (b - a) for a, b in pairwise(stamps[1:])]}


def loop(work: Workload, folder: Path, seconds: float, mode: str) -> dict[str, Any]:
    """One client after another as a tutorial has it, in this process; no messages and no aggregation."""
    torch.set_num_threads(1)
    x, y = read_tables(folder, work)
    state = net_of(work).state_dict()
    rates: list[float] = []
    began, client = time.perf_counter(), 0
    group = 3 if work.sizes[0] > 100 else 10
    while time.perf_counter() - began < seconds or len(rates) < 6:
        started = time.perf_counter()
        for _ in range(group):
            net, place = net_of(work), client % TABLES
            net.load_state_dict(state)
            epoch(work, net, torch.from_numpy(x[place].copy()), torch.from_numpy(y[place].copy()), mode=mode)
            client += 1
        rates.append(group / (time.perf_counter() - started))
    return {"first": None, "rates": rates[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=[*OURS, *LOOPS])
    parser.add_argument("workload", choices=list(WORKLOADS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--cohort", type=int)
    given = parser.parse_args()
    work = WORKLOADS[given.workload]
    if given.engine in OURS:
        sizes = {"clients": given.clients, "cohort": given.cohort or work.cohort}
        found = ours(given.engine, work, given.folder, given.seconds, **sizes)
    else:
        found = loop(work, given.folder, given.seconds, LOOPS[given.engine])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
