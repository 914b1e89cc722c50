"""Scoring the model on a table of the server's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.data import tables
from common.data.encoding import encode_table
from common.data.tables import AS_IT_SEEMS, FileFormat
from common.document.federation import Federation
from common.document.schema import Classes
from common.inference.explanation import REPEATS, permutation_importance
from common.inference.predictor import TorchPredictor
from common.inference.saved import SavedModel
from common.model import mlp, objective
from common.model.memory import room_for
from common.model.scores import Scores, scores_of
from common.model.weights import Weights

MOST_EXPLAINED = 2_000  # rows, drawn by chance: each column is permuted over them some times


class HeldOut:
    """A table of the server's own, read once. Called with a model, it scores it on all rows, exactly."""

    def __init__(
        self, federation: Federation, path: Path, form: FileFormat = AS_IT_SEEMS, *, explain_every: int | None = None
    ) -> None:
        """`explain_every` so many models it is also found out what the model relies on. Raises `DataError`."""
        self._federation, self._explain_every, self._scored = federation, explain_every, 0
        self._schema, self._loss = federation.data_schema, federation.loss
        encoded = encode_table(tables.read(path, self._schema, form), self._schema)
        self.report = encoded.report
        self._x, self._y = torch.from_numpy(encoded.x), torch.from_numpy(encoded.y)
        self._group = None if encoded.group is None else torch.from_numpy(encoded.group)
        with room_for(federation):
            self._model = mlp.build(federation)

    def __call__(self, weights: Weights) -> Scores:
        """The metrics; `clamped_targets` among them if errors are measured against targets that were clamped, and
        `relies_on` if it was this model's turn to be explained."""
        mlp.load_weights(self._model, weights)
        counts = objective.score(self._model, self._x, self._y, schema=self._schema, loss=self._loss, group=self._group)
        clamped = self.report.targets_clamped
        self._scored += 1
        found = scores_of(counts, self._schema) | ({"clamped_targets": clamped} if clamped else {})
        if self._explain_every and self._scored % self._explain_every == 0:
            found["relies_on"] = self._relies_on(weights)
        return found

    def _relies_on(self, weights: Weights) -> dict[str, Any]:
        """Permutation importance of each column, the largest first (common/inference/explanation.py)."""
        model = SavedModel(federation=self._federation, weights=weights, round=1).task()
        predictor, y = TorchPredictor(model), self._y.numpy()
        if y.ndim > 1:  # of several targets the first, of the rows that have it
            known = np.flatnonzero(~np.isnan(y[:, 0]))
        else:
            known = np.arange(len(y))
        rng = np.random.default_rng(self._federation.training.seed)
        rows = rng.permutation(known)[:MOST_EXPLAINED]
        own = y[rows] if y.ndim == 1 else y[rows, 0]
        if isinstance(self._schema.target, Classes):
            own = own.astype(np.int64)
        _, worse = permutation_importance(predictor, self._x.numpy()[rows], own, rng)
        columns = [
            {"column": name, "worse": mean, "spread": spread}
            for name, (mean, spread) in zip(self._schema.feature_names, worse, strict=True)
        ]
        columns.sort(key=lambda column: -column["worse"])  # type: ignore[operator]  # a number
        return {"rows": len(rows), "repeats": REPEATS, "columns": columns}
