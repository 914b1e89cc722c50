"""What one round of training gives, at a client, on the wire and at the server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from common.model.weights import Weights, flat_of, of_flat


@dataclass(frozen=True, kw_only=True)
class Update:
    """A model's new weights, what they count among others', and the mean loss of a row (None under privacy)."""

    weights: Weights
    weight: float
    loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class Updates:
    """Several clients' updates. `flat` float32 [clients, parameters] has each one's arrays, one after another, as they
    are in `like`; `weights` and `losses`, float64 [clients], are what each counts and its loss, None under privacy."""

    flat: NDArray[np.float32]
    weights: NDArray[np.float64]
    losses: NDArray[np.float64] | None
    like: Weights

    @classmethod
    def of(cls, update: Update) -> Updates:
        """One client's alone."""
        return cls(
            flat=flat_of(update.weights)[None],
            weights=np.array([update.weight]),
            losses=None if update.loss is None else np.array([update.loss]),
            like=update.weights,
        )

    def __len__(self) -> int:
        return len(self.flat)

    def take(self, index: Sequence[int]) -> Updates:
        """Those of some clients."""
        losses = None if self.losses is None else self.losses[index]
        return replace(self, flat=self.flat[index], weights=self.weights[index], losses=losses)

    def copy(self) -> Updates:
        """The same in memory of its own."""
        return replace(self, flat=self.flat.copy())

    def __iter__(self) -> Iterator[Update]:
        """Each one's, sharing memory."""
        for i, flat in enumerate(self.flat):
            loss = None if self.losses is None else float(self.losses[i])
            yield Update(weights=of_flat(flat, self.like), weight=float(self.weights[i]), loss=loss)
