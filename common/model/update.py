"""What one round of training gives, at a client, on the wire and at the server."""

from __future__ import annotations

from dataclasses import dataclass

from common.model.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Update:
    """A model's new weights, what they count among others', and the mean loss of a row (None under privacy)."""

    weights: Weights
    weight: float
    loss: float | None = None
