"""The names that the two Flower apps use in messages, and model state as Flower's records."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

# Records of a message.
ARRAYS = "arrays"  # the model
CONFIG = "config"  # the server's settings: RUN and ROUND
METRICS = "metrics"
PRIVACY = "privacy"  # a private client's statement of what it has released

# Values in CONFIG.
RUN = "run"
ROUND = "server-round"  # Flower's strategies set it

# Values in METRICS.
WEIGHT = "num-examples"  # Flower's strategies weigh by it
LOSS = "train_loss"
COUNTS = "counts"

# Codes of a client's refusal, as a Failure frame and as a flwr.app.Error.
REFUSED = 1001
BUDGET_EXHAUSTED = 1002
FAILED = 1003
LOST = 1004


def from_state(state: Mapping[str, NDArray[np.float32]]) -> ArrayRecord:
    """Named arrays as a record, in their order."""
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in state.items()})


def to_state(record: ArrayRecord) -> dict[str, NDArray[np.float32]]:
    """A record as named arrays, in its order, each of whatever type it has."""
    return {name: array.numpy() for name, array in record.items()}
