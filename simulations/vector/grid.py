"""VectorGrid: a Flower grid whose clients are trained together, and their updates put together where they are made."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import torch
from flwr.app import Message
from flwr.clientapp import ClientApp

from client.app import counted, pace_of, told_of
from client.site import Site
from client.training.recipe import Scoring
from client.training.train import noisy_counts, train
from common.model.update import Updates
from common.model.weights import Weights
from common.text import shown
from common.wire import records
from common.wire.identity import task_name
from common.wire.records import ARRAYS
from server.rounds.admission import Partial, Peers, Rejection
from server.rounds.aggregation import Aggregator
from simulations.inline import InlineGrid
from simulations.noise import SimulationNoise
from simulations.sites import Sites, View
from simulations.vector.fold import Folding
from simulations.vector.jobs import Job
from simulations.vector.score import count_together
from simulations.vector.train import Trainer, chunks_of, unfit
from simulations.vector.workers import Workers

WORTH_S = 5.0
SCORED = 100  # clients at a time: always the same ones together, so that a float's last bits are


@dataclass(frozen=True, kw_only=True)
class _Charged:
    """A client's task, paid for."""

    site: Site
    job: Job


@dataclass(kw_only=True)
class _Round:
    """What has been answered of one round."""

    folding: Folding
    aggregator: Callable[[], Aggregator]
    asked: int
    deadline: float
    compare: bool
    done: int = 0
    peers: Peers[_Charged] = field(default_factory=lambda: Peers(lambda task: task.job.recipe.weight))
    rejected: list[Rejection] = field(default_factory=list)  # before any training
    statements: dict[int, dict[str, object]] = field(default_factory=dict)

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self.deadline


class VectorGrid(InlineGrid):
    """The grid of one run over simulated sites."""

    def __init__(
        self,
        app: ClientApp,
        sites: Sites,
        *,
        run: str,
        devices: Sequence[torch.device] = (),
        worth_s: float = WORTH_S,
        progress: Callable[[int, int], None] = lambda done, asked: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """
        Args:
            devices: two or more: each is for a worker process. They are started when the rounds to come are seen to
                take more than `worth_s` seconds without them.
            progress: is told how many clients of a round are trained, of how many.
            say: is told why a client is not trained with others, once for each reason.
        """
        super().__init__(app, sites.nodes, run=run)
        federation = sites.federation
        self._name, self._sites, self._federation = run, sites, federation
        self._width = min(federation.training.batch_size, sites.most_rows)
        self._trainer = Trainer(federation, width=self._width)
        self._devices, self._worth_s, self._progress = devices, worth_s, progress
        self._workers: Workers | None = None
        self._rounds = 0
        self._say, self._told = say, set[str]()

    def close(self) -> None:
        """Ends worker processes, if there are any."""
        if self._workers is not None:
            self._workers.close()

    def answers(
        self,
        messages: Iterable[Message],
        *,
        aggregator: Callable[[], Aggregator],
        needed: int,
        compare: bool,
        timeout: float | None = None,
    ) -> Generator[Message | Partial]:
        left, started = list(messages), time.monotonic()
        if not left:
            return
        arrays = left[0].content[ARRAYS]
        assert all(message.content[ARRAYS] is arrays for message in left), "a round sends everyone the same weights"
        start = records.to_weights(left[0].content.array_records[ARRAYS])
        this = _Round(
            folding=Folding(start, aggregator(), dtype=self._federation.wire.dtype, meter=self._sites.meter),
            aggregator=aggregator,
            asked=min(needed, len(left)),
            deadline=math.inf if timeout is None else time.monotonic() + timeout,
            compare=compare,
        )
        while left and (missing := needed - len(this.folding.nodes)) > 0 and not this.is_late:
            some, left = left[:missing], left[missing:]
            self._train(this, some)
        self._rounds += 1
        self._consider_workers(time.monotonic() - started)
        rejected = (*this.rejected, *this.folding.rejected)
        answered = {*this.folding.nodes, *(rejection.node_id for rejection in rejected)}
        yield Partial(
            aggregate=this.folding.aggregate,
            nodes=frozenset(this.folding.nodes),
            statements={node: said for node, said in this.statements.items() if node in answered},
            energy=this.folding.energy,
            rejected=rejected,
        )

    def _consider_workers(self, seconds: float) -> None:
        """Starts worker processes if the last round took so long that they are worth their start."""
        rounds_left = self._federation.training.rounds - self._rounds
        if self._workers is None and len(self._devices) > 1 and seconds * rounds_left > self._worth_s:
            tables = [(table.x, table.y) for table in self._sites.tables]
            self._workers = Workers(
                self._federation, tables, devices=self._devices, width=self._width, meter=self._sites.meter
            )

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Generator[Message]:
        """Answers to evaluations, some clients at a time. What else there is, is done for one after another."""
        left = list(messages)
        if any(message.metadata.message_type != "evaluate" for message in left):
            yield from super().stream(left, timeout=timeout)
            return
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while left and time.monotonic() <= deadline:
            some, left = left[:SCORED], left[SCORED:]
            yield from self._evaluate(some)

    def _evaluate(self, messages: Sequence[Message]) -> Iterator[Message]:
        charged: list[tuple[Message, Site, Scoring]] = []
        for message in messages:
            try:
                site = self._sites.asked(message.metadata.dst_node_id, run=self._name)
                charged.append((message, site, site.account.charge_evaluation(self._name, self._task(message))))
            except Exception as error:
                yield Message(told_of(error), reply_to=message)
        for table, of_table in groupby(charged, lambda task: _view(task[1]).table):
            tasks = list(of_table)
            scoring, arrays = tasks[0][2], tasks[0][0].content.array_records[ARRAYS]
            rows = [_view(site).validation_index for _, site, _ in tasks]
            score = partial(
                count_together,
                self._federation,
                records.to_weights(arrays),
                table,
                rows,
                exact=scoring.noise_multiplier is not None and scoring.arithmetic == "exact",
            )
            counts, energy = (score(), None) if self._sites.meter is None else self._sites.meter.measure(score)
            scored = sum(map(len, rows))
            for (message, site, its), found, own in zip(tasks, counts, rows, strict=True):
                if its.noise_multiplier is not None:
                    noise = self._noise(site, message)
                    found = noisy_counts(found, self._federation.data_schema, its.noise_multiplier, noise)
                content = counted(found, site, self._name)
                if energy is not None:  # what scoring all took, divided by rows
                    records.add_energy(content, energy.part(len(own) / scored if scored else 1 / len(tasks)))
                yield Message(content, reply_to=message)

    def _task(self, message: Message) -> str:
        return task_name(self._name, message.metadata.message_type, message.metadata.group_id)

    def _noise(self, site: Site, message: Message) -> SimulationNoise:
        noise = site.noise_of(f"{message.metadata.message_type}/{message.metadata.group_id}")
        assert isinstance(noise, SimulationNoise)
        return noise

    def _train(self, this: _Round, messages: Sequence[Message]) -> None:
        charged = self._charge_all(this, messages)
        jobs: list[Job] = []
        alone: list[_Charged] = []
        for task in charged:
            if reason := unfit(task.job.recipe, task.job.rows):
                alone.append(task)
                self._tell_once(task.site.name, reason)
            else:
                jobs.append(task.job)
        workers = self._workers if self._workers is not None and self._workers.are_ready() else None
        chunks = chunks_of(
            jobs,
            self._federation,
            width=self._width,
            device=self._sites.device,
            workers=1 if workers is None else len(workers),
        )
        if workers is not None:
            workers.train(
                chunks,
                this.folding,
                aggregator=this.aggregator,
                seconds=this.deadline - time.monotonic(),
                done=lambda trained: self._tell(this, trained),
            )
        else:
            for chunk in chunks:
                this.folding.train(self._trainer, chunk)
                self._tell(this, len(chunk))
                if this.is_late:
                    break
        for task in alone:
            if this.is_late:
                break
            this.folding.measured([task.job], partial(self._train_alone, this.folding.start, task))
            self._tell(this, 1)
        for task in charged:
            if (statement := task.site.account.statement(self._name)) is not None:
                this.statements[task.job.node] = {**statement.to_wire()}

    def _train_alone(self, start: Weights, task: _Charged) -> Updates:
        return Updates.of(train(task.job.recipe, start, task.site.dataset, noise=task.job.noise))

    def _charge_all(self, this: _Round, messages: Sequence[Message]) -> list[_Charged]:
        """Has clients pay, one after another. Returns those that are to be trained."""
        charged = [task for message in messages if (task := self._charge(this, message)) is not None]
        if not this.compare:
            return charged
        compared = [pair for task in charged for pair in this.peers.take(task)] + this.peers.release()
        this.rejected += [fault.of(task.job.node) for task, fault in compared if fault is not None]
        return [task for task, fault in compared if fault is None]

    def _tell_once(self, name: str, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            self._say(f"{name} is trained by itself, not with others: {reason} (told for the first such client only)")

    def _tell(self, this: _Round, trained: int) -> None:
        this.done += trained
        self._progress(this.done, this.asked)

    def _charge(self, this: _Round, message: Message) -> _Charged | None:
        """Has a client pay for the task, as it would if it were asked alone, or notes why it does not take part."""
        node = message.metadata.dst_node_id
        try:
            site = self._sites.asked(node, run=self._name)
            pace = pace_of(message, self._federation)
            recipe = replace(site.account.charge_update(self._name, self._task(message)), pace=pace)
        except Exception as error:
            said = told_of(error)
            this.rejected.append(Rejection(node, said.code, shown(said.reason or "no reason given")))
            return None
        view = _view(site)
        varied = self._federation.model.dropout > 0 or self._federation.training.augmentation is not None
        job = Job(
            node=node,
            recipe=recipe,
            x=view.table.x,
            y=view.table.y,
            index=view.index,
            ids=view.ids if recipe.private is not None and varied else None,
            noise=self._noise(site, message),
        )
        return _Charged(site=site, job=job)


def _view(site: Site) -> View:
    dataset = site.dataset
    assert isinstance(dataset, View)
    return dataset
