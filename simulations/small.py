"""A small federation and tables that fit it, for tests and measurements."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import polars as pl

from common.document import documents
from common.document.federation import Federation

_SMALL: dict[str, Any] = {
    "name": "small",
    "schema": {
        "features": [
            {"name": "a", "type": "numeric", "bounds": [-1, 1]},
            {"name": "b", "type": "numeric", "bounds": [-1, 1]},
            {"name": "c", "type": "categorical", "categories": ["red", "green"]},
        ],
        "target": {"name": "y", "classes": [0, 1]},
        "validation_fraction": 0.25,
    },
    "model": {"hidden": [8]},
    "training": {"rounds": 3, "local_steps": 2, "batch_size": 8, "learning_rate": 0.1},
    "strategy": {"name": "fedavg", "min_clients": 2, "round_timeout": 30},
    "privacy": {"row": None},
}

PRIVATE = {
    "privacy": {"row": {"epsilon": 4.0, "delta": 1e-3, "clip": 1.0}, "evaluation": {"every": 3, "noise": 3.0}},
}

# Differential privacy for whole clients, at the server.
WHOLE = {
    "privacy": {
        "row": None,
        "client": {"epsilon": 4.0, "delta": 0.01, "clip": 1.0, "clients": 9},
        "evaluation": {"every": 3, "noise": 3.0},
    },
}


def document(**changes: Any) -> dict[str, Any]:
    """A small federation document as plain values. Keys of `changes` are paths, with __ for a step:
    `document(training__rounds=5, privacy={"row": None})`. A value of `...` removes the key."""
    value = copy.deepcopy(_SMALL)
    for path, new in changes.items():
        *steps, last = path.split("__")
        place = value
        for step in steps:
            place = place.setdefault(step, {})
        if new is ...:
            place.pop(last, None)
        else:
            place[last] = copy.deepcopy(new)
    return value


def federation(**changes: Any) -> Federation:
    """A small federation, without privacy unless `**PRIVATE` is given."""
    return documents.validate(document(**changes), Federation)


def table(rows: int = 200, *, seed: int = 0) -> pl.DataFrame:
    """Rows that fit the small federation's schema; y is mostly whether a + b > 0."""
    rng = np.random.default_rng(seed)
    a, b = rng.uniform(-1, 1, (2, rows))
    return pl.DataFrame(
        {
            "a": a,
            "b": b,
            "c": rng.choice(["red", "green"], rows),
            "y": (a + b + 0.2 * rng.normal(size=rows) > 0).astype(int),
        }
    )
