"""What becomes of updates where they are made: sent as they would be, checked, and put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from client.energy import Meter
from common.document.federation import Dtype
from common.model.energy import Energy, sum_of
from common.model.update import Updates
from common.model.weights import Weights
from common.wire import compression
from server.rounds.admission import Rejection, faults_of, reach_of
from server.rounds.aggregation import Aggregator
from simulations.vector.jobs import Job
from simulations.vector.train import Trainer


class Folding:
    """Some clients' updates of one round, put together in `aggregate`."""

    def __init__(self, start: Weights, aggregate: Aggregator, *, dtype: Dtype, meter: Meter | None = None) -> None:
        """`dtype` is what updates travel in. `meter` measures training, where clients tell what it takes."""
        self.start, self.aggregate = start, aggregate
        self.nodes: list[int] = []  # whose updates are in it
        self.rejected: list[Rejection] = []  # whose must not count
        self.energy: Energy | None = None  # that those in it took
        self._dtype, self._reach, self._meter = dtype, reach_of(start), meter

    def __getstate__(self) -> dict[str, object]:
        """For whoever merges it, who has the weights."""
        return {**vars(self), "start": {}}

    def train(self, trainer: Trainer, chunk: Sequence[Job]) -> None:
        """Trains a chunk's clients and takes their updates."""
        self.measured(chunk, lambda: trainer.train(self.start, chunk))

    def measured(self, jobs: Sequence[Job], train: Callable[[], Updates]) -> None:
        """Has clients trained, and takes their updates. Energy is divided among the clients by their steps."""
        if self._meter is None:
            self.take(jobs, train())
            return
        updates, energy = self._meter.measure(train)
        counted = set(self.take(jobs, updates))
        steps = [(job.node, job.recipe.steps) for job in jobs]
        share = sum(of for node, of in steps if node in counted) / sum(of for _, of in steps)
        self.energy = sum_of(self.energy, energy.part(share))

    def take(self, jobs: Sequence[Job], updates: Updates) -> Sequence[int]:
        """Takes clients' updates, but for those that must not count. Returns the nodes of those that do."""
        if self._dtype != "float32":
            updates = updates.copy()
            for job, update in zip(jobs, updates, strict=True):
                packed = compression.pack(update.weights, self.start, self._dtype, job.noise.uniform)
                arrived = compression.unpack(packed, self.start, self._dtype)
                for name, array in update.weights.items():
                    array[...] = arrived[name]
        faults = faults_of(updates, self.start, self._reach)
        self.rejected += [fault.of(jobs[place].node) for place, fault in faults.items()]
        counted = [place for place in range(len(jobs)) if place not in faults]
        nodes = [jobs[place].node for place in counted]
        if counted:
            self.aggregate.add_all(nodes, updates.take(counted) if faults else updates)
            self.nodes += nodes
        return nodes

    def merge(self, other: Folding) -> None:
        """Takes what was put together elsewhere, of other clients of the round."""
        self.aggregate.merge(other.aggregate)
        self.nodes += other.nodes
        self.rejected += other.rejected
        self.energy = sum_of(self.energy, other.energy)
