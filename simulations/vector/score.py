"""Scores one model on the rows of many clients, as client/training/train.py would on each client's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.training.kernel import ExactMLP
from common.document.federation import Federation
from common.document.schema import Classes
from common.model import mlp, objective
from common.model.objective import SCORING_BATCH
from common.model.scores import Counts, Scores, count_size, scores_of
from common.model.weights import Weights
from simulations.partition import Index
from simulations.sites import Sites


@torch.no_grad()
def count_together(
    federation: Federation, weights: Weights, x: Tensor, y: Tensor, rows: Sequence[Index], *, exact: bool
) -> NDArray[np.float64]:
    """Exact counts of each client, [clients, counts], whose validation rows are `rows` of the table `x`, `y`.

    Args:
        exact: predict in exact arithmetic, as privacy asks for.
    """
    schema, loss = federation.data_schema, federation.training.loss
    model = mlp.with_weights(federation, weights).to(x.device).eval()
    net = ExactMLP(model.weights(), activation=model.activation_name, loss=loss) if exact else None
    index = torch.from_numpy(np.concatenate(rows)).to(x.device)
    client = np.repeat(np.arange(len(rows)), [len(some) for some in rows])
    total = np.zeros((len(rows), count_size(schema)))
    for start in range(0, len(index), SCORING_BATCH):
        part = slice(start, start + SCORING_BATCH)
        here = x[index[part]]
        predicted = net.predictions(here) if net is not None else objective.predictions(model(here), loss)
        total += _counts(predicted, y[index[part]], client[part], len(rows), schema.target, count_size(schema))
    return total


def scores_on_validation_rows(federation: Federation, weights: Weights, sites: Sites) -> Scores:
    """A model's metrics on the validation rows of all clients, exactly: for whoever simulates, and has them all."""
    schema, total = federation.data_schema, np.zeros(count_size(federation.data_schema))
    for table, rows in sites.validation_rows():
        total += count_together(federation, weights, table.x, table.y, rows, exact=False).sum(0)
    return scores_of(total, schema)


def _counts(predicted: Tensor, y: Tensor, client: Index, clients: int, target: object, size: int) -> Counts:
    """Whole numbers (of `COUNT_UNIT`), whose sums are exact, so that their order does not matter."""
    if isinstance(target, Classes):
        cells = (y * len(target.classes) + predicted).cpu().numpy()
        return np.bincount(client * size + cells, minlength=clients * size).reshape(clients, size).astype(np.float64)
    of_rows = objective.errors_of_rows(predicted, y)
    return np.stack([np.bincount(client, weights=some, minlength=clients) for some in of_rows], axis=1)
