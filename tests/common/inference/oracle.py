"""The small federation's model by hand: what it should make of a row, in plain numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.inference.saved import SavedModel


def logits(model: SavedModel, a: float, b: float, c: str) -> NDArray[np.float64]:
    """Of one row, float64. Both bounds are [-1, 1], so that a scaled number is the clamped one."""
    x = np.array([np.clip(a, -1, 1), np.clip(b, -1, 1), c == "red", c == "green", c not in ("red", "green")], float)
    w = {name: array.astype(np.float64) for name, array in model.weights.items()}
    hidden = np.maximum(w["layers.0.weight"] @ x + w["layers.0.bias"], 0)
    out: NDArray[np.float64] = w["layers.1.weight"] @ hidden + w["layers.1.bias"]
    return out


def softmax(z: NDArray[np.float64]) -> NDArray[np.float64]:
    raised = np.exp(z - z.max())
    whole: NDArray[np.float64] = raised / raised.sum()
    return whole
