"""Counts of many clients are those of each alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.data import Rows
from client.training.kernel import exact_counts
from common.data.encoding_report import EncodingReport
from common.model import mlp, objective
from common.model.weights import initial_weights
from simulations.sites import SharedTable
from simulations.vector import score
from simulations.vector.score import count_together
from tests.support import federation

TARGETS: dict[str, dict[str, Any]] = {
    "classes": {"schema__target": {"name": "y", "classes": [0, 1, 2]}},
    "two": {"schema__target": {"name": "y", "classes": [0, 1]}, "training__loss": "binary_cross_entropy"},
    "number": {"schema__target": {"name": "y", "bounds": [0, 1]}, "training__loss": "mse"},
    "several": {
        "schema__also": [
            {"name": "k", "classes": [0, 1, 2], "optional": True},
            {"name": "s", "bounds": [0, 1], "optional": True},
        ]
    },
    "groups": {"schema__group": {"name": "c", "groups": ["red", "green"], "calibration": True}},
}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=6),
    st.sampled_from(list(TARGETS)),
    st.booleans(),
    st.sampled_from([3, 7, 65_536]),
)
def test_each_clients_counts_are_those_of_its_rows(sizes, target, exact, batch):
    fed, rng = federation(**TARGETS[target]), np.random.default_rng(0)
    weights, schema, loss = initial_weights(fed), fed.data_schema, fed.loss
    x = torch.from_numpy(rng.uniform(-1, 1, (40, fed.layer_sizes[0])).astype(np.float32))
    y = rng.uniform(size=40).astype(np.float32) if target == "number" else rng.integers(0, schema.outputs, 40)
    if target == "two":
        y = rng.integers(0, 2, 40)
    if target == "several":
        y = np.stack([rng.integers(0, 2, 40), rng.integers(0, 3, 40), rng.uniform(0, 1, 40)], 1).astype(np.float32)
        y[rng.random(y.shape) < 0.3] = np.nan
    group = rng.integers(0, 3, 40) if schema.group is not None else None
    nobody = np.zeros(40, np.uint64)
    whole = Rows(x=x.numpy(), y=y, digests=nobody, columns=(), report=EncodingReport(), group=group)
    shared = SharedTable(whole, schema, key=b"", device=torch.device("cpu"))
    rows = [np.sort(rng.permutation(40)[:size]) for size in sizes]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(score, "SCORING_BATCH", batch)
        found = count_together(fed, weights, shared, rows, exact=exact)
    model = mlp.with_weights(fed, weights)
    alone = exact_counts if exact else objective.score
    for counts, index in zip(found, rows, strict=True):
        its = None if group is None else torch.from_numpy(group)[index]
        expected = alone(model, x[index], torch.from_numpy(y)[index], schema=schema, loss=loss, group=its)
        assert np.allclose(counts, expected, atol=0 if exact or target in ("classes", "two") else 1e-4, rtol=0)
