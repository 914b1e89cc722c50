"""What a model's predictions rest on: by column of the table, over many rows and for one.

Two figures, for two questions. *Permutation importance* (Breiman 2001, "Random Forests"; Fisher, Rudin and Dominici
2019): how much worse are predictions when a column's cells are dealt anew to the rows? It needs the target.
*Attribution* by integrated gradients (Sundararajan, Taly and Yan 2017, "Axiomatic Attribution for Deep Networks";
Captum): what of the difference between a row's output and that of the average row comes from each column? A column's
inputs (a number's and its "missing", a category's one by one) are moved, and added up, together.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.data.cells import Cells
from common.data.encoding import EncodedBlock, RowEncoder, Targets, places
from common.data.encoding_report import EncodingReport
from common.data.tables import Table
from common.document.schema import Classes, Schema
from common.errors import ConfigError, DataError
from common.inference.predictor import TorchPredictor, outputs_of
from common.inference.tallies import tally_of

STEPS = 64  # of the path from the average row
CHUNK = 1024  # rows at a time: each is as many as there are steps
REPEATS = 5

Inputs = NDArray[np.float32]


@dataclass(frozen=True)
class ColumnReliance:
    """How much a model relies on a column. `worse` is by how much accuracy falls, or the mean absolute error rises in
    the target's units, when the column is permuted: the mean of `REPEATS` times, and their standard deviation; None
    without a target. `attribution` is the mean absolute one, in probability or in the target's units."""

    column: str
    worse: float | None
    spread: float | None
    attribution: float


@dataclass(frozen=True)
class RowExplanation:
    """Why one row is predicted as it is: `base` (the average row's output) and all attributions add up to `output`."""

    line: int
    of: str  # the class whose probability it is; "" for a number
    base: float
    output: float
    cells: dict[str, str]
    attributions: dict[str, float]


@dataclass(frozen=True)
class Explanation:
    """`rows` of the table were looked at. Columns come in order of their importance."""

    rows: int
    baseline: float | None  # accuracy, or mean absolute error, as it is
    columns: tuple[ColumnReliance, ...]
    row: RowExplanation | None
    report: EncodingReport
    of: str = ""  # the class that was asked for

    def to_json(self, schema: Schema) -> dict[str, Any]:
        """All of it, as JSON values."""
        classes = isinstance(schema.target, Classes)
        return {
            "rows": self.rows,
            "metric": "accuracy" if classes else "mae",
            "baseline": self.baseline,
            "of": self.of,
            "columns": [vars(column) for column in self.columns],
            "row": None if self.row is None else vars(self.row),
        }


@dataclass
class _Sample:
    """Rows of a table, each as likely as the others to be among them."""

    most: int
    rng: np.random.Generator
    keys: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    x: Inputs = field(default_factory=lambda: np.empty((0, 0), np.float32))
    y: Targets | None = None

    def add(self, rows: EncodedBlock) -> None:
        x, y = rows.x[rows.fits], None if rows.y is None else rows.y[rows.fits]
        keys = self.rng.random(len(x))
        if len(self.keys):
            x, keys = np.concatenate([self.x, x]), np.concatenate([self.keys, keys])
            y = None if y is None or self.y is None else np.concatenate([self.y, y])
        chosen = np.sort(np.argsort(keys)[: self.most])  # in the table's order
        self.keys, self.x, self.y = keys[chosen], x[chosen], None if y is None else y[chosen]


def explain(
    table: Table,
    predictor: TorchPredictor,
    *,
    most_rows: int = 10_000,
    line: int | None = None,
    of: str | None = None,
    skip_bad: bool = False,
    seed: int = 0,
) -> Explanation:
    """Explains a model on a table, with its target or without.

    Args:
        most_rows: so many are looked at, drawn by chance.
        line: of one row to explain by itself: its line in CSV, its number in Parquet.
        of: the class whose probability is explained; by default the second of two, and of more the likeliest of each
            row.
        skip_bad: rows with a cell that does not fit are left out.

    Raises:
        DataError: columns or the line are not there, no row is left, or (without `skip_bad`) cells do not fit.
        ConfigError: the class is none of the schema's.
    """
    schema = predictor.federation.data_schema
    attributor = Attributor(predictor, of)
    encoder = RowEncoder(table, schema, with_target=schema.target.name in table.types)
    sample, asked = _Sample(most_rows, np.random.default_rng(seed)), None
    for rows in encoder.blocks():
        sample.add(rows)
        for place in np.flatnonzero(rows.block.lines == line) if line is not None else ():
            if not rows.fits[place]:
                raise DataError(f"{table.source}: line {line}: does not fit the schema, and has no prediction")
            asked = rows.x[place : place + 1], _cells(rows, int(place), schema)
    encoder.end(leave_out=skip_bad)
    if not len(sample.x):
        raise DataError(f"{table.source}: no row is left to explain")
    if line is not None and asked is None:
        raise DataError(f"{table.source}: line {line}: no row begins there")
    average = sample.x.mean(axis=0, keepdims=True)
    attributed = np.abs(attributor.attribute(sample.x, average)).mean(axis=0)
    baseline, worse = None, None
    if sample.y is not None:
        baseline, worse = permutation_importance(predictor, sample.x, sample.y, np.random.default_rng([seed, 1]))
    columns = []
    for i, name in enumerate(schema.feature_names):
        mean, spread = (None, None) if worse is None else worse[i]
        columns.append(ColumnReliance(name, mean, spread, float(attributed[i])))
    columns.sort(key=lambda column: (column.worse or 0.0, column.attribution), reverse=True)
    row = None if asked is None or line is None else attributor.explain_row(line, *asked, average)
    return Explanation(len(sample.x), baseline, tuple(columns), row, encoder.report, of or "")


class Attributor:
    """Integrated gradients of a model's outputs (`Predictor.outputs`), in double, so that they add up."""

    def __init__(self, predictor: TorchPredictor, of: str | None) -> None:
        """`of` is the class that is explained (`explain`). Raises `ConfigError` if the schema has none of that name."""
        self._federation, target = predictor.federation, predictor.federation.data_schema.target
        self._schema = predictor.federation.data_schema
        self._module = copy.deepcopy(predictor.module).double()
        self._classes = list(target.classes) if isinstance(target, Classes) else []
        if of is not None and of not in self._classes:
            known = f"the schema has {', '.join(self._classes)}" if self._classes else "the target is a number"
            raise ConfigError([f"--class {of}: {known}"])
        self._of = self._classes.index(of) if of is not None else 1 if len(self._classes) == 2 else None

    def attribute(self, x: Inputs, base: Inputs) -> NDArray[np.float64]:
        """What each feature adds to the output of rows, beyond that of `base`: [rows, inputs], [1, inputs] -> [rows,
        features]. They add up to the difference of the outputs, but for the error of `STEPS` steps."""
        from captum.attr import IntegratedGradients  # a second to import

        method, start_from = IntegratedGradients(self._outputs), torch.from_numpy(base).double()
        parts = []
        for start in range(0, len(x), CHUNK):
            rows = torch.from_numpy(x[start : start + CHUNK]).double()
            found = method.attribute(
                rows, start_from, target=self._explained(rows), n_steps=STEPS, internal_batch_size=CHUNK
            )
            parts.append(found.detach().numpy())
        of_inputs = np.concatenate(parts)
        return np.stack([of_inputs[:, at : at + f.inputs].sum(axis=1) for f, at in places(self._schema)], axis=1)

    @torch.no_grad()
    def explain_row(self, line: int, x: Inputs, cells: dict[str, str], average: Inputs) -> RowExplanation:
        """One row, [1, inputs], against the average row."""
        row = torch.from_numpy(x).double()
        which = int(self._explained(row)[0])
        base = float(self._outputs(torch.from_numpy(average).double())[0, which])
        with torch.enable_grad():
            found = self.attribute(x, average)[0]
        return RowExplanation(
            line=line,
            of=self._classes[which] if self._classes else "",
            base=base,
            output=float(self._outputs(row)[0, which]),
            cells=cells,
            attributions=dict(zip(self._schema.feature_names, found.tolist(), strict=True)),
        )

    def _outputs(self, x: Tensor) -> Tensor:
        return outputs_of(self._module(x), self._federation)

    @torch.no_grad()
    def _explained(self, x: Tensor) -> Tensor:
        """Which output of each row is explained, [rows]."""
        if not self._classes:
            return torch.zeros(len(x), dtype=torch.int64)
        return self._outputs(x).argmax(dim=1) if self._of is None else torch.full((len(x),), self._of)


def permutation_importance(
    predictor: TorchPredictor, x: Inputs, y: Targets, rng: np.random.Generator
) -> tuple[float, list[tuple[float, float]]]:
    """The metric as it is, and how much worse it is with each feature permuted: mean and standard deviation."""
    schema = predictor.federation.data_schema
    sign, name = (-1, "accuracy") if isinstance(schema.target, Classes) else (1, "mae")

    def metric(inputs: Inputs) -> float:
        tally = tally_of(schema)
        tally.add(predictor.of_inputs(inputs), y)
        return float(tally.scores()[name])

    baseline, worse = metric(x), []
    for feature, at in places(schema):
        place = slice(at, at + feature.inputs)
        changes = []
        for _ in range(REPEATS):
            moved = x.copy()
            moved[:, place] = x[rng.permutation(len(x)), place]
            changes.append(sign * (metric(moved) - baseline))
        worse.append((float(np.mean(changes)), float(np.std(changes, ddof=1))))
    return baseline, worse


def _cells(rows: EncodedBlock, i: int, schema: Schema) -> dict[str, str]:
    """A row's cells as text; "" where there is nothing."""
    frame: pl.DataFrame = rows.block.frame[i : i + 1]
    return {
        name: str(Cells(frame[name], rows.table.decimals).text[0]) if name in frame.columns else ""
        for name in schema.feature_names
    }
