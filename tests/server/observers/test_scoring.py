from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from common.data.encoding import encode
from common.errors import DataError
from common.model import mlp, objective
from common.model.scores import scores_of
from server.observers.scoring import HeldOut
from tests.support import federation, table

# A linear model on [a, b, c = red, c = green, c = other], whose two logits are 0 and a + b.
SUM = {
    "layers.0.weight": np.array([[0, 0, 0, 0, 0], [1, 1, 0, 0, 0]], np.float32),
    "layers.0.bias": np.zeros(2, np.float32),
}


def test_a_score_is_what_counting_by_hand_gives(tmp_path):
    rows = table(300)
    rows.write_csv(tmp_path / "held_out.csv")
    score = HeldOut(federation(model__hidden=[]), tmp_path / "held_out.csv")
    predicted, y = (rows["a"] + rows["b"] > 0).to_numpy(), rows["y"].to_numpy() == 1
    metrics = score(SUM)
    assert metrics["accuracy"] == pytest.approx(np.mean(predicted == y))
    assert metrics["per_class"]["1"]["precision"] == pytest.approx((predicted & y).sum() / predicted.sum())
    assert metrics["per_class"]["0"]["recall"] == pytest.approx((~predicted & ~y).sum() / (~y).sum())


def test_a_score_is_objectives_own_on_the_same_table(tmp_path):
    document, rows = federation(model__dropout=0.5), table(100)
    rows.write_parquet(tmp_path / "held_out.parquet")
    model = mlp.build(document, seed=5)
    encoded = encode(rows, document.data_schema)
    x, y = torch.from_numpy(encoded.x), torch.from_numpy(encoded.y)
    counts = objective.score(model, x, y, schema=document.data_schema, loss="cross_entropy")
    score = HeldOut(document, tmp_path / "held_out.parquet")
    assert score(mlp.weights_of(model)) == scores_of(counts, document.data_schema)


def test_each_model_is_scored_by_itself_and_the_table_is_read_once(tmp_path):
    path = tmp_path / "held_out.csv"
    table(200).write_csv(path)
    score = HeldOut(federation(model__hidden=[]), path)
    path.unlink()
    opposite = {name: -array for name, array in SUM.items()}
    first = score(SUM)["accuracy"]
    assert score(opposite)["accuracy"] == pytest.approx(1 - first)
    assert score(SUM)["accuracy"] == first


def test_a_numeric_target_is_scored_in_its_own_unit(tmp_path):
    # Scaled to [0, 1] the targets 10, 15, 20 are 0, 0.5, 1; the model says 0.75, that is 17.5, for all.
    schema = {"features": [{"name": "a", "type": "numeric", "bounds": [0, 1]}], "target": {"name": "y"}}
    schema["target"]["bounds"] = [10, 20]
    pl.DataFrame({"a": [0.1, 0.2, 0.3], "y": [10.0, 15.0, 20.0]}).write_csv(tmp_path / "held_out.csv")
    document = federation(schema=schema, model__hidden=[], training__loss="mse")
    score = HeldOut(document, tmp_path / "held_out.csv")
    state = {"layers.0.weight": np.zeros((1, 1), np.float32), "layers.0.bias": np.full(1, 0.75, np.float32)}
    metrics = score(state)
    assert metrics["mae"] == pytest.approx((7.5 + 2.5 + 2.5) / 3)
    assert metrics["mse"] == pytest.approx((56.25 + 6.25 + 6.25) / 3)


def test_a_score_against_clamped_targets_says_so(tmp_path):
    schema = {"features": [{"name": "a", "type": "numeric", "bounds": [0, 1]}], "target": {"name": "y"}}
    schema["target"]["bounds"] = [10, 20]
    document = federation(schema=schema, model__hidden=[], training__loss="mse")
    state = {"layers.0.weight": np.zeros((1, 1), np.float32), "layers.0.bias": np.full(1, 0.75, np.float32)}
    for targets, clamped in (([10.0, 15.0, 20.0], None), ([10.0, 1500.0, 20.5], 2)):
        pl.DataFrame({"a": [0.1, 0.2, 0.3], "y": targets}).write_csv(tmp_path / "held_out.csv")
        score = HeldOut(document, tmp_path / "held_out.csv")
        assert score(state).get("clamped_targets") == clamped
        assert score.report.targets_clamped == (clamped or 0)


def test_a_table_that_does_not_fit_is_refused_before_any_round(tmp_path):
    table(10).drop("b").write_csv(tmp_path / "held_out.csv")
    with pytest.raises(DataError, match=r"held_out\.csv.*\bb\b"):
        HeldOut(federation(), tmp_path / "held_out.csv")
