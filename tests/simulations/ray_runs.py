"""python -m tests.simulations.ray_runs FOLDER: runs for test_ray_grid.py, on what Ray takes for two machines of a core.

In a process of its own, since Ray leaves files and processes to whoever ends it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from common.errors import WorkerLost
from server.folder.folder import RunFolder
from server.rounds.events import Event, RoundEnded
from simulations import engine
from simulations.engine import simulate
from simulations.ray_grid import RayGrid
from tests.simulations.test_ray_grid import PATIENT, RUNS
from tests.simulations.vector.test_grid import run, sites_of
from tests.support import federation


def main(folder: Path) -> None:
    lose_a_worker(folder / "lost")  # on a Ray that the run starts for itself
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    machines.add_node(num_cpus=1)
    machines.wait_for_nodes()
    for name, changes in RUNS.items():
        run(federation(**changes), folder / name, "ray", ray_address=machines.address)
    run(federation(energy=True, **PATIENT), folder / "energy", "ray", ray_address=machines.address)
    machines.shutdown()


def lose_a_worker(where: Path) -> None:
    grids: list[Any] = []

    class Noted(RayGrid):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            grids.append(self)

    def kill(event: Event) -> None:
        if isinstance(event, RoundEnded) and event.round == of_three.training.rounds:
            ray.kill(grids[0]._backend.pool.pool[0])

    of_three = federation(**PATIENT)
    fed = of_three.with_rounds(5)
    engine.RayGrid = Noted  # type: ignore[misc]
    try:
        simulate(
            fed, sites_of(fed), RunFolder.create(fed, path=where), run="test", engine="ray", workers=2, observe=kill
        )
    except WorkerLost as error:
        (where / "said").write_text(str(error))
    engine.RayGrid = RayGrid  # type: ignore[misc]
    assert not ray.is_initialized()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
