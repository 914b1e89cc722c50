"""A federation over simulated clients, by one of the engines."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from client.app import client_app
from common.document.federation import Federation
from common.errors import ConfigError
from common.model.scores import Scores
from common.model.weights import Weights
from common.privacy import noise
from common.wire.identity import number
from server.app import execute
from server.folder.folder import RunFolder, load_model
from server.folder.start import StartModel
from server.rounds.events import Event
from simulations.inline import InlineGrid, SimulatedGrid
from simulations.ray_grid import RayGrid
from simulations.sites import Sites
from simulations.vector.grid import VectorGrid

# Many clients as one program, one after another (the plain oracle), or by Flower's own simulation.
Engine = Literal["vector", "inline", "ray"]


@contextmanager
def opened(
    engine: Engine,
    sites: Sites,
    *,
    run: str,
    workers: int | None = None,
    ray_address: str | None = None,
    progress: Callable[[int, int], None] = lambda done, asked: None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[SimulatedGrid]:
    """The grid of a run over the sites, by an engine. Nothing is written before it is there.

    Args:
        workers: processes that train, for `vector` and `ray`; by default one for each core, or for each GPU where the
            sites are on one. `vector` starts them if the run takes long enough. The outcome does not depend on it.
        ray_address: of the cluster to run on, for `ray`; by default one is started on this machine.
        progress: is told how many clients of a round are trained, of how many, by `vector`.
        say: is told, by `vector`, why a client is trained by itself, once for each reason.

    Raises:
        ConfigError: `ray` is not installed, or has no cluster there.
    """
    if ray_address is not None and (engine != "ray" or workers is not None):
        raise ConfigError(["--ray-address belongs to --engine ray, and uses all of the cluster: leave --workers out"])
    if engine == "ray":
        with closing(RayGrid(sites, run=run, address=ray_address, workers=workers)) as ray:
            yield ray
        return
    app = client_app(lambda context: nullcontext(sites.asked(context.node_id, run=run)))
    if engine == "inline":
        yield InlineGrid(app, sites.nodes, run=run)
        return
    devices = devices_for(sites.device, workers)
    grid = VectorGrid(app, sites, run=run, devices=devices, progress=progress, say=say)
    with _undisturbed(), closing(grid):
        yield grid


def run_on(
    grid: SimulatedGrid,
    federation: Federation,
    sites: Sites,
    folder: RunFolder,
    *,
    run: str,
    observe: Callable[[Event], None] = lambda event: None,
    held_out: Callable[[Weights], Scores] | None = None,
    start: StartModel | None = None,
) -> dict[str, Any]:
    """Runs the federation over the sites, on a grid that is `opened` for the run. Returns what result.json holds.

    Raises:
        RunFailed, RunFolderError: as `execute`, whose `start` is this one's.
        WorkerLost: a worker process has ended.
    """
    return execute(
        federation,
        grid,
        folder,
        name=run,
        observe=observe,
        name_of=sites.name_of,
        held_out=held_out,
        wait_s=0.0,  # whoever is not here now never comes
        noise=noise.seeded(federation.training.seed, number("server")),
        start=start,
    )


def simulate(
    federation: Federation,
    sites: Sites,
    folder: RunFolder,
    *,
    run: str,
    engine: Engine = "vector",
    observe: Callable[[Event], None] = lambda event: None,
    held_out: Callable[[Weights], Scores] | None = None,
    start: StartModel | None = None,
    **how: Any,
) -> dict[str, Any]:
    """`opened` and `run_on` in one, into a folder that is there. `how` is as `opened` has it."""
    with opened(engine, sites, run=run, **how) as grid:
        return run_on(grid, federation, sites, folder, run=run, observe=observe, held_out=held_out, start=start)


def run_once(federation: Federation, sites: Sites) -> tuple[Weights, dict[str, Any]]:
    """The model of a run on one worker and its result.json, for measurements: its folder is thrown away."""
    with tempfile.TemporaryDirectory() as where:
        run = RunFolder.create(federation, path=Path(where) / "run")
        result = simulate(federation, sites, run, run="once", workers=1)
        return load_model(run.path), result


def devices_for(device: torch.device, workers: int | None) -> list[torch.device]:
    """The device of each of so many worker processes, for sites on `device`; by default one a core, or a GPU."""
    if device.type == "cuda" and device.index is None:
        gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        return [gpus[i % len(gpus)] for i in range(len(gpus) if workers is None else workers)]
    if device.type != "cpu":
        return [device] * (workers or 1)
    return [device] * (len(os.sched_getaffinity(0)) if workers is None else workers)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """One thread, as products of a chunk are too small for several, which wait for each other. And the collector of
    cycles leaves out what is there already, most of which are modules: looking at it takes as long as some rounds do.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)
