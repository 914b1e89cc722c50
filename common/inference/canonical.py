"""A table's features as other programs are given them: numbers with NaN for what is missing, and categories as text,
each in one spelling.

What a cell means (common/data/cells.py) is Cloister's to say, and no exported model knows: so that is settled here, and
what is left for the model is arithmetic.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.data.cells import Cells
from common.data.encoding import EncodedBlock, missing_of
from common.document.schema import Categorical, Numeric, Schema
from common.document.values import spelled

MISSING = ""  # of a category
OTHER = "(other)"

Column = NDArray[np.float64] | NDArray[np.object_]


def canonical(rows: EncodedBlock, schema: Schema) -> dict[str, Column]:
    """Each feature's column [rows]: float64, or text. What a row that does not fit has means nothing."""
    frame, decimals = rows.block.frame, rows.table.decimals
    return {
        feature.name: _column(feature, Cells(frame[feature.name], decimals))
        if feature.name in frame.columns
        else _missing(feature, frame.height)
        for feature in schema.features
    }


def other_of(feature: Categorical) -> str:
    """A text that is none of the feature's categories."""
    other = OTHER
    while other in map(spelled, feature.categories):
        other += "_"
    return other


def _missing(feature: Numeric | Categorical, rows: int) -> Column:
    return np.full(rows, MISSING, object) if isinstance(feature, Categorical) else np.full(rows, np.nan)


def _column(feature: Numeric | Categorical, cells: Cells) -> Column:
    missing = missing_of(cells, feature)
    if isinstance(feature, Numeric):
        return np.where(missing | ~np.isfinite(cells.number), np.nan, cells.number)
    text = np.full(len(missing), MISSING if feature.unfit == "missing" else other_of(feature), object)
    for category in reversed(feature.categories):  # of two that a cell could mean, the first
        text[cells.means(category)] = spelled(category)
    text[missing] = MISSING
    return text
