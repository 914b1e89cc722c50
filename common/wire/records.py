"""The names that the two Flower apps use in messages, and model weights as Flower's records."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from typing import Any

import flwr.app
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from common.model.energy import Energy
from common.model.update import Update

# Records of a message.
ARRAYS = "arrays"  # the model
CONFIG = "config"  # the server's settings: RUN, and Flower's own
METRICS = "metrics"
PRIVACY = "privacy"  # a private client's statement of what it has released
CLIENT = "client"  # who answers, for a server on a grid of Flower's: NAME

# The value in CLIENT.
NAME = "name"

# Values in CONFIG.
RUN = "run"
COMPLETE = "complete-rounds"  # that made the model
ROUND = "server-round"  # Flower's own
RATE = "learning-rate-factor"  # that a plateau has brought the learning rate down to

# Values in METRICS.
WEIGHT = "num-examples"  # Flower's strategies weigh by it
LOSS = "train_loss"
COUNTS = "counts"
JOULES, GRAMS = "joules", "grams"  # of a task, where the document asks for them

# Codes of a client's refusal, as a Failure frame and as a flwr.app.Error.
REFUSED = 1001
BUDGET_EXHAUSTED = 1002
FAILED = 1003
# All that a server hears of a failure: which one it was may depend on rows.
CLIENT_FAILED = "the client failed; its own log says more"
LOST = 1004  # the client left
LATE = 1005  # no answer before the round's deadline; said by the server


@functools.cache
def _name_of(dtype: np.dtype[Any]) -> str:
    return str(dtype)


class Array(flwr.app.Array):
    """Flower's Array around an ndarray that is there already.

    Flower's own makes a numpy file of each array when it is constructed and reads it again at each look, which costs
    more than a round's arithmetic; this one does so only if Flower's runtimes ask for the bytes. They find a class by
    its name, so it has the same.
    """

    def __init__(self, ndarray: NDArray[Any]) -> None:
        view = ndarray.view()
        view.flags.writeable = False
        # Past Flower's __setattr__, and with the type's name at hand: a round makes thousands of these.
        self.__dict__.update(_view=view, dtype=_name_of(view.dtype), shape=view.shape, stype="numpy.ndarray")

    @property
    def view(self) -> NDArray[Any]:
        """The array itself, not to be written to."""
        view: NDArray[Any] = self.__dict__["_view"]
        return view

    def numpy(self) -> NDArray[Any]:
        return self.view.copy()  # some strategies compute in place

    @property
    def data(self) -> bytes:  # type: ignore[override]  # a field in Flower's, made anew here
        file = io.BytesIO()
        np.save(file, self.view, allow_pickle=False)
        return file.getvalue()


def look_at(array: flwr.app.Array) -> NDArray[Any]:
    """An array's values, not to be written to; copied only if they must be."""
    return array.view if isinstance(array, Array) else array.numpy()


def from_weights(weights: Mapping[str, NDArray[np.float32]]) -> ArrayRecord:
    """Named arrays as a record, in their order."""
    record = ArrayRecord()
    for name, value in weights.items():  # one by one: given a dict, Flower makes Arrays of its own kind
        record[name] = Array(np.asarray(value))
    return record


def to_weights(record: ArrayRecord) -> dict[str, NDArray[np.float32]]:
    """A record as named arrays, in its order, each of whatever type it has."""
    return {name: look_at(array) for name, array in record.items()}


def from_update(update: Update) -> RecordDict:
    """An update as a message's content."""
    metrics = MetricRecord({WEIGHT: update.weight})
    if update.loss is not None:
        metrics[LOSS] = update.loss
    return RecordDict({ARRAYS: from_weights(update.weights), METRICS: metrics})


def to_update(content: RecordDict) -> Update:
    """The update in a message's content, which was admitted or is our own: it has one number for each metric."""
    metrics = content.metric_records[METRICS]
    loss = metrics.get(LOSS)
    return Update(
        weights=to_weights(content.array_records[ARRAYS]),
        weight=float(metrics[WEIGHT]),  # type: ignore[arg-type]
        loss=None if loss is None else float(loss),  # type: ignore[arg-type]
    )


def add_energy(content: RecordDict, energy: Energy) -> None:
    """Adds what a task took to its answer."""
    metrics = content.metric_records[METRICS]
    metrics[JOULES], metrics[GRAMS] = energy.joules, energy.grams


def energy_of(content: RecordDict) -> Energy | None:
    """What a task took, by an answer that was admitted or is our own; None if it does not say."""
    metrics = content.metric_records[METRICS]
    if JOULES not in metrics:
        return None
    return Energy(joules=float(metrics[JOULES]), grams=float(metrics[GRAMS]))  # type: ignore[arg-type]


def add_name(content: RecordDict, name: str) -> None:
    """Adds to an answer what its client calls itself."""
    content[CLIENT] = ConfigRecord({NAME: name})


def take_name(content: RecordDict) -> str | None:
    """Removes from an answer what its client calls itself, if it says so. It may be any text at all."""
    record = content.pop(CLIENT, None)
    said = record.get(NAME) if isinstance(record, ConfigRecord) else None
    return said if isinstance(said, str) else None


def weight_of(content: RecordDict) -> float:
    """How many rows an answer says it is of."""
    weight = content.metric_records[METRICS][WEIGHT]
    assert not isinstance(weight, list), "admitted answers have one number"
    return float(weight)
