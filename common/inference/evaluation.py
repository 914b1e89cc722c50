"""How good a model is on a table with its targets: metrics, confusion and calibration, over all rows and by group.

Everything is added up block by block, so a table may be larger than memory. Figures are exact: whoever evaluates owns
the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.data.cells import Cells
from common.data.encoding import EncodedBlock, RowEncoder
from common.data.encoding_report import EncodingReport
from common.data.tables import Table
from common.document.federation import Federation
from common.document.group import MOST_GROUPS
from common.errors import DataError
from common.inference.grouping import Groups
from common.inference.predictor import Outputs, Predictor
from common.inference.tallies import Tally, tally_of
from common.model.gaps import FEW_ROWS, Figure, gaps


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


def evaluate(table: Table, predictor: Predictor, *, by: Sequence[Groups] = (), skip_bad: bool = False) -> Evaluated:
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
    ordered = {g.name: {name: groups[g.name][name] for name in g.ordered(groups[g.name])} for g in by}
    return Evaluated(predictor.federation, encoder.report, overall, ordered)


def _scored(encoder: RowEncoder, predictor: Predictor, skip_bad: bool) -> Iterator[tuple[EncodedBlock, Outputs]]:
    for rows in encoder.blocks():
        if skip_bad or not encoder.unfit:  # else all that is still wanted is which other cells do not fit
            yield rows, predictor.outputs(rows)


def _compared(tallies: Mapping[str, Tally]) -> dict[str, Any]:
    """Each group's figures, and for each figure the groups that do best and worst and the gap between them, of those
    that have `FEW_ROWS` of it or more: a gap between few rows is chance."""
    shown = {name: tally.compared() for name, tally in tallies.items()}
    comparable = {
        name: {figure: Figure(value) for figure, (value, rows) in figures.items() if rows >= FEW_ROWS}
        for name, (_, figures) in shown.items()
    }
    return {"groups": {name: told for name, (told, _) in shown.items()}, "gaps": gaps(comparable)}
