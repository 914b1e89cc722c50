"""Rows that hold every kind of cell which a schema allows, to check that two predictors agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from common.data import tables
from common.data.encoding import RowEncoder
from common.document.schema import Categorical, Classes, Numeric, Schema
from common.document.values import Scalar, spelled
from common.inference.predictor import Predictor

PROBES = 1000
NOTHING_LISTED = "none of those that are listed"


@dataclass(frozen=True)
class Agreement:
    """How far two predictors are apart: `largest` in probabilities, or as a share of a number's range; `same` is the
    share of rows with the same class (1 for numbers)."""

    rows: int
    largest: float
    same: float


def compare(one: Predictor, other: Predictor, *, rows: int = PROBES, seed: int = 0) -> Agreement:
    """How two predictors of one federation agree on made-up rows."""
    schema = one.federation.data_schema
    encoder = RowEncoder(tables.of_frame(probes(schema, rows=rows, seed=seed)), schema, with_target=False)
    largest, same = 0.0, 0
    for block in encoder.blocks():
        a, b = one.outputs(block), other.outputs(block)
        difference = float(np.abs(a - b).max(initial=0.0))
        largest = difference if np.isnan(difference) else max(largest, difference)
        same += int((a.argmax(axis=1) == b.argmax(axis=1)).sum())
    encoder.end(leave_out=False)
    if not isinstance(schema.target, Classes):
        low, high = schema.target.bounds
        largest /= high - low
    return Agreement(rows, largest, same / rows)


def probes(schema: Schema, *, rows: int, seed: int = 0) -> pl.DataFrame:
    """Made-up rows, as text: numbers between, at and beyond their bounds, every category and others, and what is
    missing in each of its spellings."""
    rng = np.random.default_rng(seed)
    return pl.DataFrame({feature.name: _cells(feature, rows, rng) for feature in schema.features})


def _cells(feature: Numeric | Categorical, rows: int, rng: np.random.Generator) -> list[str]:
    usual: list[Scalar] = list(feature.categories) if isinstance(feature, Categorical) else []
    odd: list[Scalar] = [*feature.missing, *([""] if feature.may_be_missing else [])]
    if isinstance(feature, Numeric):
        low, high = feature.bounds
        odd += [low, high, low - (high - low), high + (high - low)]
        odd += [NOTHING_LISTED] if feature.unfit == "missing" else []
        usual = rng.uniform(low, high, rows).tolist()
    elif feature.unfit != "left_out":
        odd.append(NOTHING_LISTED)
    strange = rng.random(rows) < 0.3
    listed = [usual[i] for i in rng.integers(len(usual), size=rows)]
    return [
        spelled(odd[rng.integers(len(odd))] if s and odd else value) for s, value in zip(strange, listed, strict=True)
    ]
