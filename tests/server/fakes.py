"""Flower ClientApps written for tests, and a run over them. Each client adds 1 to every number of the model, unless
told otherwise, so that after n complete rounds the model has moved by exactly n."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from common.document.federation import Federation
from common.errors import RunFailed
from common.model import mlp
from common.model.weights import Weights
from common.privacy.noise import NoiseSource, seeded
from common.wire import records
from common.wire.records import ARRAYS, COUNTS, LOSS, LOST, METRICS, WEIGHT
from server.rounds import strategies
from server.rounds.client_privacy import ClientLevelDP
from server.rounds.loop import run_rounds
from server.rounds.run import Ending, Progress, Run, Unwritten
from simulations.inline import InlineGrid

Answer = RecordDict | Error | None  # None: no answer in time


@dataclass
class Clients:
    """Fake clients. `odd` maps (round, node), or a node for every round, to what it does instead of training."""

    odd: dict[Any, Callable[[Message], Answer]] = field(default_factory=dict)
    asked: list[tuple[str, int, int]] = field(default_factory=list)  # type, round, node
    counts: tuple[float, ...] = (3.0, 1.0, 2.0, 4.0)
    evaluates: Callable[[Message], Answer] | None = None

    def __call__(self, message: Message, context: Context) -> Message:
        node, round = context.node_id, int(message.metadata.group_id)
        kind = message.metadata.message_type
        self.asked.append((kind, round, node))
        if kind == "evaluate":
            good = RecordDict({METRICS: MetricRecord({WEIGHT: 1.0, COUNTS: list(self.counts)})})
            answer = self.evaluates(message) if self.evaluates else good
        else:
            answer = self.odd.get((round, node), self.odd.get(node, train))(message)
        if answer is None:
            return Message(Error(code=LOST, reason="timed out"), reply_to=message)
        return Message(answer, reply_to=message)

    def trained(self, round: int) -> list[int]:
        """The nodes that a round asked to train; in which order is Flower's affair."""
        return sorted(node for kind, r, node in self.asked if (kind, r) == ("train", round))


def train(message: Message, *, metrics: dict[str, float] | None = None) -> RecordDict:
    state = records.to_weights(message.content[ARRAYS])
    moved = {name: array + np.float32(1) for name, array in state.items()}
    figures = MetricRecord({WEIGHT: 10.0, LOSS: 0.5} if metrics is None else metrics)
    return RecordDict({ARRAYS: records.from_weights(moved), METRICS: figures})


def train_to_nan(message: Message) -> RecordDict:
    state = records.to_weights(message.content[ARRAYS])
    broken = {name: np.full_like(array, np.nan) for name, array in state.items()}
    return RecordDict({ARRAYS: records.from_weights(broken), METRICS: MetricRecord({WEIGHT: 1.0, LOSS: 0.5})})


def says(code: int, reason: str = "no") -> Callable[[Message], Answer]:
    return lambda message: Error(code=code, reason=reason)


def interrupted(message: Message) -> Answer:
    raise KeyboardInterrupt


class Kept(Unwritten):
    """A journal that keeps the last model of each round."""

    def __init__(self) -> None:
        self.saved: dict[int, Weights] = {}

    def save(self, run: Run) -> None:
        self.saved[run.progress.round] = run.progress.weights


@dataclass
class Outcome:
    run: Run
    ending: Ending
    events: list[dict[str, Any]]
    saved: list[tuple[int, Weights]]
    start: Weights

    def rounds(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == "round"]

    def moved(self) -> float:
        """By how much every number of the model has moved, the same for all."""
        steps = {
            round(float(d), 3)
            for name in self.start
            for d in np.ravel(self.run.progress.weights[name] - self.start[name])
        }
        (step,) = steps
        return step


def outcome(
    document: Federation,
    clients: Clients,
    *,
    nodes: Iterable[int] = (1, 2, 3),
    grid: Grid | None = None,
    noise: NoiseSource | None = None,
) -> Outcome:
    """Runs the rounds and returns how they went; `RunFailed` is the ending's reason."""
    events: list[dict[str, Any]] = []
    kept = Kept()
    run = Run(
        federation=document,
        name="test",
        progress=Progress(weights=mlp.weights_of(mlp.build(document))),
        observe=lambda event: events.append(json.loads(json.dumps(event.to_json()))),
        journal=kept,
        client_privacy=ClientLevelDP(document, noise or seeded(0)) if document.privacy.client else None,
    )
    start = run.progress.weights
    grid = grid or InlineGrid(clients, nodes, run="test")  # type: ignore[arg-type]
    try:
        ending = run_rounds(run, grid, strategies.build(document), wait_s=0.0)
    except RunFailed as error:
        ending = Ending("failed", str(error))
    return Outcome(run, ending, events, list(kept.saved.items()), start)
