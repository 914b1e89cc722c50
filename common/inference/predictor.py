"""A model and rows in, probabilities or numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.data.encoding import EncodedBlock
from common.document.federation import Federation
from common.document.schema import Classes, Schema
from common.inference.saved import SavedModel
from common.model import mlp
from common.model.memory import room_for

PREDICTION = "prediction"
CHUNK_NUMBERS = 1 << 22  # of the widest layer, at a time

Outputs = NDArray[np.float64]


class Predictor(Protocol):
    """Whatever computes a model's outputs: float64 [rows, classes] of probabilities that add up to 1, or float64
    [rows, 1] in the target's own units."""

    @property
    def federation(self) -> Federation: ...

    def outputs(self, rows: EncodedBlock) -> Outputs:
        """Those of rows; what it gives for a row that does not fit means nothing."""


class TorchPredictor:
    """A saved model in torch, on the CPU: an MLP on a table waits for the table."""

    def __init__(self, model: SavedModel) -> None:
        """Raises `OutOfMemory`."""
        self.federation = model.federation
        with room_for(self.federation):
            self._model = mlp.with_weights(self.federation, model.weights).eval()
        self._rows = max(1, CHUNK_NUMBERS // max(self.federation.layer_sizes))

    def outputs(self, rows: EncodedBlock) -> Outputs:
        return self.of_inputs(rows.x)

    @torch.no_grad()
    def of_inputs(self, x: NDArray[np.float32]) -> Outputs:
        """Outputs of encoded rows, float32 [rows, inputs]."""
        inputs = torch.from_numpy(x)
        width = max(1, self.federation.data_schema.outputs)
        made = np.empty((len(x), width))
        with room_for(self.federation):
            for start in range(0, len(x), self._rows):
                chunk = slice(start, start + self._rows)
                made[chunk] = outputs_of(self._model(inputs[chunk]), self.federation).numpy()
        return made

    @property
    def module(self) -> mlp.MLP:
        """The model itself, in evaluation mode."""
        return self._model


def outputs_of(logits: Tensor, federation: Federation) -> Tensor:
    """A model's logits [rows, ...] as `Predictor.outputs` has them, float64."""
    logits, target = logits.double(), federation.data_schema.target
    if not isinstance(target, Classes):
        low, high = target.bounds
        return logits[:, :1].clamp(0.0, 1.0) * (high - low) + low
    if federation.training.loss == "binary_cross_entropy":
        return torch.cat([torch.sigmoid(-logits), torch.sigmoid(logits)], dim=1)
    return torch.softmax(logits, dim=1)


def output_names(schema: Schema) -> list[str]:
    """The columns that predictions are written in."""
    if not isinstance(schema.target, Classes):
        return [PREDICTION]
    return [PREDICTION, *(f"probability_{label}" for label in schema.target.classes)]


def frame_of(outputs: Outputs, schema: Schema, *, where: Sequence[bool] | NDArray[np.bool_]) -> pl.DataFrame:
    """Outputs as columns: the likeliest class and each one's probability, or a number; null but `where`."""
    shown = pl.Series(np.asarray(where))
    target = schema.target
    if isinstance(target, Classes):
        labels = pl.Series(list(target.classes), dtype=pl.String)
        best = outputs.argmax(axis=1)
        columns = [labels.gather(best), *(pl.Series(np.ascontiguousarray(column)) for column in outputs.T)]
    else:
        columns = [pl.Series(outputs[:, 0])]
    named = [column.alias(name) for column, name in zip(columns, output_names(schema), strict=True)]
    return pl.DataFrame(named).select(pl.when(shown).then(pl.all()))
