"""A strategy's name and parameters to Flower's Strategy, to one of ours (agnostic.py), or to one that a package brings
(installed.py).

Which clients a round asks is the round loop's decision (server/rounds/loop.py), so that sampling is reproducible
and no strategy waits or draws on its own: here every strategy asks all nodes of the grid it is given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from common.document.federation import Federation
from common.document.strategy import Installed
from common.wire.records import LOSS
from server.rounds import installed
from server.rounds.agnostic import Agnostic

CLASSES: dict[str, type[flower.FedAvg]] = {
    "fedavg": flower.FedAvg,
    "fedavgm": flower.FedAvgM,
    "fedadam": flower.FedAdam,
    "fedadagrad": flower.FedAdagrad,
    "fedyogi": flower.FedYogi,
    "fedprox": flower.FedProx,
    "fedmedian": flower.FedMedian,
    "fedtrimmedavg": flower.FedTrimmedAvg,
    "krum": flower.Krum,
    "multikrum": flower.MultiKrum,
    "bulyan": flower.Bulyan,
    "qfedavg": flower.QFedAvg,
    "agnostic": Agnostic,
}
_OURS = {
    "name",
    "fraction",
    "min_clients",
    "over_selection",
    "round_timeout",
    "max_failed_rounds",
    "schedule",
    "average",
}
_ASKS_ALL: dict[str, Any] = {
    "fraction_train": 1.0,
    "fraction_evaluate": 1.0,
    "min_train_nodes": 1,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
}
# What some strategies keep from round to round, besides the model.
_MOMENTS = ("m_t", "v_t", "momentum_vector", "mixture", "memory")


def build(federation: Federation) -> Strategy:
    """The Flower strategy that the document names, with its parameters. Raises `ConfigError` if it is one that a
    package should bring, and no package does."""
    chosen = federation.strategy
    if isinstance(chosen, Installed):
        return installed.build(chosen, **_ASKS_ALL)
    parameters: dict[str, Any] = chosen.model_dump(exclude=_OURS)
    if chosen.name == "qfedavg":
        parameters |= {"client_learning_rate": federation.training.learning_rate, "train_loss_key": LOSS}
    return CLASSES[chosen.name](**_ASKS_ALL, **parameters)


Memory = dict[str, NDArray[Any]]


def memory(strategy: Strategy) -> Memory:
    """What the strategy remembers of earlier rounds, as named arrays; empty before the first."""
    kept: Memory = {}
    for name in _MOMENTS:
        value = getattr(strategy, name, None)
        items = value.items() if isinstance(value, dict) else enumerate(value or [])
        kept |= {f"{name}/{key}": np.asarray(array) for key, array in items}
    return kept


def restore(strategy: Strategy, kept: Memory) -> None:
    """Makes the strategy remember what `memory` gave."""
    for name in _MOMENTS:
        if not hasattr(strategy, name):
            continue
        mine = {key.removeprefix(f"{name}/"): array for key, array in kept.items() if key.startswith(f"{name}/")}
        value: Any = mine if name != "momentum_vector" else [mine[str(i)] for i in range(len(mine))]
        setattr(strategy, name, value or None)


def begin_round(strategy: Strategy, *, client_rate: float) -> None:
    """Lets the strategy take the model from its next `configure_train`, and know the clients' learning rate.

    FedAvgM would go on from the model that it made itself, also after that was discarded, or rounded, or when it was
    another process that made it. QFedAvg divides updates by the rate.
    """
    if hasattr(strategy, "current_arrays"):
        strategy.current_arrays = None
    if hasattr(strategy, "client_learning_rate"):
        strategy.client_learning_rate = client_rate
