"""Worker processes: each trains clients on a core or a GPU of its own, and puts their updates together.

A worker is started once. It maps the tables' memory, which is shared and not copied; for each round it is sent the
weights and an empty aggregator, then one chunk of clients after another, and answers with what it has put together.
Which worker trains a chunk changes no bit of the outcome.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import numpy as np
import torch
from torch import Tensor

from client.energy import Meter
from client.training.recipe import DPSGD, Pace, Recipe
from client.training.row_draws import RowIds
from common.document import federation as federations
from common.document.federation import Federation
from common.errors import CloisterError, WorkerLost
from common.model.weights import Weights
from server.rounds.aggregation import Aggregator
from simulations.interrupts import without_interrupts
from simulations.noise import SimulationNoise
from simulations.vector.fold import Folding
from simulations.vector.jobs import Index, Job
from simulations.vector.shared import SharedArray
from simulations.vector.train import Trainer

CLOSING_S = 5.0


@dataclass(frozen=True, kw_only=True)
class _Setup:
    """What a worker needs from the start."""

    federation: str  # canonical
    tables: list[tuple[SharedArray, SharedArray]]
    device: str
    width: int
    meter: Meter | None


@dataclass(frozen=True, kw_only=True)
class _Begin:
    """A round."""

    start: Weights
    aggregate: Aggregator


class _End:
    """... is over: what was put together is asked for."""


@dataclass(frozen=True, kw_only=True)
class _Tasks:
    """Jobs on their way, in few objects: what is sent one by one takes as long as training small models does."""

    pace: Pace
    nodes: list[int]
    tables: list[int]
    recipes: list[tuple[int, float, DPSGD | None]]  # steps, weight and how it is private
    rows: Index  # of all jobs, one after another
    counts: list[int]
    ids: list[RowIds | None]
    seeds: list[tuple[int | str, ...]]

    @classmethod
    def of(cls, jobs: Sequence[Job], tables: Mapping[int, int]) -> _Tasks:
        """`tables` has each table's place, by the identity of its x."""
        return cls(
            pace=jobs[0].recipe.pace,
            nodes=[job.node for job in jobs],
            tables=[tables[id(job.x)] for job in jobs],
            recipes=[(job.recipe.steps, job.recipe.weight, job.recipe.private) for job in jobs],
            rows=np.concatenate([job.index for job in jobs]),
            counts=[job.rows for job in jobs],
            ids=[job.ids for job in jobs],
            seeds=[job.noise.seed for job in jobs],
        )

    def jobs(self, federation: Federation, tables: Sequence[tuple[Tensor, Tensor]]) -> list[Job]:
        """The same jobs, with the receiver's own tables. What they cost was charged by whoever sent them."""
        parts = np.split(self.rows, np.cumsum(self.counts)[:-1])
        return [
            Job(
                node=node,
                recipe=Recipe(federation=federation, steps=steps, weight=weight, private=private, pace=self.pace),
                x=tables[table][0],
                y=tables[table][1],
                index=index,
                ids=ids,
                noise=SimulationNoise(*seed),
            )
            for node, table, (steps, weight, private), index, ids, seed in zip(
                self.nodes, self.tables, self.recipes, parts, self.ids, self.seeds, strict=True
            )
        ]


class Workers:
    """Processes for one federation and the tables of its clients."""

    def __init__(
        self,
        federation: Federation,
        tables: Sequence[tuple[Tensor, Tensor]],
        *,
        devices: Sequence[torch.device],
        width: int,
        meter: Meter | None = None,
    ) -> None:
        """Starts a process for each of `devices`. `tables` are whose rows jobs may have, x and y of each; `width` is a
        Trainer's, `meter` a Folding's."""
        self._tables = {id(x): place for place, (x, _) in enumerate(tables)}
        shared = [(SharedArray(x.cpu().numpy()), SharedArray(y.cpu().numpy())) for x, y in tables]
        canonical, context = federation.canonical, mp.get_context("spawn")
        self._processes: list[SpawnProcess] = []
        self._links: list[Connection] = []
        for device in devices:
            setup = _Setup(federation=canonical, tables=shared, device=str(device), width=width, meter=meter)
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, setup), daemon=True, name=f"worker on {device}")
            with without_interrupts():
                process.start()
            theirs.close()
            self._processes.append(process)
            self._links.append(ours)
        for pair in shared:
            for each in pair:
                each.close()
        self._starting = {*self._links}

    def __len__(self) -> int:
        return len(self._links)

    def are_ready(self, *, wait_s: float = 0.0) -> bool:
        """Have all of them started? Raises `WorkerLost` if one has ended."""
        deadline = time.monotonic() + wait_s
        while self._starting:
            left = max(deadline - time.monotonic(), 0.0)
            ready = self._wait(self._starting, timeout=left)
            if not ready:
                return False
            for link in ready:
                self._receive(link)
                self._starting.discard(link)
        return True

    def train(
        self,
        chunks: Iterable[Sequence[Job]],
        folding: Folding,
        *,
        aggregator: Callable[[], Aggregator],
        seconds: float,
        done: Callable[[int], None],
    ) -> None:
        """Trains chunks of clients, each in whichever worker is idle, and merges what comes of them into `folding`.

        Args:
            seconds: no chunk begins later.
            done: is told how many clients were trained, as they are.

        Raises:
            WorkerLost: a worker has ended.
            CloisterError, RuntimeError: of a worker's own; the others are idle by then.
        """
        deadline = time.monotonic() + seconds
        idle, begun, working = [*self._links], set[Connection](), set[Connection]()
        failed: list[Exception] = []

        def hear() -> None:
            for link in self._wait(working):
                match self._receive(link):
                    case int(trained):
                        done(trained)
                        idle.append(link)
                    case Exception() as error:
                        failed.append(error)
                        idle.append(link)
                    case Folding() as part:
                        folding.merge(part)
                        working.remove(link)

        for chunk in chunks:
            while not idle:
                hear()
            if failed or time.monotonic() > deadline:
                break
            link = idle.pop(0)
            if link not in begun:
                begun.add(link)
                working.add(link)
                self._send(link, _Begin(start=folding.start, aggregate=aggregator()))
            self._send(link, _Tasks.of(chunk, self._tables))
        for link in begun:
            self._send(link, _End())  # it is read when the last chunk is done
        while working:
            hear()
        if failed:
            raise failed[0]

    def close(self) -> None:
        """Ends all of them, also those that are at work."""
        for link in self._links:
            link.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(CLOSING_S)
            if process.is_alive():
                process.kill()
                process.join()

    def _wait(self, links: Iterable[Connection], *, timeout: float | None = None) -> list[Connection]:
        """Those of `links` that have something to say, which is also how one that is lost is found."""
        return [link for link in connection.wait([*links], timeout) if isinstance(link, Connection)]

    def _send(self, link: Connection, message: object) -> None:
        try:
            link.send(message)
        except OSError as error:
            raise self._lost(link) from error

    def _receive(self, link: Connection) -> object:
        try:
            return link.recv()
        except (EOFError, OSError) as error:
            raise self._lost(link) from error

    def _lost(self, link: Connection) -> WorkerLost:
        process = self._processes[self._links.index(link)]
        process.join(CLOSING_S)
        code = process.exitcode
        how = f"by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"with status {code}"
        hint = "; the system may have had too little memory" if code == -signal.SIGKILL else ""
        return WorkerLost(f"a worker process (pid {process.pid}) has ended {how}{hint}; use fewer with --workers")


def _work(link: Connection, setup: _Setup) -> None:
    """A worker's life. Ctrl-C is for the process that started it, whose end is this one's."""
    torch.set_num_threads(1)
    device, federation = torch.device(setup.device), federations.from_canonical(setup.federation)
    tables = [(x.tensor().to(device), y.tensor().to(device)) for x, y in setup.tables]
    meter = setup.meter and setup.meter.at(device)
    trainer, folding = Trainer(federation, width=setup.width), None

    gc.freeze()  # modules stay
    link.send("ready")
    while True:
        try:
            message = link.recv()
        except (EOFError, OSError):
            return
        try:
            match message:
                case _Begin(start=start, aggregate=aggregate):
                    folding = Folding(start, aggregate, dtype=federation.wire.dtype, meter=meter)
                case _Tasks():
                    assert folding is not None
                    jobs = message.jobs(federation, tables)
                    folding.train(trainer, jobs)
                    link.send(len(jobs))
                case _End():
                    link.send(folding)
                    folding = None
        except BrokenPipeError:
            return
        except Exception as error:
            ours = isinstance(error, CloisterError)
            link.send(error if ours else RuntimeError(f"{type(error).__name__}: {error}"))  # not every one can be sent
