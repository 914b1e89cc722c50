"""Agnostic federated learning: the model that is best for the worst mixture of clients (Mohri, Sivek, Suresh 2019,
arXiv:1902.00146, equation 3), as a Flower strategy.

    minimise over models w, maximise over mixtures l: sum of l_k loss_k(w)

A round moves the model by the mean of updates in which client k counts l_k, and the mixture by a step of mirror ascent:
log l_k grows by `mixture_rate` x loss_k, which keeps it within the simplex without a projection. The loss is what a
client's training has met in the round. Clients that a round did not ask keep theirs; one that is met for the first time
begins with the mean of those that are known.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from common.wire import records
from server.rounds.fold import Fold


class Agnostic(FedAvg):
    """`mixture_rate` is how fast clients of larger losses gain weight; 0 is a mean in which all clients are alike."""

    def __init__(self, *, mixture_rate: float, **how: Any) -> None:
        super().__init__(**how)
        self.mixture_rate = mixture_rate
        self.mixture: dict[str, NDArray[np.float64]] | None = None  # log l_k, but for a constant, by node

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        valid, _ = self._check_and_log_replies(replies, is_train=True)
        if not valid:
            return None, None
        updates = dict(zip(_nodes(valid), (records.to_update(m.content) for m in valid), strict=True))
        known = self.mixture or {}
        middle = float(np.mean([*known.values()])) if known else 0.0
        logs = {node: float(known.get(node, middle)) for node in updates}
        largest = max(logs.values())
        mean = Fold(next(iter(updates.values())).weights)
        for node, update in updates.items():
            mean.add(update.weights, float(np.exp(logs[node] - largest)))
        moved = {node: logs[node] + self.mixture_rate * (update.loss or 0.0) for node, update in updates.items()}
        self.mixture = known | {node: np.asarray(log) for node, log in moved.items()}
        return records.from_weights(mean.mean()), None


def _nodes(replies: list[Message]) -> list[str]:
    """Whose updates they are. Those that a round puts together anew are all from the server, and addressed to whom they
    are from (server/rounds/round.py)."""
    sources = [message.metadata.src_node_id for message in replies]
    anew = len(set(sources)) == 1
    return [str(m.metadata.dst_node_id if anew else m.metadata.src_node_id) for m in replies]
