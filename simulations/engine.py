"""One table or many, as a federation in this process.

Sites are the real ones of `client`, but for their noise, which is drawn from the run's seed so that a
simulation can be repeated, and their ledgers, which live in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from client import data
from client.account.ledger import Ledger
from client.app import client_app, table_files
from client.data import Rows
from client.site import Site, simulated_site
from common.data import tables
from common.data.cells import Cells, holds_cells
from common.data.tables import AS_IT_SEEMS, FileFormat, Table
from common.document.federation import Federation
from common.document.schema import Classes
from common.errors import ConfigError, DataError, Refusal
from common.model.scores import Scores
from common.model.weights import Weights
from common.privacy import noise
from common.wire.identity import node_id, number
from server.app import execute
from server.folder.folder import RunFolder
from server.rounds.events import Event
from simulations import partition
from simulations.inline import InlineGrid
from simulations.synthetic import generate

QUANTILES = 10  # a numeric target is dealt by its decile


def sites_from_files(
    federation: Federation, folder: Path, *, seed: int, device: torch.device, form: FileFormat = AS_IT_SEEMS
) -> list[Site]:
    """One site a file of `folder`. Raises `DataError`."""
    key = _split_key(seed)
    named: dict[str, Rows] = {}
    for path in table_files(folder):
        if path.stem in named:
            raise DataError(f"{path}: another table in this folder is called {path.stem} too; clients need two names")
        named[path.stem] = data.read(path, federation.data_schema, key=key, form=form)
    return _sites(federation, named, seed=seed, device=device)


def sites_from_table(
    federation: Federation,
    table: Path | int,
    *,
    clients: int | None,
    how: str,
    seed: int,
    device: torch.device,
    form: FileFormat = AS_IT_SEEMS,
) -> list[Site]:
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
    return _sites(federation, {name: rows.take(index) for name, index in parts.items()}, seed=seed, device=device)


def willing(sites: list[Site], *, run: str) -> tuple[list[Site], dict[str, str]]:
    """Plans every site's budget; those that refuse the run are left out, as they would stay away in a real one.

    Returns:
        The sites that take part, and why each of the others does not, by its name.

    Raises:
        Refusal: fewer than `min_clients` are willing.
    """
    refused: dict[str, str] = {}
    for site in sites:
        try:
            site.account.budget(run)
        except Refusal as refusal:
            refused[site.name] = str(refusal)
    able = [site for site in sites if site.name not in refused]
    least = sites[0].federation.strategy.min_clients
    if len(able) < least:
        name, reason = next(iter(refused.items()))
        raise Refusal(f"{len(refused)} of {len(sites)} clients refuse, and {least} are needed; {name}: {reason}")
    return able, refused


def simulate(
    federation: Federation,
    sites: list[Site],
    folder: RunFolder,
    *,
    run: str,
    observe: Callable[[Event], None] = lambda event: None,
    held_out: Callable[[Weights], Scores] | None = None,
) -> dict[str, Any]:
    """Runs the federation over the sites, one after another. Returns what result.json holds."""
    by_node = {node_id(site.name): site for site in sites}
    app = client_app(lambda context: nullcontext(by_node[context.node_id]))
    return execute(
        federation,
        InlineGrid(app, by_node, run=run),
        folder,
        name=run,
        observe=observe,
        name_of=lambda node: by_node[node].name,
        held_out=held_out,
        wait_s=0.0,  # whoever is not here now never comes
        noise=noise.seeded(federation.training.seed, number("server")),
    )


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


def _sites(federation: Federation, named: dict[str, Rows], *, seed: int, device: torch.device) -> list[Site]:
    key = _split_key(seed)
    least = federation.strategy.min_clients
    if len(named) < least:
        raise ConfigError([f"strategy.min_clients is {least}, but there are only {len(named)} clients"])
    return [
        simulated_site(
            federation,
            rows,
            name=name,
            key=key,
            ledger=Ledger.in_memory(),
            noise=noise.seeded(seed, number(name)),
            device=device,
        )
        for name, rows in named.items()
    ]


def _split_key(seed: int) -> bytes:
    return hashlib.sha256(f"split/{seed}".encode()).digest()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
