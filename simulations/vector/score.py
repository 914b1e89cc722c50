"""Scores one model on the rows of many clients, as client/training/train.py would on each client's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from client.training.kernel import ExactMLP
from common.document.federation import Federation
from common.model import mlp, objective
from common.model.objective import SCORING_BATCH
from common.model.scores import Scores, count_size, is_calibrated, scores_of
from common.model.weights import Weights
from simulations.partition import Index
from simulations.sites import SharedTable, Sites


@torch.no_grad()
def count_together(
    federation: Federation, weights: Weights, table: SharedTable, rows: Sequence[Index], *, exact: bool
) -> NDArray[np.float64]:
    """Exact counts of each client, [clients, counts], whose validation rows are `rows` of the table.

    Args:
        exact: predict in exact arithmetic, as privacy asks for.
    """
    schema, loss = federation.data_schema, federation.loss
    model = mlp.with_weights(federation, weights).to(table.x.device).eval()
    net = ExactMLP(model.weights(), activation=model.activation_name, loss=loss) if exact else None
    index = torch.from_numpy(np.concatenate(rows)).to(table.x.device)
    client = np.repeat(np.arange(len(rows)), [len(some) for some in rows])
    size, calibrated = count_size(schema), is_calibrated(schema)
    total = np.zeros((len(rows), size))
    for start in range(0, len(index), SCORING_BATCH):
        part = slice(start, start + SCORING_BATCH)
        here, sure = index[part], None
        if net is None:
            logits = model(table.x[here])
            predicted = objective.predictions(logits, loss)
            sure = objective.confidences(logits, loss) if calibrated else None
        elif calibrated:
            predicted, sure = net.sure_predictions(table.x[here])
        else:
            predicted = net.predictions(table.x[here])
        group = None if table.group is None else table.group[here]
        added = objective.added(predicted, table.y[here], schema, group=group, confidence=sure)
        # Each client has counts of its own, one client's after another's.
        of_clients = replace(added, cells=added.cells + client[part] * size)
        total += of_clients.total(len(rows) * size).reshape(len(rows), size)
    return total


def scores_on_validation_rows(federation: Federation, weights: Weights, sites: Sites) -> Scores:
    """A model's metrics on the validation rows of all clients, exactly: for whoever simulates, and has them all."""
    schema, total = federation.data_schema, np.zeros(count_size(federation.data_schema))
    for table, rows in sites.validation_rows():
        total += count_together(federation, weights, table, rows, exact=False).sum(0)
    return scores_of(total, schema)
