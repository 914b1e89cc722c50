"""What a model is trained for: losses over rows, and the counts of how it does (common/model/scores.py)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from common.document.schema import Classes, Schema
from common.model.scores import COUNT_UNIT, Counts, count_size

SCORING_BATCH = 65_536  # rows


def row_losses(logits: Tensor, y: Tensor, loss: str) -> Tensor:
    """Loss of each row: [batch, outputs], [batch] -> [batch].

    Raises:
        ValueError: a loss that is not known, or labels of another shape, which would be broadcast, and rows mixed.
    """
    _check_shapes(logits[:, 0], y)
    if loss == "cross_entropy":
        return functional.cross_entropy(logits, y, reduction="none")
    if loss == "binary_cross_entropy":
        return functional.binary_cross_entropy_with_logits(logits[:, 0], y.to(logits.dtype), reduction="none")
    if loss == "mse":
        return functional.mse_loss(logits[:, 0], y.to(logits.dtype), reduction="none")
    raise _unknown(loss)


def predictions(logits: Tensor, loss: str) -> Tensor:
    """Class indices [batch], or for mse the scaled target in [0, 1] [batch]. Raises `ValueError` for another loss."""
    if loss == "cross_entropy":
        return logits.argmax(dim=1)
    if loss == "binary_cross_entropy":
        return (logits[:, 0] > 0).to(torch.int64)
    if loss == "mse":
        return logits[:, 0].clamp(0.0, 1.0)
    raise _unknown(loss)


def counts(predicted: Tensor, y: Tensor, schema: Schema) -> Counts:
    """Exact counts of one table, multiples of `COUNT_UNIT`, float64 [count_size]. An empty table gives zeros.

    Raises `ValueError` unless there is one prediction [rows] for each label [rows].
    """
    _check_shapes(predicted, y)
    if isinstance(schema.target, Classes):
        k = schema.outputs
        return np.bincount((y * k + predicted).cpu().numpy(), minlength=k * k).astype(np.float64)
    return np.array([part.sum() for part in errors_of_rows(predicted, y)])


def errors_of_rows(predicted: Tensor, y: Tensor) -> list[Counts]:
    """What each row [rows] adds to the counts of numbers: 1, its error and the error's square."""
    error = (predicted.double() - y.double()).abs()  # a subnormal float, whatever becomes of it, is far below a unit
    # A model can put out NaN; an error of 1, the largest there is, keeps the sensitivity true.
    error = torch.nan_to_num(error, nan=1.0)
    # Each row's is rounded by itself: sums of multiples of one unit are exact, in whatever order they are added.
    rounded = [((part / COUNT_UNIT).round() * COUNT_UNIT).cpu().numpy() for part in (error, error * error)]
    return [np.ones(len(y)), *rounded]


def _unknown(loss: str) -> ValueError:
    return ValueError(f"loss must be cross_entropy, binary_cross_entropy or mse, got {loss!r}")


def _check_shapes(each: Tensor, y: Tensor) -> None:
    if each.shape != y.shape:
        raise ValueError(f"y must have one number for each row, {list(each.shape)}, got {list(y.shape)}")


@torch.no_grad()
def score(model: nn.Module, x: Tensor, y: Tensor, *, schema: Schema, loss: str) -> Counts:
    """Exact counts of the model on a table. Leaves the model in evaluation mode."""
    model.eval()
    total = np.zeros(count_size(schema))
    for start in range(0, len(y), SCORING_BATCH):
        chunk = slice(start, start + SCORING_BATCH)
        total += counts(predictions(model(x[chunk]), loss), y[chunk], schema)
    return total
