"""How good a model is on a table with its targets: metrics, confusion and calibration, over all rows and by group.

Everything is added up block by block, so a table may be larger than memory. Figures are exact: whoever evaluates owns
the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.data.cells import Cells, holds_cells
from common.data.encoding import EncodedBlock, EncodingReport, RowEncoder, nearest
from common.data.tables import Table
from common.document.federation import Federation
from common.document.schema import Classes, NumericTarget, Schema
from common.errors import ConfigError, DataError
from common.inference.predictor import Outputs, Predictor
from common.model.scores import scores_of

BINS = 10
Z = 1.959964  # of a 95 % interval
MOST_GROUPS = 50
FEW_ROWS = 30  # of which a figure says little
LEAST_PROBABILITY = 1e-15  # in a logarithm, as scikit-learn takes it
EMPTY = "(empty)"

Scores = dict[str, Any]


@dataclass(frozen=True)
class Grouping:
    """A column whose values divide a table's rows into groups, by themselves or (numbers) by where they are cut."""

    column: str
    cuts: tuple[str, ...] = ()  # numbers as they were given

    @classmethod
    def parse(cls, text: str, table: Table) -> Grouping:
        """`sex`, or `age:40,60` for below 40, from 40 to below 60, and from 60. Raises `ConfigError` or `DataError`."""
        name, colon, cuts = text.rpartition(":")
        if text in table.types or not colon:
            name, cuts = text, ""
        if name not in table.types:
            near = nearest(name, table.columns)
            hint = f" (did you mean {near}?)" if near else ""
            raise DataError(f"--by {text}: the table has no column {name}{hint}")
        if not holds_cells(table.types[name]):
            raise DataError(f"--by {text}: the column holds {table.types[name]}, by which rows cannot be told apart")
        made = cls(name, tuple(cut.strip() for cut in cuts.split(",")) if cuts else ())
        places = made.places
        if any(not a < b for a, b in pairwise(places)) or not all(map(math.isfinite, places)):
            raise ConfigError([f"--by {text}: after the colon expected rising numbers, as in {name}:40,60"])
        return made

    @property
    def name(self) -> str:
        """How it was asked for."""
        return f"{self.column}:{','.join(self.cuts)}" if self.cuts else self.column

    @property
    def places(self) -> list[float]:
        """The cuts as numbers; NaN for one that is none."""
        found = []
        for cut in self.cuts:
            try:
                found.append(float(cut))
            except ValueError:
                found.append(math.nan)
        return found

    @property
    def parts(self) -> tuple[str, ...]:
        """The groups between the cuts, from the lowest."""
        if not self.cuts:
            return ()
        between = (f"{a} to below {b}" for a, b in pairwise(self.cuts))
        return (f"below {self.cuts[0]}", *between, f"from {self.cuts[-1]}")

    def groups(self, cells: Cells, schema: Schema) -> NDArray[np.object_]:
        """The group of each row, as text. What the schema calls missing is empty."""
        empty = cells.empty()
        for feature in schema.features:
            for marker in feature.missing if feature.name == self.column else ():
                empty = empty | cells.means(marker)
        if not self.cuts:
            return np.where(empty, EMPTY, cells.names().to_numpy())
        parts = np.array(self.parts, object)[np.searchsorted(self.places, cells.number, "right")]
        return np.where(np.isfinite(cells.number) & ~empty, parts, EMPTY)


@dataclass
class Evaluated:
    """What came of an evaluation."""

    federation: Federation
    report: EncodingReport
    overall: Tally
    groups: dict[str, dict[str, Tally]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        told = {"rows": 0, "left_out": self.report.left_out} | self.overall.scores() | {"rows": self.overall.rows}
        if self.report.targets_clamped:
            told["clamped_targets"] = self.report.targets_clamped
        return told | {"by": {column: _compared(tallies) for column, tallies in self.groups.items()}}


def evaluate(table: Table, predictor: Predictor, *, by: Sequence[Grouping] = (), skip_bad: bool = False) -> Evaluated:
    """Scores a model on all rows of a table, and on the rows of each group.

    Args:
        skip_bad: rows with a cell that does not fit are left out, and are in the report.

    Raises:
        DataError: columns are not there, no row is left, a column has too many groups, or (without `skip_bad`) cells do
            not fit.
    """
    schema = predictor.federation.data_schema
    encoder = RowEncoder(table, schema, with_target=True)
    overall = tally_of(schema)
    groups: dict[str, dict[str, Tally]] = {grouping.name: {} for grouping in by}
    for rows, outputs in _scored(encoder, predictor, skip_bad):
        assert rows.y is not None
        overall.add(outputs[rows.fits], rows.y[rows.fits])
        for grouping in by:
            names = grouping.groups(Cells(rows.block.frame[grouping.column], table.decimals), schema)
            found, tallies = np.unique(names[rows.fits].astype(str)), groups[grouping.name]
            if len({*tallies, *found.tolist()}) > MOST_GROUPS:
                raise DataError(
                    f"{table.source}: --by {grouping.column}: more than {MOST_GROUPS} values; numbers can be cut, as "
                    f"in --by {grouping.column}:40,60"
                )
            for name in found:
                where = rows.fits & (names == name)
                tallies.setdefault(str(name), tally_of(schema)).add(outputs[where], rows.y[where])
    encoder.end(leave_out=skip_bad)
    if overall.rows == 0:
        raise DataError(f"{table.source}: no row is left to evaluate on")
    ordered = {grouping.name: _ordered(groups[grouping.name], grouping) for grouping in by}
    return Evaluated(predictor.federation, encoder.report, overall, ordered)


def _scored(encoder: RowEncoder, predictor: Predictor, skip_bad: bool) -> Iterator[tuple[EncodedBlock, Outputs]]:
    bad = False
    for rows in encoder.blocks():
        bad |= not rows.fits.all()
        if skip_bad or not bad:  # else all that is still wanted is which other cells do not fit
            yield rows, predictor.outputs(rows)


def _ordered(tallies: dict[str, Tally], grouping: Grouping) -> dict[str, Tally]:
    """Groups as a reader looks for them: parts in their order, numbers by size, texts by name; what is empty last."""

    def by_value(name: str) -> tuple[bool, float, str]:
        try:
            return False, float(name), name
        except ValueError:
            return True, 0.0, name

    found = [name for name in grouping.parts if name in tallies]
    found += sorted((name for name in tallies if name not in (*grouping.parts, EMPTY)), key=by_value)
    return {name: tallies[name] for name in (*found, EMPTY) if name in tallies}


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
        self._schema, self.classes = schema, list(schema.target.classes)
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
        }
        of_class = {f"recall of {label}": (value, met[label][1]) for label, value in recalls.items()}
        return shown, {"accuracy": (accuracy, self.rows), **of_class}

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
        return shown, {"mae": (scores["mae"], self.rows)}

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


def _compared(tallies: Mapping[str, Tally]) -> dict[str, Any]:
    """Each group's figures, and for each figure the groups that do best and worst and the gap between them, of those
    that have `FEW_ROWS` of it or more: a gap between few rows is chance."""
    shown = {name: tally.compared() for name, tally in tallies.items()}
    gaps: dict[str, Any] = {}
    for figure in dict.fromkeys(figure for _, figures in shown.values() for figure in figures):
        found = {name: figures[figure] for name, (_, figures) in shown.items() if figure in figures}
        values = {name: value for name, (value, rows) in found.items() if rows >= FEW_ROWS}
        if len(values) < 2:
            continue
        low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
        worst, best = (high, low) if figure == "mae" else (low, high)
        gaps[figure] = {"gap": values[high] - values[low], "worst": worst, "best": best}
    return {"groups": {name: told for name, (told, _) in shown.items()}, "gaps": gaps}
