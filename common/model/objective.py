"""What a model is trained for: losses over rows, and the counts of how it does (common/model/scores.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from common.document.heads import Head, Loss
from common.document.schema import Classes, Schema
from common.model.scores import COUNT_UNIT, Counts, count_size, is_calibrated, task_size

SCORING_BATCH = 65_536  # rows


def parts_of(logits: Tensor, y: Tensor, heads: Sequence[Head]) -> Iterator[tuple[Head, Tensor, Tensor, Tensor]]:
    """Each head, its logits [..., width], its targets [...], which are 0 where there is none, and where there is one.

    Args:
        logits: [..., outputs].
        y: [..., targets], classes as numbers; NaN where a row has no such target.
    """
    for i, (head, out) in enumerate(zip(heads, torch.split(logits, [head.width for head in heads], -1), strict=True)):
        own = y[..., i]
        is_there = ~own.isnan()
        filled = torch.where(is_there, own, 0.0)
        yield head, out, filled if head.loss == "mse" else filled.to(torch.int64), is_there


def row_losses(logits: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """Loss of each row: [batch, outputs], [batch] -> [batch]. Of several targets, `y` [batch, targets] as `parts_of`
    has it, the weighted sum over those that a row has.

    Raises:
        ValueError: a loss that is not known, or labels of another shape, which would be broadcast, and rows mixed.
    """
    if not isinstance(loss, str):
        _check_shapes(logits[:, :1].expand(-1, len(loss)), y)
        parts = parts_of(logits, y, loss)
        of_heads = (
            head.weight * torch.where(has, row_losses(out, own, head.loss), 0.0) for head, out, own, has in parts
        )
        return torch.stack(list(of_heads)).sum(0)
    _check_shapes(logits[:, 0], y)
    if loss == "cross_entropy":
        return functional.cross_entropy(logits, y, reduction="none")
    if loss == "binary_cross_entropy":
        return functional.binary_cross_entropy_with_logits(logits[:, 0], y.to(logits.dtype), reduction="none")
    if loss == "mse":
        return functional.mse_loss(logits[:, 0], y.to(logits.dtype), reduction="none")
    raise _unknown(loss)


def predictions(logits: Tensor, loss: Loss) -> Tensor:
    """Class indices [batch], or for mse the scaled target in [0, 1] [batch]; of several targets both, float64 [batch,
    targets]. Raises `ValueError` for another loss."""
    if not isinstance(loss, str):
        outs = torch.split(logits, [head.width for head in loss], -1)
        return torch.stack([predictions(out, head.loss).double() for head, out in zip(loss, outs, strict=True)], -1)
    if loss == "cross_entropy":
        return logits.argmax(dim=1)
    if loss == "binary_cross_entropy":
        return (logits[:, 0] > 0).to(torch.int64)
    if loss == "mse":
        return logits[:, 0].clamp(0.0, 1.0)
    raise _unknown(loss)


def confidences(logits: Tensor, loss: Loss) -> Tensor | None:
    """How probable the model finds the class that it predicts, float64 [batch]; None for mse. Of several targets
    [batch, targets], NaN for mse."""
    if not isinstance(loss, str):
        return sure_of_each(logits, loss, confidences)
    if loss == "mse":
        return None
    if loss == "binary_cross_entropy":
        return torch.sigmoid(logits[:, 0].double().abs())
    return torch.softmax(logits.double(), dim=1).amax(dim=1)


def sure_of_each(logits: Tensor, heads: Sequence[Head], confidence: Callable[[Tensor, str], Tensor | None]) -> Tensor:
    """`confidence` of each head's logits, float64 [..., heads]; NaN where it is None."""
    outs = torch.split(logits, [head.width for head in heads], -1)
    found = (confidence(out, head.loss) for head, out in zip(heads, outs, strict=True))
    none = torch.full(logits.shape[:-1], math.nan, dtype=torch.float64, device=logits.device)
    return torch.stack([none if each is None else each for each in found], -1)


@dataclass(frozen=True)
class Added:
    """What rows add to counts: each adds `amounts` [parts, rows] to the counts at `cells` [parts, rows]."""

    cells: NDArray[np.int64]
    amounts: Counts

    def total(self, size: int) -> Counts:
        """Their sum, [size]. Sums of multiples of one unit are exact, in whatever order they are added."""
        return np.bincount(self.cells.ravel(), self.amounts.ravel(), minlength=size).astype(np.float64, copy=False)


def added(
    predicted: Tensor, y: Tensor, schema: Schema, *, group: Tensor | None = None, confidence: Tensor | None = None
) -> Added:
    """What each row adds to the counts of `common.model.scores`, in multiples of `COUNT_UNIT`.

    Args:
        predicted: class indices [rows], or numbers [rows]; of several targets both, [rows, targets].
        y: the same of what is true; of several targets NaN where a row has none, and then it adds nothing.
        group: each row's group [rows], where the schema declares a group's column.
        confidence: `confidences`, where it counts classes' calibration too.

    Raises:
        ValueError: not one prediction for each label, or not what the schema asks for.
    """
    _check_shapes(predicted, y)
    if (schema.group is not None) != (group is not None):
        raise ValueError("rows must have groups where the schema declares a group's column, and only there")
    cells: list[NDArray[np.int64]] = []
    amounts: list[Counts] = []
    start = 0
    for i, task in enumerate(schema.tasks):
        found, true, sure = predicted, y, confidence
        if schema.also:
            has = ~y[:, i].isnan()
            found, true = (torch.where(has, each[:, i], 0.0) for each in (predicted, y))
            sure = None if confidence is None else confidence[:, i]
        of_task = _added_to(task, found, true, sure)
        cells += [start + each for each in of_task.cells]
        amounts += [each * has.cpu().numpy() if schema.also else each for each in of_task.amounts]
        start += task_size(task)
    where = np.stack(cells)
    if group is not None:
        _check_shapes(group, y if y.dim() == 1 else y[:, 0])
        where = where + group.cpu().numpy() * start
    return Added(where, np.stack(amounts))


def _added_to(task: Schema, predicted: Tensor, y: Tensor, confidence: Tensor | None) -> Added:
    """What each row adds to the counts of one target, which begin at 0."""
    classes = isinstance(task.target, Classes)
    if classes:
        where = y.to(torch.int64) * task.outputs + predicted.to(torch.int64)
        cells, amounts = [where.cpu().numpy()], [np.ones(len(y))]
    else:
        cells, amounts = [np.full(len(y), i, np.int64) for i in range(3)], errors_of_rows(predicted, y)
    if is_calibrated(task):
        cells.append(np.full(len(y), task.target.counts, np.int64))
        share = confidence if classes else (1 + predicted.double() - y.double()) / 2
        if share is None:
            raise ValueError("calibration needs the confidences of predictions")
        _check_shapes(share, y)
        amounts.append(_in_units(torch.nan_to_num(share.double(), nan=1.0).clamp(0.0, 1.0)))
    return Added(np.stack(cells), np.stack(amounts))


def counts(
    predicted: Tensor, y: Tensor, schema: Schema, *, group: Tensor | None = None, confidence: Tensor | None = None
) -> Counts:
    """Exact counts of one table, float64 [count_size]; arguments as for `added`. An empty table gives zeros."""
    return added(predicted, y, schema, group=group, confidence=confidence).total(count_size(schema))


def errors_of_rows(predicted: Tensor, y: Tensor) -> list[Counts]:
    """What each row [rows] adds to the counts of numbers: 1, its error and the error's square."""
    error = (predicted.double() - y.double()).abs()  # a subnormal float, whatever becomes of it, is far below a unit
    # A model can put out NaN; an error of 1, the largest there is, keeps the sensitivity true.
    error = torch.nan_to_num(error, nan=1.0)
    return [np.ones(len(y)), *(_in_units(part) for part in (error, error * error))]


def _in_units(amounts: Tensor) -> Counts:
    """Each row's by itself."""
    rounded: Counts = ((amounts / COUNT_UNIT).round() * COUNT_UNIT).cpu().numpy()
    return rounded


def _unknown(loss: str) -> ValueError:
    return ValueError(f"loss must be cross_entropy, binary_cross_entropy or mse, got {loss!r}")


def _check_shapes(each: Tensor, y: Tensor) -> None:
    if each.shape != y.shape:
        raise ValueError(f"y must have one number for each row, {list(each.shape)}, got {list(y.shape)}")


@torch.no_grad()
def score(model: nn.Module, x: Tensor, y: Tensor, *, schema: Schema, loss: Loss, group: Tensor | None = None) -> Counts:
    """Exact counts of the model on a table; `group` as for `added`. Leaves the model in evaluation mode."""
    model.eval()
    total = np.zeros(count_size(schema))
    for start in range(0, len(y), SCORING_BATCH):
        chunk = slice(start, start + SCORING_BATCH)
        logits = model(x[chunk])
        sure = confidences(logits, loss) if is_calibrated(schema) else None
        groups = None if group is None else group[chunk]
        total += counts(predictions(logits, loss), y[chunk], schema, group=groups, confidence=sure)
    return total
