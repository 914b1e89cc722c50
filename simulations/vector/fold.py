"""What becomes of updates where they are made: sent as they would be, checked, and put together."""

from __future__ import annotations

from collections.abc import Sequence

from common.document.federation import Dtype
from common.model.update import Updates
from common.model.weights import Weights
from common.wire import compression
from server.rounds.admission import Rejection, faults_of, reach_of
from server.rounds.aggregation import Aggregator
from simulations.vector.jobs import Job
from simulations.vector.train import Trainer


class Folding:
    """Some clients' updates of one round, put together in `aggregate`."""

    def __init__(self, start: Weights, aggregate: Aggregator, *, dtype: Dtype) -> None:
        """`dtype` is what updates travel in."""
        self.start, self.aggregate = start, aggregate
        self.nodes: list[int] = []  # whose updates are in it
        self.rejected: list[Rejection] = []  # whose must not count
        self._dtype, self._reach = dtype, reach_of(start)

    def __getstate__(self) -> dict[str, object]:
        """For whoever merges it, who has the weights."""
        return {**vars(self), "start": {}}

    def train(self, trainer: Trainer, chunk: Sequence[Job]) -> None:
        """Trains a chunk's clients and takes their updates."""
        self.take(chunk, trainer.train(self.start, chunk))

    def take(self, jobs: Sequence[Job], updates: Updates) -> None:
        """Takes clients' updates, but for those that must not count."""
        if self._dtype != "float32":
            updates = updates.copy()
            for job, update in zip(jobs, updates, strict=True):
                packed = compression.pack(update.weights, self.start, self._dtype, job.noise.uniform)
                arrived = compression.unpack(packed, self.start, self._dtype)
                for name, array in update.weights.items():
                    array[...] = arrived[name]
        faults = faults_of(updates, self.start, self._reach)
        self.rejected += [fault.of(jobs[place].node) for place, fault in faults.items()]
        if counted := [place for place in range(len(jobs)) if place not in faults]:
            nodes = [jobs[place].node for place in counted]
            self.aggregate.add_all(nodes, updates.take(counted) if faults else updates)
            self.nodes += nodes

    def merge(self, other: Folding) -> None:
        """Takes what was put together elsewhere, of other clients of the round."""
        self.aggregate.merge(other.aggregate)
        self.nodes += other.nodes
        self.rejected += other.rejected
