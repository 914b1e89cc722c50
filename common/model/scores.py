"""Counts that clients send when they evaluate, and the metrics that derive from them.

Evaluation never sends a metric: it sends counts, which can be summed over clients and can carry noise with a
known sensitivity. Two kinds, by the schema's target:
    classes  the confusion matrix [true, predicted], flattened; one row adds 1 to one cell: L2 sensitivity 1
    number   (rows, sum of |error|, sum of error^2) with errors in the scaled target's [0, 1]; one row adds at
             most (1, 1, 1): L2 sensitivity sqrt(3)
Where the schema declares a group's column, each group has such counts, one group's after another's, and a row adds to
those of its own alone, so that the sensitivity is the same. With `calibration` each group has one count more, of which
a row adds at most 1: how probable the model finds the class that it predicts, or (1 + prediction - target) / 2. The
sensitivity is then the root of 2, or of 4.
With several targets each group has such counts of one after another, and a row adds to those of the targets that it
has. The sensitivity is then the root of the sum of the targets' squares.
A row adds multiples of 2^-20 (an error is rounded before it is added), and noise is on the same grid. So what leaves
is a function of integers, and has no bits that a float's addition left behind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.document.schema import Classes, Schema
from common.model.gaps import FEW_ROWS, Figure, gaps

COUNT_UNIT = 2.0**-20
MOST_CLASSES = 10  # of which a confusion matrix is told
RECALL = "recall of "
SURELY = 3.0  # standard deviations of a group's noise, that its rows must exceed to be compared

Counts = NDArray[np.float64]
Scores = dict[str, Any]


def count_size(schema: Schema) -> int:
    """How many numbers `counts` returns."""
    return schema.counts


def task_size(task: Schema) -> int:
    """How many counts a group has of one target."""
    return task.target.counts + is_calibrated(task)


def is_calibrated(schema: Schema) -> bool:
    """Has each group one count more of each target?"""
    return schema.group is not None and schema.group.calibration


def count_sensitivity(schema: Schema) -> float:
    """L2 distance by which one row can move `counts`."""
    squares = ((1 if isinstance(target, Classes) else 3) + is_calibrated(schema) for target in schema.targets)
    return math.sqrt(sum(squares))


def rows_of(total: Counts, schema: Schema) -> float:
    """How many rows were counted; of several targets, those of the one that most have."""
    return max(_rows(by_group, task) for task, by_group in _by_task(total, schema))


def _is_class(task: Schema) -> bool:
    return isinstance(task.target, Classes)


def _rows(by_group: Counts, task: Schema) -> float:
    return float(by_group[:, : task.target.counts].sum() if isinstance(task.target, Classes) else by_group[:, 0].sum())


def scores_of(total: Counts, schema: Schema, *, noise: float = 0.0, few: int = FEW_ROWS) -> Scores:
    """Metrics from counts that may carry noise: negative counts are read as 0 (post-processing).

    `rows` is how many were counted. Classes: accuracy; precision, recall and f1 as the mean over classes (macro), and
    `per_class`; the `confusion` matrix [true][predicted] of not too many. A class that no row has and that is never
    predicted has none of the three, and is not in the mean; otherwise a ratio whose denominator is 0 is 0. Number: mae,
    mse (its square) and rmse in the target's own unit, and `scaled`: mae and mse as the model is trained, by the range
    between the target's bounds. Where no row was counted there are no metrics.

    Where the schema declares a group's column, `by` has for it each group's figures and the gaps between groups. Of
    several targets these are the first one's, and `tasks` has the others', by their names, with `rows` 0 alone where no
    row has it; where no row has the first there is nothing.

    Args:
        noise: standard deviation of each count's. Groups are compared by what is of more rows than chance makes of it.
        few: ... and of at least so many.
    """
    (first, its), *others = _by_task(np.nan_to_num(np.asarray(total, np.float64)), schema)
    scores = _scores_of_task(its, first, noise=noise, few=few)
    if scores and others:
        scores["tasks"] = {
            # Of no more rows than noise makes there are no figures.
            task.target.name: _scores_of_task(own, task, noise=noise, few=few)
            if _rows(own, task) > SURELY * noise * math.sqrt(len(own) * (task.target.counts if _is_class(task) else 1))
            else {"rows": 0.0}
            for task, own in others
        }
    return scores


def _scores_of_task(by_group: Counts, task: Schema, *, noise: float, few: int) -> Scores:
    if _rows(by_group, task) <= 0:
        return {}
    scores = _scores(by_group.sum(axis=0), task)
    if task.group is not None:
        groups = dict(zip(task.groups, by_group, strict=True))
        scores["by"] = {task.group.name: _compared(groups, task, noise=noise, few=few)}
    return scores


def gaps_between(
    clients: Mapping[str, Counts], schema: Schema, *, noise: float = 0.0, few: int = FEW_ROWS
) -> dict[str, dict[str, Any]]:
    """The gaps between several clients' counts, as `scores_of` has them between groups; of the first target."""
    together = {name: _by_task(total, schema)[0][1].sum(axis=0) for name, total in clients.items()}
    # Each of these sums has the noise of as many counts as there are groups.
    noise_of_sum = noise * math.sqrt(len(schema.groups))
    found: dict[str, dict[str, Any]] = _compared(together, schema.tasks[0], noise=noise_of_sum, few=few)["gaps"]
    return found


def _by_task(total: Counts, schema: Schema) -> list[tuple[Schema, Counts]]:
    """Each target's schema and counts, [..., groups, counts of a group], of [..., count_size]."""
    by_group = np.asarray(total).reshape(*np.shape(total)[:-1], len(schema.groups), -1)
    tasks = schema.tasks
    ends = np.cumsum([task_size(task) for task in tasks])[:-1].tolist()
    return list(zip(tasks, np.split(by_group, ends, axis=-1), strict=True))


def _scores(total: Counts, schema: Schema) -> Scores:
    """The metrics of one group, or of all rows together: [counts of a group]."""
    total = np.clip(total, 0.0, None)
    calibration = float(total[-1]) if is_calibrated(schema) else None
    if not isinstance(schema.target, Classes):
        return _scores_of_number(total, schema.target.bounds, calibration)
    confusion = total[: schema.target.counts].reshape(schema.outputs, schema.outputs)
    hits, predicted, true = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    met = predicted + true > 0
    precision, recall = _ratio(hits, predicted), _ratio(hits, true)
    of_class = {"precision": precision, "recall": recall, "f1": _ratio(2 * precision * recall, precision + recall)}
    rows = float(confusion.sum())
    accuracy = float(_ratio(hits.sum(), confusion.sum()))
    scores: Scores = {
        "accuracy": accuracy,
        **{name: float(values[met].mean()) if met.any() else 0.0 for name, values in of_class.items()},
        "per_class": {
            label: {name: float(values[i]) if met[i] else None for name, values in of_class.items()}
            for i, label in enumerate(schema.target.classes)
        },
        "rows": rows,
        **({"confusion": confusion.round(3).tolist()} if schema.outputs <= MOST_CLASSES else {}),
    }
    if calibration is not None:
        scores["overconfidence"] = calibration / rows - accuracy if rows else 0.0
    return scores


def _scores_of_number(total: Counts, bounds: tuple[float, float], calibration: float | None) -> Scores:
    span, rows = bounds[1] - bounds[0], max(float(total[0]), 1.0)
    mae, mse = (float(part / rows) for part in total[1:3])
    scores: Scores = {
        "mae": mae * span,
        "mse": mse * span**2,
        "rmse": math.sqrt(mse) * span,
        "scaled": {"mae": mae, "mse": mse},
        "rows": float(total[0]),
    }
    if calibration is not None:
        scores["bias"] = (2 * calibration / rows - 1) * span
    return scores


def _compared(groups: Mapping[str, Counts], task: Schema, *, noise: float, few: int) -> dict[str, Any]:
    """Each group's figures, and the gaps between those that are of enough rows."""
    shown: dict[str, Scores] = {}
    comparable: dict[str, dict[str, Figure]] = {}
    for name, counts in groups.items():
        rows, figures = _figures(counts, task)
        recalls = {figure.removeprefix(RECALL): its for figure, its in figures.items() if figure.startswith(RECALL)}
        shown[name] = {"rows": rows} | {n: value for n, (value, _) in figures.items() if not n.startswith(RECALL)}
        if isinstance(task.target, Classes):
            shown[name]["recall"] = {label: recall for label, (recall, _) in recalls.items()}
            shown[name]["rows_of_class"] = {label: n for label, (_, n) in recalls.items()}
        comparable[name] = {
            figure: Figure(value, noise_of_figure(figure, value, size, task, noise))
            for figure, (value, size) in figures.items()
            if figure != "rmse" and are_enough(figure, size, task, noise=noise, few=few)
        }
    return {"groups": shown, "gaps": gaps(comparable)}


def are_enough(figure: str, rows: float, task: Schema, *, noise: float, few: int) -> bool:
    """Are so many rows enough for a figure to be compared? Their number is a sum of noisy counts, and may be noise."""
    counts = 1 if not _is_class(task) else task.outputs if figure.startswith(RECALL) else task.target.counts
    return rows >= few and rows > SURELY * noise * math.sqrt(counts)


def _figures(counts: Counts, task: Schema) -> tuple[float, dict[str, tuple[float, float]]]:
    """The rows of one group or client, and its figures, each with how many rows it is of.

    Sums are of the counts as they are, and only what comes of them is brought to where it can be: were the negative
    ones of a group without rows taken as 0, its noise would look like rows, the more the more classes there are.
    """
    figures: dict[str, tuple[float, float]] = {}

    def add(name: str, part: float, size: float, *, low: float = 0.0, scale: float = 1.0) -> None:
        if size > 0:
            figures[name] = (min(max(part / size, low), 1.0) * scale, size)

    if isinstance(task.target, Classes):
        confusion = counts[: task.target.counts].reshape(task.outputs, task.outputs)
        rows, hits = float(confusion.sum()), float(np.trace(confusion))
        add("accuracy", hits, rows)
        if is_calibrated(task):
            add("overconfidence", float(counts[-1]) - hits, rows, low=-1.0)
        for label, hit, of_class in zip(task.target.classes, np.diag(confusion), confusion.sum(axis=1), strict=True):
            add(f"{RECALL}{label}", float(hit), float(of_class))
    else:
        rows, span = float(counts[0]), task.target.bounds[1] - task.target.bounds[0]
        add("mae", float(counts[1]), rows, scale=span)
        if rows > 0:
            figures["rmse"] = (math.sqrt(min(max(float(counts[2]) / rows, 0.0), 1.0)) * span, rows)
        if is_calibrated(task):
            add("bias", 2 * float(counts[3]) - rows, rows, low=-1.0, scale=span)
    return max(rows, 0.0), figures


def noise_of_figure(name: str, value: float, rows: float, schema: Schema, noise: float) -> float:
    """Standard deviation of a figure of `rows` rows, where each count has independent noise of deviation `noise`.

    To first order, with T the number of rows. Accuracy a is k of k^2 counts over all of them: noise^2 / T^2
    (k - 2 a k + a^2 k^2). A class's recall r is one of k counts over all of them: (1 - 2 r + r^2 k). Overconfidence v
    is one count less k of k^2, over these: 1 + k (1 + v)^2 + (k^2 - k) v^2. A scaled mean error m is one count over
    another: 1 + m^2; and so is the bias b, doubled: 4 + (1 + b)^2.
    """
    if noise <= 0 or rows <= 0:
        return 0.0
    k, target = schema.outputs, schema.target
    if isinstance(target, Classes):
        v = value
        if name == "accuracy":
            square = k - 2 * v * k + (v * k) ** 2
        elif name == "overconfidence":
            square = 1 + k * (1 + v) ** 2 + (k * k - k) * v**2
        else:
            square = 1 - 2 * v + v**2 * k
        return noise / rows * math.sqrt(max(square, 0.0))
    span = target.bounds[1] - target.bounds[0]
    v = value / span
    return noise / rows * math.sqrt(4 + (1 + v) ** 2 if name == "bias" else 1 + v**2) * span


def headlines_of(totals: Counts, schema: Schema) -> Counts:
    """The figure that says most, accuracy or mae in the (first) target's unit, of several counts: [clients,
    count_size] -> [clients]. NaN where no row was counted."""
    totals = _by_task(np.nan_to_num(np.asarray(totals, np.float64)), schema)[0][1].sum(axis=1)
    if isinstance(schema.target, Classes):
        cells, scale = totals[:, : schema.target.counts], 1.0
        part, whole = cells[:, :: schema.outputs + 1].sum(axis=1), cells.sum(axis=1)
    else:
        low, high = schema.target.bounds
        part, whole, scale = totals[:, 1], totals[:, 0], high - low
    shares = np.divide(part, whole, out=np.full(len(totals), np.nan), where=whole > 0)
    found: Counts = np.clip(shares, 0.0, 1.0) * scale
    return found


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros_like(np.asarray(whole, np.float64)), where=np.asarray(whole) > 0)
