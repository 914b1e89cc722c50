"""Tables made from nothing but a schema, to try a federation before there is data."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch

from common.data.encoding import encode
from common.document.group import Group
from common.document.schema import Categorical, Classes, NumericTarget, Schema

TEACHER_HIDDEN = 16
MISSING = 0.2  # of the cells of a target that may be missing, beside others
TEACHER_TEMPERATURE = 0.25  # how often the label is not the teacher's first choice


def generate(schema: Schema, *, rows: int, seed: int) -> pl.DataFrame:
    """`rows` rows that fit the schema, with a target that can be learned.

    Features are independent: numbers uniform between their bounds, categories equally likely, and so are groups. Each
    target is drawn from a small random network's opinion of the row, standardised so that no class is rare.
    """
    rng = np.random.default_rng([seed, 0x7AB1E])
    columns: dict[str, list[object] | np.ndarray] = {}
    for feature in schema.features:
        if isinstance(feature, Categorical):
            columns[feature.name] = [feature.categories[i] for i in rng.integers(len(feature.categories), size=rows)]
        else:
            columns[feature.name] = rng.uniform(*feature.bounds, size=rows).round(6)
    if schema.group is not None and schema.group.name not in columns:
        columns[schema.group.name] = _groups(schema.group, rows, rng)
    placeholders = {
        target.name: next(iter(target.classes.values()))[0] if isinstance(target, Classes) else target.bounds[0]
        for target in schema.targets
    }
    frame = pl.DataFrame({**columns, **{name: [cell] * rows for name, cell in placeholders.items()}}, strict=False)
    x = encode(frame, schema).x
    for target in schema.targets:
        cells = _cells(target, x, rng)
        if target.may_be_missing and schema.also:
            cells = [None if absent else cell for cell, absent in zip(cells, rng.random(rows) < MISSING, strict=True)]
        frame = frame.with_columns(pl.Series(target.name, cells, strict=False))
    return frame


def _cells(target: Classes | NumericTarget, x: np.ndarray, rng: np.random.Generator) -> list[object]:
    """A target's cells, of encoded rows."""
    opinion = _teacher(x, target.outputs, rng)
    if isinstance(target, Classes):
        gumbel = rng.gumbel(size=opinion.shape) * TEACHER_TEMPERATURE  # argmax of logits + Gumbel samples a softmax
        values = [v[0] for v in target.classes.values()]
        return [values[i] for i in (opinion + gumbel).argmax(axis=1)]
    low, high = target.bounds
    position = 1 / (1 + np.exp(-opinion[:, 0] + 0.1 * rng.normal(size=len(x))))
    cells: list[object] = (low + position * (high - low)).tolist()
    return cells


def _groups(group: Group, rows: int, rng: np.random.Generator) -> list[object]:
    """Cells of a column that is no feature: each group equally likely, and none in no group."""
    if group.groups is not None:
        values = [some[0] for some in group.groups.values()]
    else:
        cuts = group.cuts or ()
        values = [cuts[0] - 1, *cuts]
    return [values[i] for i in rng.integers(len(values), size=rows)]


def _teacher(x: np.ndarray, outputs: int, rng: np.random.Generator) -> np.ndarray:
    first = torch.from_numpy(rng.normal(size=(x.shape[1], TEACHER_HIDDEN)) / np.sqrt(x.shape[1]))
    second = torch.from_numpy(rng.normal(size=(TEACHER_HIDDEN, outputs)))
    opinion = (torch.tanh(3 * torch.from_numpy(x).double() @ first) @ second).numpy()
    standard: np.ndarray = (opinion - opinion.mean(axis=0)) / (opinion.std(axis=0) + 1e-12)
    return standard
