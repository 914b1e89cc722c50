"""Where a simulation's rows come from, and how they are dealt to clients."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch

from client import data
from client.app import table_files
from client.data import Rows
from common.data import tables
from common.data.cells import Cells, holds_cells
from common.data.tables import AS_IT_SEEMS, FileFormat, Table
from common.document.federation import Federation
from common.document.schema import Classes
from common.errors import ConfigError, DataError
from simulations import partition
from simulations.sites import SharedTable, Sites
from simulations.synthetic import generate

QUANTILES = 10  # a numeric target is dealt by its decile


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a command line says of it. Raises `ConfigError` if that does not go together."""

    data: Path | None = None  # one table
    data_dir: Path | None = None  # a folder with one table a client
    generate: int | None = None  # rows to make up
    clients: int | None = None
    partition: str = "iid"
    form: FileFormat = AS_IT_SEEMS

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.data, self.data_dir, self.generate)) != 1:
            raise ConfigError(["give exactly one of --data TABLE, --data-dir FOLDER and --generate ROWS"])
        if self.data_dir is not None and (self.clients is not None or self.partition != "iid"):
            raise ConfigError(["--data-dir has one client a file; --clients and --partition belong to --data"])

    def sites(self, federation: Federation, *, device: torch.device) -> Sites:
        """The clients of a federation; its seed deals the rows. Raises `DataError`."""
        seed = federation.training.seed
        if self.data_dir is not None:
            return sites_from_files(federation, self.data_dir, seed=seed, device=device, form=self.form)
        table = self.data if self.data is not None else self.generate
        assert table is not None
        return sites_from_table(
            federation, table, clients=self.clients, how=self.partition, seed=seed, device=device, form=self.form
        )


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
    y = rows.y if rows.y.ndim == 1 else np.nan_to_num(rows.y[:, 0], nan=-1.0)  # those without one are a class, too
    if isinstance(federation.data_schema.target, Classes):
        return [int(v) for v in y]
    return [int(v) for v in np.minimum(y * QUANTILES, QUANTILES - 1)]


def _split_key(seed: int) -> bytes:
    return hashlib.sha256(f"split/{seed}".encode()).digest()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
