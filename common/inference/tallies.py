"""Rows added up, and the figures that come of them: metrics, confusion and calibration."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.document.schema import Classes, NumericTarget, Schema
from common.inference.predictor import Outputs
from common.model.scores import scores_of

BINS = 10
Z = 1.959964  # of a 95 % interval
LEAST_PROBABILITY = 1e-15  # in a logarithm, as scikit-learn takes it

Scores = dict[str, Any]


class Tally(Protocol):
    """Rows added up."""

    @property
    def rows(self) -> int: ...

    def add(self, outputs: Outputs, y: NDArray[Any]) -> None:
        """Adds rows: a model's outputs (`Predictor.outputs`), and encoded targets [rows]."""

    def scores(self) -> Scores:
        """Every figure of them."""

    def compared(self) -> tuple[dict[str, Any], dict[str, tuple[float, int]]]:
        """What a group is shown with, and those of its figures by which groups are compared, each with how many rows it
        is of."""


def tally_of(schema: Schema) -> Tally:
    """An empty one, for the schema's target."""
    return NumberTally(schema.target) if isinstance(schema.target, NumericTarget) else ClassTally(schema)


class ClassTally:
    """For classes. Calibration is that of the predicted class's probability (Guo et al. 2017, "On Calibration of Modern
    Neural Networks"); the Brier score of two classes is the squared error of one's probability, of more the sum over
    all, as scikit-learn has it."""

    def __init__(self, schema: Schema) -> None:
        assert isinstance(schema.target, Classes)
        self._schema, self.classes = schema.ungrouped, list(schema.target.classes)
        k = len(self.classes)
        self.confusion = np.zeros((k, k), np.int64)  # [true, predicted]
        self._brier = self._log = 0.0
        self._bins = np.zeros((BINS, 3))  # rows, summed probability, hits
        self._positive: list[tuple[NDArray[np.float32], NDArray[np.bool_]]] = []  # of two classes

    @property
    def rows(self) -> int:
        return int(self.confusion.sum())

    def add(self, outputs: Outputs, y: NDArray[Any]) -> None:
        k = len(self.classes)
        predicted = outputs.argmax(axis=1)
        self.confusion += np.bincount(y * k + predicted, minlength=k * k).reshape(k, k)
        true = outputs[np.arange(len(y)), y]
        squares = (outputs * outputs).sum(axis=1) - 2 * true + 1
        self._brier += float(squares.sum()) / (2 if k == 2 else 1)
        self._log -= float(np.log(np.clip(true, LEAST_PROBABILITY, 1)).sum())
        confidence = outputs[np.arange(len(y)), predicted]
        place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
        for column, weights in enumerate((np.ones(len(y)), confidence, (predicted == y).astype(float))):
            self._bins[:, column] += np.bincount(place, weights, BINS)
        if k == 2:
            self._positive.append((outputs[:, 1].astype(np.float32), y == 1))

    def scores(self) -> Scores:
        rows, bins = self.rows, self._bins
        found = scores_of(self.confusion.ravel().astype(np.float64), self._schema)
        found["accuracy_interval"] = proportion_interval(int(np.trace(self.confusion)), rows)
        found["log_loss"] = self._log / rows
        if (area := self._area()) is not None:
            found["roc_auc"] = area
        full = bins[:, 0] > 0
        error = float(np.abs(bins[full, 1] - bins[full, 2]).sum() / rows)
        return found | {
            "confusion": {"classes": self.classes, "counts": self.confusion.tolist()},
            "calibration": {
                "brier": self._brier / rows,
                "expected_calibration_error": error,
                "bins": [
                    {
                        "from": i / BINS,
                        "to": (i + 1) / BINS,
                        "rows": int(n),
                        "mean_probability": probability / n,
                        "accuracy": hits / n,
                    }
                    for i, (n, probability, hits) in enumerate(bins.tolist())
                    if n
                ],
            },
        }

    def compared(self) -> tuple[dict[str, Any], dict[str, tuple[float, int]]]:
        hits, true = np.diag(self.confusion), self.confusion.sum(axis=1)
        accuracy = float(hits.sum() / self.rows)
        overconfidence = float(self._bins[:, 1].sum() / self.rows) - accuracy
        met = {label: (int(h), int(n)) for label, h, n in zip(self.classes, hits, true, strict=True) if n}
        recalls = {label: h / n for label, (h, n) in met.items()}
        shares = self.confusion.sum(axis=0) / self.rows
        shown = {
            "rows": self.rows,
            "accuracy": accuracy,
            "accuracy_interval": proportion_interval(int(hits.sum()), self.rows),
            "recall": recalls,
            "recall_interval": {label: proportion_interval(h, n) for label, (h, n) in met.items()},
            "rows_of_class": {label: int(n) for label, n in zip(self.classes, true, strict=True)},
            "predicted": dict(zip(self.classes, shares.tolist(), strict=True)),
            "brier": self._brier / self.rows,
            "overconfidence": overconfidence,
        }
        of_class = {f"recall of {label}": (value, met[label][1]) for label, value in recalls.items()}
        together = {"accuracy": (accuracy, self.rows), "overconfidence": (overconfidence, self.rows)}
        return shown, together | of_class

    def _area(self) -> float | None:
        """The area under the ROC curve of the second of two classes: how often it has the larger probability, of a row
        of each (Mann and Whitney's U). None where a class has no rows."""
        if not self._positive:
            return None
        score = np.concatenate([score for score, _ in self._positive])
        positive = np.concatenate([which for _, which in self._positive])
        p, n = int(positive.sum()), int((~positive).sum())
        if not p or not n:
            return None
        _, place, times = np.unique(score, return_inverse=True, return_counts=True)
        ranks = (np.cumsum(times) - (times - 1) / 2)[place]  # equal scores share their mean rank
        return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n))


class NumberTally:
    """For numbers, in the target's own units. Targets are clamped to its bounds, as in training."""

    def __init__(self, target: NumericTarget) -> None:
        self.low, self.high = target.bounds
        self._sums = np.zeros(6)  # rows, error, |error|, error^2, y, y^2
        self._least, self._largest = math.inf, -math.inf  # of y
        self._bins = np.zeros((BINS, 3))  # rows, summed prediction, summed target

    @property
    def rows(self) -> int:
        return int(self._sums[0])

    def add(self, outputs: Outputs, y: NDArray[Any]) -> None:
        span = self.high - self.low
        # Scaled, so that squares of large numbers do not swallow each other.
        predicted, true = (outputs[:, 0] - self.low) / span, y.astype(np.float64)
        error = predicted - true
        self._sums += [len(y), error.sum(), np.abs(error).sum(), (error**2).sum(), true.sum(), (true**2).sum()]
        self._least = min(self._least, float(true.min(initial=math.inf)))
        self._largest = max(self._largest, float(true.max(initial=-math.inf)))
        place = np.clip((predicted * BINS).astype(np.int64), 0, BINS - 1)
        for column, weights in enumerate((np.ones(len(y)), predicted, true)):
            self._bins[:, column] += np.bincount(place, weights, BINS)

    def scores(self) -> Scores:
        rows, error, absolute, squared, total, squares = self._sums
        span = self.high - self.low
        spread = squares / rows - (total / rows) ** 2
        return {
            "mae": absolute / rows * span,
            "mae_interval": self._interval(),
            "mse": squared / rows * span**2,
            "rmse": math.sqrt(squared / rows) * span,
            "bias": error / rows * span,
            "r2": 1 - squared / rows / spread if self._least < self._largest and spread > 0 else None,
            "scaled": {"mae": absolute / rows, "mse": squared / rows},
            "calibration": {
                "bins": [
                    {
                        "from": self.low + span * i / BINS,
                        "to": self.low + span * (i + 1) / BINS,
                        "rows": int(n),
                        "mean_prediction": self.low + span * predicted / n,
                        "mean_target": self.low + span * true / n,
                    }
                    for i, (n, predicted, true) in enumerate(self._bins.tolist())
                    if n
                ]
            },
        }

    def compared(self) -> tuple[dict[str, Any], dict[str, tuple[float, int]]]:
        scores = self.scores()
        shown = {"rows": self.rows, **{name: scores[name] for name in ("mae", "mae_interval", "rmse", "bias")}}
        return shown, {name: (scores[name], self.rows) for name in ("mae", "bias")}

    def _interval(self) -> list[float]:
        """Of the mean absolute error, by the normal approximation."""
        rows, _, absolute, squared, *_ = self._sums
        mean, span = absolute / rows, self.high - self.low
        deviation = math.sqrt(max(squared / rows - mean**2, 0.0) / rows)
        return [max(mean - Z * deviation, 0.0) * span, (mean + Z * deviation) * span]


def proportion_interval(hits: int, rows: int) -> list[float]:
    """The 95 % interval of a share (Wilson 1927), which holds for few rows too."""
    if rows == 0:
        return [0.0, 1.0]
    share, z2 = hits / rows, Z * Z
    middle = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    half = Z / (1 + z2 / rows) * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows**2))
    return [max(middle - half, 0.0), min(middle + half, 1.0)]
