"""How updates are put together as they come, by whoever is nearest to them.

An aggregator takes updates one by one and gives, at the end, what a strategy moves by: each of them (median, krum...),
or their weighted mean, exact (`Mean`) or clipped and noisy (client_privacy.py). Parts of a cohort may be put together
in different places and then merged.

A weighted mean of weighted means is exact, so a strategy that moves by the mean needs no single client's model and
gets this one as if a single client had sent it: memory grows with the model, not with the replies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, Self

from common.model.update import Update, Updates
from common.model.weights import Weights
from server.rounds.fold import Fold

TOGETHER = 0  # the node that a mean is said to be from


class Aggregator(Protocol):
    """One round's updates."""

    def add(self, node: int, update: Update) -> None:
        """Takes a client's update, which was admitted."""

    def add_all(self, nodes: Sequence[int], updates: Updates) -> None:
        """Takes several clients' updates, as `add` would one after another. Their memory is not kept."""

    def merge(self, other: Self) -> None:
        """Takes what another aggregator of the same round has, of other clients."""

    def finish(self) -> list[tuple[int, Update]]:
        """What the strategy gets, each as if from a node of that number; nothing if nothing was added."""

    @property
    def loss(self) -> float | None:
        """The mean loss of a row, if clients told theirs."""


class Losses:
    """The mean loss of a row over the updates, whatever their order."""

    def __init__(self) -> None:
        self._heard: list[tuple[float, float]] = []

    def hear(self, update: Update) -> None:
        if update.loss is not None:
            self._heard.append((update.weight, update.loss))

    def hear_all(self, updates: Updates) -> None:
        if updates.losses is not None:
            self._heard += zip(updates.weights.tolist(), updates.losses.tolist(), strict=True)

    def merge(self, other: Losses) -> None:
        self._heard += other._heard

    @property
    def mean(self) -> float | None:
        if not self._heard:
            return None
        return math.fsum(w * loss for w, loss in self._heard) / math.fsum(w for w, _ in self._heard)


class EachReply:
    """Every single update, in the order of the nodes: replies race, and sums of floats depend on their order."""

    def __init__(self) -> None:
        self._updates: dict[int, Update] = {}
        self._losses = Losses()

    def add(self, node: int, update: Update) -> None:
        self._updates[node] = update
        self._losses.hear(update)

    def add_all(self, nodes: Sequence[int], updates: Updates) -> None:
        for node, update in zip(nodes, updates.copy(), strict=True):
            self.add(node, update)

    def merge(self, other: EachReply) -> None:
        self._updates |= other._updates
        self._losses.merge(other._losses)

    def finish(self) -> list[tuple[int, Update]]:
        return sorted(self._updates.items())

    @property
    def loss(self) -> float | None:
        return self._losses.mean


class Mean:
    """The weighted mean of updates that resemble `like`."""

    def __init__(self, like: Weights) -> None:
        self._fold, self._losses = Fold(like), Losses()

    def add(self, node: int, update: Update) -> None:
        self._fold.add(update.weights, update.weight)
        self._losses.hear(update)

    def add_all(self, nodes: Sequence[int], updates: Updates) -> None:
        self._fold.add_all(updates.flat, updates.weights)
        self._losses.hear_all(updates)

    def merge(self, other: Mean) -> None:
        self._fold.merge(other._fold)
        self._losses.merge(other._losses)

    def finish(self) -> list[tuple[int, Update]]:
        if not len(self._fold):
            return []
        return [(TOGETHER, Update(weights=self._fold.mean(), weight=self._fold.weight))]

    @property
    def loss(self) -> float | None:
        return self._losses.mean
