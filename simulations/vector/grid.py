"""VectorGrid: a Flower grid whose clients are trained together, and their updates put together where they are made."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from flwr.app import Message
from flwr.clientapp import ClientApp

from client.app import counted, told_of
from client.site import Site
from client.training.recipe import Recipe, Scoring
from client.training.train import noisy_counts, train
from common.model.update import Updates
from common.model.weights import Weights
from common.text import shown
from common.wire import compression, records
from common.wire.identity import task_name
from common.wire.records import ARRAYS
from server.rounds.admission import LEAST_TO_COMPARE, Partial, Rejection, faults_of, reach_of, too_heavy
from server.rounds.aggregation import Aggregator
from simulations.inline import InlineGrid
from simulations.noise import SimulationNoise
from simulations.sites import Sites, View
from simulations.vector.jobs import Job
from simulations.vector.score import count_together
from simulations.vector.train import Trainer, unfit

SCORED = 100  # clients at a time: always the same ones together, so that a float's last bits are


@dataclass(frozen=True, kw_only=True)
class _Charged:
    """A client's task, paid for."""

    node: int
    site: Site
    recipe: Recipe
    noise: SimulationNoise


@dataclass(kw_only=True)
class _Round:
    """What has been answered of one round."""

    start: Weights
    aggregate: Aggregator
    deadline: float
    compare: bool
    nodes: set[int] = field(default_factory=set)
    rejected: list[Rejection] = field(default_factory=list)
    statements: dict[int, dict[str, object]] = field(default_factory=dict)

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self.deadline


class VectorGrid(InlineGrid):
    """The grid of one run over simulated sites."""

    def __init__(self, app: ClientApp, sites: Sites, *, run: str, chunk: int | None = None) -> None:
        """`chunk` so many clients are trained at once; by default as many as turn out to be fastest."""
        super().__init__(app, sites.nodes, run=run)
        federation = sites.federation
        width = min(federation.training.batch_size, sites.most_rows)
        self._name, self._sites, self._federation = run, sites, federation
        self._trainer = Trainer(federation, width=width, chunk=chunk)

    def answers(
        self,
        messages: Iterable[Message],
        *,
        aggregator: Callable[[], Aggregator],
        needed: int,
        compare: bool,
        timeout: float | None = None,
    ) -> Generator[Message | Partial]:
        left = list(messages)
        if not left:
            return
        arrays = left[0].content[ARRAYS]
        assert all(message.content[ARRAYS] is arrays for message in left), "a round sends everyone the same weights"
        this = _Round(
            start=records.to_weights(left[0].content.array_records[ARRAYS]),
            aggregate=aggregator(),
            deadline=math.inf if timeout is None else time.monotonic() + timeout,
            compare=compare,
        )
        while left and len(this.nodes) < needed and not this.is_late:
            missing = needed - len(this.nodes)
            some, left = left[:missing], left[missing:]
            self._train(this, some)
        yield Partial(
            aggregate=this.aggregate,
            nodes=frozenset(this.nodes),
            statements=this.statements,
            rejected=tuple(this.rejected),
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
            counts = count_together(
                self._federation,
                records.to_weights(arrays),
                table.x,
                table.y,
                [_view(site).validation_index for _, site, _ in tasks],
                exact=scoring.noise_multiplier is not None and scoring.arithmetic == "exact",
            )
            for (message, site, its), found in zip(tasks, counts, strict=True):
                if its.noise_multiplier is not None:
                    noise = self._noise(site, message)
                    found = noisy_counts(found, self._federation.data_schema, its.noise_multiplier, noise)
                yield Message(counted(found, site, self._name), reply_to=message)

    def _task(self, message: Message) -> str:
        return task_name(self._name, message.metadata.message_type, message.metadata.group_id)

    def _noise(self, site: Site, message: Message) -> SimulationNoise:
        noise = site.noise_of(f"{message.metadata.message_type}/{message.metadata.group_id}")
        assert isinstance(noise, SimulationNoise)
        return noise

    def _train(self, this: _Round, messages: Sequence[Message]) -> None:
        charged = self._comparable(this, [task for message in messages if (task := self._charge(this, message))])
        alone = [task for task in charged if unfit(task.recipe, task.site.dataset.rows)]
        fit = [task for task in charged if task not in alone] if alone else charged
        if fit:
            for places, updates in self._trainer.train(this.start, [_job(task) for task in fit]):
                self._take(this, [fit[place] for place in places], updates)
                if this.is_late:
                    return
        for task in alone:
            update = train(task.recipe, this.start, task.site.dataset, noise=task.noise)
            self._take(this, [task], Updates.of(update))
            if this.is_late:
                return

    def _charge(self, this: _Round, message: Message) -> _Charged | None:
        """Has a client pay for the task, as it would if it were asked alone, or notes why it does not take part."""
        node = message.metadata.dst_node_id
        try:
            site = self._sites.asked(node, run=self._name)
            recipe = site.account.charge_update(self._name, self._task(message))
        except Exception as error:
            said = told_of(error)
            this.rejected.append(Rejection(node, said.code, shown(said.reason or "no reason given")))
            return None
        return _Charged(node=node, site=site, recipe=recipe, noise=self._noise(site, message))

    def _comparable(self, this: _Round, charged: list[_Charged]) -> list[_Charged]:
        """Those whose weight is not too far above the others'."""
        if not this.compare or len(charged) < LEAST_TO_COMPARE:
            return charged
        median = statistics.median(task.recipe.weight for task in charged)
        kept = []
        for task in charged:
            if (fault := too_heavy(task.recipe.weight, median)) is None:
                kept.append(task)
            else:
                this.rejected.append(fault.of(task.node))
        return kept

    def _take(self, this: _Round, tasks: Sequence[_Charged], updates: Updates) -> None:
        """Puts the updates of some clients together with what there is, but for those that must not count."""
        if (dtype := self._federation.wire.dtype) != "float32":
            updates = updates.copy()
            for task, update in zip(tasks, updates, strict=True):
                packed = compression.pack(update.weights, this.start, dtype, task.noise.uniform)
                arrived = compression.unpack(packed, this.start, dtype)
                for name, array in update.weights.items():
                    array[...] = arrived[name]
        for task in tasks:
            if (statement := task.site.account.statement(self._name)) is not None:
                this.statements[task.node] = {**statement.to_wire()}
        faults = faults_of(updates, this.start, reach_of(this.start))
        this.rejected += [fault.of(tasks[place].node) for place, fault in faults.items()]
        counted = [place for place in range(len(tasks)) if place not in faults]
        nodes = [tasks[place].node for place in counted]
        if counted:
            this.aggregate.add_all(nodes, updates.take(counted) if faults else updates)
        this.nodes.update(nodes)


def _view(site: Site) -> View:
    dataset = site.dataset
    assert isinstance(dataset, View)
    return dataset


def _job(task: _Charged) -> Job:
    view = _view(task.site)
    private = task.recipe.private is not None and task.recipe.federation.model.dropout > 0
    return Job(
        recipe=task.recipe,
        x=view.table.x,
        y=view.table.y,
        index=view.index,
        ids=view.ids if private else None,
        noise=task.noise,
    )
