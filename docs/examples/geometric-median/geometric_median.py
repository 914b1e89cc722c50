"""The geometric median of the clients' models, as a strategy of one's own (docs/extending.md).

    minimise over w: sum of weight_k |w - w_k|

A client that is far away pulls no harder than one that is near, so a few that lie cannot move it far. It is found by
the smoothed Weiszfeld algorithm of Pillutla, Kakade, Harchaoui 2022, "Robust Aggregation for Federated Learning",
arXiv:1912.13445, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from common.wire.records import from_weights, to_update

Points = NDArray[np.float64]


class GeometricMedian(FedAvg):
    """`steps` of Weiszfeld's algorithm; a distance below `smoothing` counts as that much."""

    def __init__(self, *, steps: int = 10, smoothing: float = 1e-6, **how: Any) -> None:
        if not (isinstance(steps, int) and steps >= 1):
            raise ValueError(f"steps must be a whole number of at least 1 (got {steps})")
        if not smoothing > 0:
            raise ValueError(f"smoothing must be greater than 0 (got {smoothing})")
        super().__init__(**how)
        self.steps, self.smoothing = steps, smoothing

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next model, of replies that Cloister has admitted: arrays of the right names and shapes, all finite."""
        updates = [to_update(reply.content) for reply in replies]
        if not updates:
            return None, None
        like = updates[0].weights
        points = np.stack([np.concatenate([a.ravel() for a in u.weights.values()]) for u in updates]).astype(np.float64)
        weights = np.array([update.weight for update in updates])
        median = geometric_median(points, weights, steps=self.steps, smoothing=self.smoothing)
        parts = np.split(median, np.cumsum([array.size for array in like.values()])[:-1])
        moved = {n: part.reshape(a.shape).astype(a.dtype) for (n, a), part in zip(like.items(), parts, strict=True)}
        return from_weights(moved), None


def geometric_median(points: Points, weights: Points, *, steps: int, smoothing: float) -> Points:
    """[clients, d], [clients] -> [d]. Begins at the weighted mean."""
    share = weights / weights.sum()
    at: Points = share @ points
    for _ in range(steps):
        pull = weights / np.maximum(np.linalg.norm(points - at, axis=1), smoothing)
        at = (pull / pull.sum()) @ points
    return at
