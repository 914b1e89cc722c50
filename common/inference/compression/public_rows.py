"""Rows that tell nothing of anybody's, to make a model smaller on: a public table's, or made up from the schema."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from common.data import tables
from common.data.encoding import RowEncoder
from common.data.tables import Table
from common.document.schema import Categorical, Numeric, Schema
from common.document.values import spelled
from common.errors import DataError

GENERATED = 8000
MOST_ROWS = 20_000  # of a public table
LEAST_ROWS = 20
MISSING = 0.1  # of made-up cells, in a column that may be missing
APART, MOST_APART = 0.2, 2000


@dataclass(frozen=True)
class PublicRows:
    """Encoded rows to train on, float32 [rows, inputs], and others, held apart, to compare models on."""

    x: NDArray[np.float32]
    apart: Table
    source: str
    kind: str = "rows that were generated"


def generated(schema: Schema, *, seed: int, rows: int = GENERATED) -> PublicRows:
    """Rows made up from the schema alone: numbers uniform between their bounds, categories uniform."""
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame([_column(feature, rows, rng) for feature in schema.features])
    return _split(tables.of_frame(frame, source="generated rows"), schema, rng, "rows generated from the schema")


def of_table(table: Table, schema: Schema, *, seed: int) -> PublicRows:
    """The rows of a public table; of more than `MOST_ROWS` the first.

    Raises `DataError` where columns are not there, cells do not fit, or rows are too few.
    """
    found = _split(table, schema, np.random.default_rng(seed), f"rows of {table.source}")
    return replace(found, kind="rows that whoever made it called public")


def _column(feature: Numeric | Categorical, rows: int, rng: np.random.Generator) -> pl.Series:
    if isinstance(feature, Categorical):
        texts = [spelled(category) for category in feature.categories]
        values = pl.Series(feature.name, [texts[i] for i in rng.integers(len(texts), size=rows)], pl.String)
    else:
        values = pl.Series(feature.name, rng.uniform(*feature.bounds, rows))
    if not feature.may_be_missing:
        return values
    return values.zip_with(pl.Series(rng.random(rows) >= MISSING), pl.Series(feature.name, [None], values.dtype))


def _split(table: Table, schema: Schema, rng: np.random.Generator, source: str) -> PublicRows:
    encoder = RowEncoder(table, schema, with_target=False)
    wanted = [name for name in schema.feature_names if name in table.types]
    parts, frames, rows = [], [], 0
    for block in encoder.blocks():
        parts.append(block.x)
        frames.append(block.block.frame.select(wanted))
        rows += len(block.x)
        if rows >= MOST_ROWS:
            break
    encoder.end(leave_out=False)
    x, frame = np.concatenate(parts)[:MOST_ROWS], pl.concat(frames)[:MOST_ROWS]
    if len(x) < LEAST_ROWS:
        raise DataError(f"{table.source}: {len(x)} rows are too few to make a model smaller on; {LEAST_ROWS} or more")
    order = rng.permutation(len(x))
    apart, others = np.split(order, [min(MOST_APART, round(APART * len(x)))])
    held = tables.of_frame(frame[apart.tolist()], source=table.source)
    return PublicRows(x[others], replace(held, decimals=table.decimals), f"{len(others):,} {source}")
