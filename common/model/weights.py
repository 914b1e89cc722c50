"""A model's weights as named arrays, which is how they travel, are aggregated and are stored.

`layers.0.weight` [out, in], `layers.0.bias` [out], and so on, in the order of the layers. Nothing here needs torch,
so a server without it starts in a third of the time and takes a third of the memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.document.federation import Federation

Weights = dict[str, NDArray[np.float32]]


def initial_weights(federation: Federation, *, seed: int | None = None) -> Weights:
    """The model's first weights, drawn from `seed` (the federation's own by default).

    Uniform in +-1 / sqrt(inputs of the layer), weights and biases alike, as torch draws them for a linear layer.
    """
    rng = np.random.default_rng(federation.training.seed if seed is None else seed)
    weights: Weights = {}
    for i, (inputs, outputs) in enumerate(pairwise(federation.layer_sizes)):
        bound = 1 / math.sqrt(inputs)
        weights[f"layers.{i}.weight"] = rng.uniform(-bound, bound, (outputs, inputs)).astype(np.float32)
        weights[f"layers.{i}.bias"] = rng.uniform(-bound, bound, outputs).astype(np.float32)
    return weights


def check_fit(weights: Mapping[str, NDArray[Any]], federation: Federation) -> None:
    """Raises `ValueError` unless the arrays are float32, and of the names and shapes of the federation's model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (inputs, outputs) in enumerate(pairwise(federation.layer_sizes)):
        shapes |= {f"layers.{i}.weight": (outputs, inputs), f"layers.{i}.bias": (outputs,)}
    if {name: array.shape for name, array in weights.items()} != shapes:
        raise ValueError("names or shapes of the arrays are not those of the federation's model")
    if any(array.dtype != np.float32 for array in weights.values()):
        raise ValueError("weights are float32")


def is_finite(weights: Mapping[str, NDArray[np.float32]]) -> bool:
    """Is every number finite?"""
    return all(bool(np.isfinite(array).all()) for array in weights.values())


def between(start: Mapping[str, NDArray[np.float32]], end: Mapping[str, NDArray[np.float32]], part: float) -> Weights:
    """The weights so much of the way from `start` to `end`: 0 is the one, 1 the other, exactly."""
    if part == 1.0:
        return {name: np.array(array, np.float32) for name, array in end.items()}
    moved: Weights = {}
    for name, array in start.items():
        from_ = array.astype(np.float64)
        moved[name] = (from_ + part * (end[name].astype(np.float64) - from_)).astype(np.float32)
    return moved


def flat_of(weights: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """All numbers, [parameters]: the arrays one after another, in their order."""
    return np.concatenate([np.ravel(array) for array in weights.values()])


def of_flat(flat: NDArray[Any], like: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """What `flat_of` was given, in the names and shapes of `like`; it shares the memory and type of `flat`."""
    parts = np.split(flat, np.cumsum([array.size for array in like.values()])[:-1])
    return {name: part.reshape(array.shape) for part, (name, array) in zip(parts, like.items(), strict=True)}
