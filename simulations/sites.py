"""Simulated sites: many clients that share one table, each made when it is first asked for.

A site is one of `client`, but for three things: its rows are those of a shared table, its ledger is in memory, and its
noise comes from the run's seed, a stream of its own for each task, so that it does not matter where tasks are done, nor
in which order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, overload

import torch
from torch import Tensor

from client import data
from client.account.books import Charges
from client.account.memory_ledger import MemoryLedger
from client.data import Dataset, Rows
from client.energy import CodeCarbon, Meter
from client.site import Site, simulated_site
from client.training.row_draws import RowIds, row_ids
from common.data.cells import Mask
from common.data.encoding_report import EncodingReport
from common.document.federation import Federation
from common.document.schema import Schema
from common.errors import ConfigError, Refusal
from common.wire.identity import node_id
from simulations.noise import SimulationNoise
from simulations.partition import Index


class SharedTable:
    """Encoded rows on a device, of which each client has some."""

    def __init__(self, rows: Rows, schema: Schema, *, key: bytes, device: torch.device) -> None:
        """`key` is that by which rows are dealt to training and validation."""
        self.digests, self.report, self.schema, self.key = rows.digests, rows.report, schema, key
        self.x, self.y = torch.from_numpy(rows.x).to(device), torch.from_numpy(rows.y).to(device)
        self.group = None if rows.group is None else torch.from_numpy(rows.group).to(device)
        self.split = data.split_name(rows, schema, key=key)

    def __getstate__(self) -> dict[str, Any]:
        arrays = {name: value.cpu().numpy() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {**vars(self), **arrays, "device": str(self.x.device)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        device = state.pop("device")
        vars(self).update(state)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is it written to
            self.x, self.y = (torch.from_numpy(array).to(device) for array in (state["x"], state["y"]))
            if (group := state["group"]) is not None:
                self.group = torch.from_numpy(group).to(device)


class View(Dataset):
    """A client's rows of a shared table. What is asked for is taken out of it each time."""

    def __init__(self, table: SharedTable, places: Index) -> None:
        # The fields of a frozen dataclass, all of which are properties here.
        self.__dict__ |= {"table": table, "_places": places}

    table: SharedTable
    _places: Index  # of the client's rows in the table, for both parts

    @cached_property
    def _in_validation(self) -> Mask:
        digests = self.table.digests[self._places]
        return data.in_validation(digests, None, self.table.schema, key=self.table.key)

    @cached_property
    def index(self) -> Index:
        """The training rows."""
        return self._places[~self._in_validation]

    @cached_property
    def validation_index(self) -> Index:
        """The validation rows."""
        return self._places[self._in_validation]

    @property
    def x(self) -> Tensor:
        return self._take(self.table.x, self.index)

    @property
    def y(self) -> Tensor:
        return self._take(self.table.y, self.index)

    @property
    def validation_x(self) -> Tensor:
        return self._take(self.table.x, self.validation_index)

    @property
    def validation_y(self) -> Tensor:
        return self._take(self.table.y, self.validation_index)

    @property
    def validation_group(self) -> Tensor | None:
        group = self.table.group
        return None if group is None else self._take(group, self.validation_index)

    @property
    def ids(self) -> RowIds:
        return row_ids(self.table.digests[self.index])

    @cached_property
    def content(self) -> str:
        return data.content_name(self.table.digests[self._places])

    @property
    def rows(self) -> int:
        return len(self.index)

    @property
    def validation_rows(self) -> int:
        return len(self.validation_index)

    @property
    def split(self) -> str:
        return self.table.split

    @property
    def report(self) -> EncodingReport:
        return self.table.report

    def _take(self, whole: Tensor, index: Index) -> Tensor:
        return whole[torch.from_numpy(index).to(whole.device)]


class Sites(Sequence[Site]):
    """The clients of a simulation, by name and by node."""

    def __init__(
        self,
        federation: Federation,
        parts: Mapping[str, tuple[SharedTable, Index]],
        *,
        seed: int,
        device: torch.device,
        meter: Meter | None = None,
    ) -> None:
        """`parts` is each client's table and which of its rows it has. `meter` says what clients' tasks take, by
        default codecarbon where clients tell it: under privacy a simulation has nobody to tell, and measures nothing.

        Raises:
            ConfigError: there are too few clients, or energy cannot be measured.
        """
        if len(parts) < (least := federation.strategy.min_clients):
            raise ConfigError([f"strategy.min_clients is {least}, but there are only {len(parts)} clients"])
        self.meter = (meter or CodeCarbon.on(device)) if federation.tells_energy else None
        self.federation, self.device, self.names = federation, device, [*parts]
        self.most_rows = max(len(rows) for _, rows in parts.values())
        self.refused: dict[str, str] = {}  # who does not take part, and why
        self.on_refusal: Callable[[str, str], None] = _tell_nobody
        self._parts, self._seed = parts, seed
        self._names = {node_id(name): name for name in parts}
        self._views: dict[str, View] = {}
        self._made: dict[str, Site] = {}
        self._planned: set[str] = set()

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, place: int) -> Site: ...
    @overload
    def __getitem__(self, place: slice) -> list[Site]: ...
    def __getitem__(self, place: int | slice) -> Site | list[Site]:
        if isinstance(place, slice):
            return [self._site(name) for name in self.names[place]]
        return self._site(self.names[place])

    def __iter__(self) -> Iterator[Site]:
        return map(self._site, self.names)

    @property
    def nodes(self) -> Sequence[int]:
        """In the order of their numbers, in which a round looks at them."""
        return sorted(self._names)

    @property
    def tables(self) -> list[SharedTable]:
        """Each once."""
        return list({id(table): table for table, _ in self._parts.values()}.values())

    def validation_rows(self) -> Iterator[tuple[SharedTable, list[Index]]]:
        """Each table, and which of its rows its clients do not train on."""
        for table in self.tables:
            yield table, [self._view(name).validation_index for name, (its, _) in self._parts.items() if its is table]

    def name_of(self, node: int) -> str:
        return self._names[node]

    def asked(self, node: int, *, run: str) -> Site:
        """The site that is asked to take part in a run. The first time it plans its budget, and if it refuses, that is
        noted; it will refuse its tasks too."""
        name = self._names[node]
        site = self._site(name)
        if name not in self._planned:
            self._planned.add(name)
            try:
                site.account.budget(run)
            except Refusal as refusal:
                self.refused[name] = str(refusal)
                self.on_refusal(name, str(refusal))
        return site

    def check_quorum(self, *, run: str) -> None:
        """Asks clients until as many as a round needs are willing. Raises `Refusal` if there are not so many."""
        least = self.federation.strategy.min_clients
        willing = (node for node in self._names if self.asked(node, run=run).name not in self.refused)
        if len(list(islice(willing, least))) < least:
            name, reason = next(iter(self.refused.items()))
            raise Refusal(
                f"{len(self.refused)} of {len(self)} clients refuse, and {least} are needed; {name}: {reason}"
            )

    def opened(self, node: int, ledger: Charges) -> Site:
        """A site with a ledger from elsewhere."""
        name = self._names[node]
        return self._open(name, self._view(name), ledger)

    def __getstate__(self) -> dict[str, Any]:
        """For another process: as if no client had been asked yet."""
        nobody = {"refused": {}, "_views": {}, "_made": {}, "_planned": set(), "on_refusal": _tell_nobody}
        return {**vars(self), **nobody}

    def _site(self, name: str) -> Site:
        if name not in self._made:
            self._made[name] = self._open(name, self._view(name), MemoryLedger())
        return self._made[name]

    def _view(self, name: str) -> View:
        if name not in self._views:
            self._views[name] = View(*self._parts[name])
        return self._views[name]

    def _open(self, name: str, view: View, ledger: Charges) -> Site:
        return simulated_site(
            self.federation,
            view,
            name=name,
            ledger=ledger,
            noise_of=lambda task: SimulationNoise(self._seed, name, task),
            device=self.device,
            meter=self.meter,
        )


def _tell_nobody(name: str, reason: str) -> None:
    """What becomes of a refusal where nobody asks to be told."""
