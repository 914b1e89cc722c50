"""One table or many, as a federation in this process (simulations/sites.py)."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch

from client import data
from client.app import client_app, table_files
from client.data import Rows
from common.data import tables
from common.data.cells import Cells, holds_cells
from common.data.tables import AS_IT_SEEMS, FileFormat, Table
from common.document.federation import Federation
from common.document.schema import Classes
from common.errors import ConfigError, DataError
from common.model.scores import Scores
from common.model.weights import Weights
from common.privacy import noise
from common.wire.identity import number
from server.app import execute
from server.folder.folder import RunFolder
from server.rounds.events import Event
from simulations import partition
from simulations.inline import InlineGrid
from simulations.ray_grid import RayGrid
from simulations.sites import SharedTable, Sites
from simulations.synthetic import generate
from simulations.vector.grid import VectorGrid

# Many clients as one program, one after another (the plain oracle), or by Flower's own simulation.
Engine = Literal["vector", "inline", "ray"]

QUANTILES = 10  # a numeric target is dealt by its decile


def sites_from_files(
    federation: Federation, folder: Path, *, seed: int, device: torch.device, form: FileFormat = AS_IT_SEEMS
) -> Sites:
    """One site a file of `folder`. Raises `DataError`."""
    key = _split_key(seed)
    named: dict[str, tuple[SharedTable, partition.Index]] = {}
    for path in table_files(folder):
        if path.stem in named:
            raise DataError(f"{path}: another table in this folder is called {path.stem} too; clients need two names")
        rows = data.read(path, federation.data_schema, key=key, form=form)
        named[path.stem] = SharedTable(rows, federation.data_schema, key=key, device=device), np.arange(len(rows.y))
    return Sites(federation, named, seed=seed, device=device)


def sites_from_table(
    federation: Federation,
    table: Path | int,
    *,
    clients: int | None,
    how: str,
    seed: int,
    device: torch.device,
    form: FileFormat = AS_IT_SEEMS,
) -> Sites:
    """Deals one table to sites.

    Args:
        table: a file, or a number of rows to generate.
        clients: how many sites; left out with `by:COLUMN`, where there is one for each value.
        how: one of `partition.FORMS`.

    Raises:
        DataError: the table does not fit the schema, or cannot be dealt so.
    """
    schema, key = federation.data_schema, _split_key(seed)
    if isinstance(table, int):
        if table < 1:
            raise DataError(f"at least 1 row must be generated, got {table}")
        read = tables.of_frame(generate(schema, rows=table, seed=seed), source="generated table")
    else:
        read = tables.read(table, schema, form)
    rows = data.encode_rows(read, schema, key=key)
    parts = _deal(rows, read, federation, clients=clients, how=how, rng=np.random.default_rng([seed, 0xDEA1]))
    shared = SharedTable(rows, schema, key=key, device=device)
    return Sites(federation, {name: (shared, index) for name, index in parts.items()}, seed=seed, device=device)


def simulate(
    federation: Federation,
    sites: Sites,
    folder: RunFolder,
    *,
    run: str,
    engine: Engine = "vector",
    workers: int | None = None,
    ray_address: str | None = None,
    progress: Callable[[int, int], None] = lambda done, asked: None,
    say: Callable[[str], None] = lambda text: None,
    observe: Callable[[Event], None] = lambda event: None,
    held_out: Callable[[Weights], Scores] | None = None,
) -> dict[str, Any]:
    """Runs the federation over the sites, by an engine. Returns what result.json holds.

    Args:
        workers: processes that train, for `vector` and `ray`; by default one for each core, or for each GPU where the
            sites are on one. `vector` starts them if the run takes long enough. The outcome does not depend on it.
        ray_address: of the cluster to run on, for `ray`; by default one is started on this machine.
        progress: is told how many clients of a round are trained, of how many, by `vector`.
        say: is told, by `vector`, why a client is trained by itself, once for each reason.

    Raises:
        ConfigError: `ray` is not installed, or has no cluster there.
        RunFailed, RunFolderError: as `execute`.
        WorkerLost: a worker process has ended.
    """
    if ray_address is not None and (engine != "ray" or workers is not None):
        raise ConfigError(["--ray-address belongs to --engine ray, and uses all of the cluster: leave --workers out"])
    app = client_app(lambda context: nullcontext(sites.asked(context.node_id, run=run)))
    with ExitStack() as stack:
        grid: InlineGrid
        if engine == "inline":
            grid = InlineGrid(app, sites.nodes, run=run)
        elif engine == "ray":
            grid = RayGrid(sites, run=run, address=ray_address, workers=workers)
            stack.callback(grid.close)
        else:
            stack.enter_context(_undisturbed())
            devices = devices_for(sites.device, workers)
            grid = VectorGrid(app, sites, run=run, devices=devices, progress=progress, say=say)
            stack.callback(grid.close)
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
        )


def devices_for(device: torch.device, workers: int | None) -> list[torch.device]:
    """The device of each worker process, for sites on `device`."""
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


def _deal(
    rows: Rows,
    table: Table,
    federation: Federation,
    *,
    clients: int | None,
    how: str,
    rng: np.random.Generator,
) -> dict[str, partition.Index]:
    kind, _, argument = how.partition(":")
    if kind == "by":
        if not holds_cells(table.types.get(argument, pl.Object())):
            raise DataError(f"--partition by:{argument}: no such column; there are {', '.join(table.columns)}")
        names = (Cells(block.frame[argument], table.decimals).names() for block in table.blocks())
        parts_by_value = partition.by_value(pl.concat(names).to_list())
        if clients is not None and clients != len(parts_by_value):
            raise DataError(
                f"--partition by:{argument} makes {len(parts_by_value)} clients, one a value; leave --clients out"
            )
        return parts_by_value
    if clients is None:
        raise DataError(f"--clients is needed with --partition {how}")
    labels = _labels(rows, federation)
    if kind == "iid" and not argument:
        parts = partition.iid(len(rows.y), clients=clients, rng=rng)
    elif kind == "dirichlet" and _is_number(argument):
        parts = partition.dirichlet(labels, clients=clients, alpha=float(argument), rng=rng)
    elif kind == "quantity" and _is_number(argument):
        parts = partition.quantity(len(rows.y), clients=clients, exponent=float(argument), rng=rng)
    elif kind == "shift":
        if argument not in table.types or not holds_cells(table.types[argument]):
            raise DataError(f"--partition shift:{argument}: no such column; there are {', '.join(table.columns)}")
        numbers = [Cells(block.frame[argument], table.decimals).number for block in table.blocks()]
        parts = partition.shift(np.concatenate(numbers), clients=clients, rng=rng)
    elif kind == "draw" and argument.isdecimal():
        parts = partition.draw(len(rows.y), clients=clients, each=int(argument), rng=rng)
    elif kind == "shards" and argument.isdecimal():
        parts = partition.shards(labels, clients=clients, per_client=int(argument), rng=rng)
    else:
        raise DataError(f"--partition {how}: not known; it is {partition.FORMS}")
    width = len(str(clients - 1))
    return {f"client-{i:0{width}}": part for i, part in enumerate(parts)}


def _labels(rows: Rows, federation: Federation) -> list[int]:
    if isinstance(federation.data_schema.target, Classes):
        return [int(v) for v in rows.y]
    return [int(v) for v in np.minimum(rows.y * QUANTILES, QUANTILES - 1)]


def _split_key(seed: int) -> bytes:
    return hashlib.sha256(f"split/{seed}".encode()).digest()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
