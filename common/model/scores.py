"""Counts that clients send when they evaluate, and the metrics that derive from them.

Evaluation never sends a metric: it sends counts, which can be summed over clients and can carry noise with a
known sensitivity. Two kinds, by the schema's target:
    classes  the confusion matrix [true, predicted], flattened; one row adds 1 to one cell: L2 sensitivity 1
    number   (rows, sum of |error|, sum of error^2) with errors in the scaled target's [0, 1]; one row adds at
             most (1, 1, 1): L2 sensitivity sqrt(3)
A row adds multiples of 2^-20 (an error is rounded before it is added), and noise is on the same grid. So what leaves
is a function of integers, and has no bits that a float's addition left behind.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.document.schema import Classes, Schema

COUNT_UNIT = 2.0**-20
MOST_CLASSES = 10  # of which a confusion matrix is told

Counts = NDArray[np.float64]
Scores = dict[str, Any]


def count_size(schema: Schema) -> int:
    """How many numbers `counts` returns."""
    return schema.outputs**2 if isinstance(schema.target, Classes) else 3


def count_sensitivity(schema: Schema) -> float:
    """L2 distance by which one row can move `counts`."""
    return 1.0 if isinstance(schema.target, Classes) else math.sqrt(3.0)


def rows_of(total: Counts, schema: Schema) -> float:
    """How many rows were counted."""
    return float(total.sum() if isinstance(schema.target, Classes) else total[0])


def scores_of(total: Counts, schema: Schema) -> Scores:
    """Metrics from counts that may carry noise: negative counts are read as 0 (post-processing).

    `rows` is how many were counted. Classes: accuracy; precision, recall and f1 as the mean over classes (macro), and
    `per_class`; the `confusion` matrix [true][predicted] of not too many. A class that no row has and that is never
    predicted has none of the three, and is not in the mean; otherwise a ratio whose denominator is 0 is 0. Number: mae,
    mse (its square) and rmse in the target's own unit, and `scaled`: mae and mse as the model is trained, by the range
    between the target's bounds. Where no row was counted there are no metrics.
    """
    total = np.nan_to_num(np.asarray(total, np.float64))
    if rows_of(total, schema) <= 0:
        return {}
    total = np.clip(total, 0.0, None)
    if not isinstance(schema.target, Classes):
        low, high = schema.target.bounds
        mae, mse = (float(part / max(total[0], 1.0)) for part in total[1:])
        return {
            "mae": mae * (high - low),
            "mse": mse * (high - low) ** 2,
            "rmse": math.sqrt(mse) * (high - low),
            "scaled": {"mae": mae, "mse": mse},
            "rows": float(total[0]),
        }
    confusion = total.reshape(schema.outputs, schema.outputs)
    hits, predicted, true = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    met = predicted + true > 0
    precision, recall = _ratio(hits, predicted), _ratio(hits, true)
    of_class = {"precision": precision, "recall": recall, "f1": _ratio(2 * precision * recall, precision + recall)}
    return {
        "accuracy": float(_ratio(hits.sum(), confusion.sum())),
        **{name: float(values[met].mean()) for name, values in of_class.items()},
        "per_class": {
            label: {name: float(values[i]) if met[i] else None for name, values in of_class.items()}
            for i, label in enumerate(schema.target.classes)
        },
        "rows": float(confusion.sum()),
        **({"confusion": confusion.round(3).tolist()} if schema.outputs <= MOST_CLASSES else {}),
    }


def headlines_of(totals: Counts, schema: Schema) -> Counts:
    """The figure that says most, accuracy or mae in the target's unit, of several counts: [clients, count_size] ->
    [clients]. NaN where no row was counted."""
    totals = np.clip(np.nan_to_num(np.asarray(totals, np.float64)), 0.0, None)
    if isinstance(schema.target, Classes):
        k = schema.outputs
        part, whole = totals[:, :: k + 1].sum(axis=1), totals.sum(axis=1)
    else:
        low, high = schema.target.bounds
        part, whole = totals[:, 1] * (high - low), totals[:, 0]
    shares: Counts = np.divide(part, whole, out=np.full(len(totals), np.nan), where=whole > 0)
    return shares


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros_like(np.asarray(whole, np.float64)), where=np.asarray(whole) > 0)
