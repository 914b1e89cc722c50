"""What a model is trained for: losses over rows, and metrics derived from counts.

Evaluation never sends a metric: it sends counts, which can be summed over clients and can carry noise with a
known sensitivity. Two kinds, by the schema's target:
    classes  the confusion matrix [true, predicted], flattened; one row adds 1 to one cell: L2 sensitivity 1
    number   (rows, sum of |error|, sum of error^2) with errors in the scaled target's [0, 1]; one row adds at
             most (1, 1, 1): L2 sensitivity sqrt(3)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from common.schema import Classes, Schema

Counts = NDArray[np.float64]
Metrics = dict[str, Any]

SCORING_BATCH = 65_536  # rows


def row_losses(logits: Tensor, y: Tensor, loss: str) -> Tensor:
    """Loss of each row: [batch, outputs], [batch] -> [batch]."""
    if loss == "cross_entropy":
        return functional.cross_entropy(logits, y, reduction="none")
    if loss == "binary_cross_entropy":
        return functional.binary_cross_entropy_with_logits(logits[:, 0], y.to(logits.dtype), reduction="none")
    return functional.mse_loss(logits[:, 0], y.to(logits.dtype), reduction="none")


def predictions(logits: Tensor, loss: str) -> Tensor:
    """Class indices [batch], or for mse the scaled target in [0, 1] [batch]."""
    if loss == "cross_entropy":
        return logits.argmax(dim=1)
    if loss == "binary_cross_entropy":
        return (logits[:, 0] > 0).to(torch.int64)
    return logits[:, 0].clamp(0.0, 1.0)


def count_size(schema: Schema) -> int:
    """How many numbers `counts` returns."""
    return schema.outputs**2 if isinstance(schema.target, Classes) else 3


def count_sensitivity(schema: Schema) -> float:
    """L2 distance by which one row can move `counts`."""
    return 1.0 if isinstance(schema.target, Classes) else math.sqrt(3.0)


def rows_of(total: Counts, schema: Schema) -> float:
    """How many rows were counted."""
    return float(total.sum() if isinstance(schema.target, Classes) else total[0])


def counts(predicted: Tensor, y: Tensor, schema: Schema) -> Counts:
    """Exact counts of one table, float64 [count_size]. An empty table gives zeros."""
    if isinstance(schema.target, Classes):
        k = schema.outputs
        return np.bincount((y * k + predicted).cpu().numpy(), minlength=k * k).astype(np.float64)
    error = (predicted.double() - y.double()).abs()
    # A model can put out NaN; an error of 1, the largest there is, keeps the sensitivity true.
    error = torch.nan_to_num(error, nan=1.0)
    return np.array([len(y), error.sum().item(), (error**2).sum().item()])


@torch.no_grad()
def score(model: nn.Module, x: Tensor, y: Tensor, *, schema: Schema, loss: str) -> Counts:
    """Exact counts of the model on a table. Leaves the model in evaluation mode."""
    model.eval()
    total = np.zeros(count_size(schema))
    for start in range(0, len(y), SCORING_BATCH):
        chunk = slice(start, start + SCORING_BATCH)
        total += counts(predictions(model(x[chunk]), loss), y[chunk], schema)
    return total


def metrics(total: Counts, schema: Schema) -> Metrics:
    """Metrics from counts that may carry noise: negative counts are read as 0 (post-processing).

    Classes: accuracy; precision, recall and f1 as the mean over classes (macro), and `per_class`. A ratio
    whose denominator is 0 is 0. Number: mse and mae in the target's own unit.
    """
    total = np.clip(np.nan_to_num(np.asarray(total, np.float64)), 0.0, None)
    if not isinstance(schema.target, Classes):
        low, high = schema.target.bounds
        rows = max(total[0], 1.0)
        return {
            "mae": float(total[1] / rows * (high - low)),
            "mse": float(total[2] / rows * (high - low) ** 2),
        }
    confusion = total.reshape(schema.outputs, schema.outputs)
    hits = np.diag(confusion)
    precision = _ratio(hits, confusion.sum(axis=0))
    recall = _ratio(hits, confusion.sum(axis=1))
    f1 = _ratio(2 * precision * recall, precision + recall)
    result: Metrics = {
        "accuracy": float(_ratio(hits.sum(), confusion.sum())),
        "precision": float(precision.mean()),
        "recall": float(recall.mean()),
        "f1": float(f1.mean()),
    }
    result["per_class"] = {
        label: {"precision": float(precision[i]), "recall": float(recall[i]), "f1": float(f1[i])}
        for i, label in enumerate(schema.target.classes)
    }
    return result


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros_like(np.asarray(whole, np.float64)), where=np.asarray(whole) > 0)
