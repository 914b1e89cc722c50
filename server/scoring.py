"""Scoring the model on a table of the server's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from common import model as models
from common import objective, tables
from common.encoding import encode_table
from common.federation import Federation
from common.metrics import Metrics, metrics_of
from common.room import room_for
from common.state import State
from common.tables import AS_IT_SEEMS, FileFormat


def held_out_scorer(federation: Federation, path: Path, form: FileFormat = AS_IT_SEEMS) -> Callable[[State], Metrics]:
    """Reads the table once; the result scores a model on it, exactly. Raises `DataError`."""
    schema, loss = federation.data_schema, federation.training.loss
    encoded = encode_table(tables.read(path, schema, form), schema)
    x, y = torch.from_numpy(encoded.x), torch.from_numpy(encoded.y)
    with room_for(federation):
        model = models.build(federation)

    def score(state: State) -> Metrics:
        models.load_state(model, state)
        return metrics_of(objective.score(model, x, y, schema=schema, loss=loss), schema)

    return score
