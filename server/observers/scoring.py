"""Scoring the model on a table of the server's own."""

from __future__ import annotations

from pathlib import Path

import torch

from common.data import tables
from common.data.encoding import encode_table
from common.data.tables import AS_IT_SEEMS, FileFormat
from common.document.federation import Federation
from common.model import mlp, objective
from common.model.memory import room_for
from common.model.scores import Scores, scores_of
from common.model.weights import Weights


class HeldOut:
    """A table of the server's own, read once. Called with a model, it scores it on all rows, exactly."""

    def __init__(self, federation: Federation, path: Path, form: FileFormat = AS_IT_SEEMS) -> None:
        """Raises `DataError`."""
        self._schema, self._loss = federation.data_schema, federation.training.loss
        encoded = encode_table(tables.read(path, self._schema, form), self._schema)
        self.report = encoded.report
        self._x, self._y = torch.from_numpy(encoded.x), torch.from_numpy(encoded.y)
        with room_for(federation):
            self._model = mlp.build(federation)

    def __call__(self, weights: Weights) -> Scores:
        """The metrics; `clamped_targets` among them if errors are measured against targets that were clamped."""
        mlp.load_weights(self._model, weights)
        counts = objective.score(self._model, self._x, self._y, schema=self._schema, loss=self._loss)
        clamped = self.report.targets_clamped
        return scores_of(counts, self._schema) | ({"clamped_targets": clamped} if clamped else {})
