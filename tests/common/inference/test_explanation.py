"""What a prediction rests on: figures that a closed form, or scikit-learn, gives too."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.inspection import permutation_importance

from common.data import tables
from common.data.encoding import encode
from common.errors import ConfigError, DataError
from common.inference.explanation import Attributor, Explanation, explain
from common.inference.predictor import TorchPredictor
from common.inference.saved import SavedModel
from tests.support import saved_model, table

NUMBER = {"schema__target": {"name": "y", "bounds": [100, 300]}, "training__loss": "mse"}
LINEAR = {**NUMBER, "model": {"hidden": []}}
THREE = {"schema__target": {"name": "y", "classes": ["low", "middle", "high"]}}


def explained(model: SavedModel, frame: pl.DataFrame, **how: Any) -> Explanation:
    return explain(tables.of_frame(frame), TorchPredictor(model), **how)


def learnt(**changes: Any) -> SavedModel:
    """A model that looks at a, a little at b, and never at c."""
    model = saved_model(**{**LINEAR, **changes})
    weight = model.weights["layers.0.weight"]
    weight[:], model.weights["layers.0.bias"][:] = 0, 0.5
    weight[0, 0], weight[0, 1] = 0.2, 0.05
    return model


def test_attributions_of_a_linear_model_are_its_weights_times_the_distance_from_the_average_row():
    model, frame = learnt(), table(300).with_columns(y=200.0)
    found = explained(model, frame, line=17)
    row, mean = frame.row(16, named=True), frame.select(pl.col("a", "b").mean()).row(0, named=True)
    assert found.row is not None
    assert found.row.attributions["a"] == pytest.approx(200 * 0.2 * (row["a"] - mean["a"]), rel=1e-5)
    assert found.row.attributions["b"] == pytest.approx(200 * 0.05 * (row["b"] - mean["b"]), rel=1e-5)
    assert found.row.attributions["c"] == pytest.approx(0, abs=1e-9)
    assert (found.row.of, found.row.line) == ("", 17)
    assert found.row.cells == {"a": str(row["a"]), "b": str(row["b"]), "c": row["c"]}
    by_name = {column.column: column for column in found.columns}
    assert by_name["a"].attribution == pytest.approx(200 * 0.2 * (frame["a"] - mean["a"]).abs().mean(), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, THREE, {"training__loss": "binary_cross_entropy"}, NUMBER])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_attributions_add_up_to_the_difference_of_the_outputs(changes, activation):
    model = saved_model(**{"model": {"hidden": [16, 8], "activation": activation}, **changes})
    for array in model.weights.values():
        array *= 2
    frame = table(40).drop("y")
    for line in (1, 5, 40):
        found = explained(model, frame, line=line).row
        assert found is not None
        scale = 1 if found.of else 200
        assert sum(found.attributions.values()) == pytest.approx(found.output - found.base, abs=0.01 * scale)
        outputs = TorchPredictor(model).of_inputs(encode(table(40), saved_model().federation.data_schema).x)[line - 1]
        of_three = len(outputs) == 3  # of which the likeliest is explained; of two the second
        assert found.output == pytest.approx(outputs.max() if of_three else outputs[-1], abs=1e-6 * scale)


def test_the_class_that_is_asked_for_is_explained():
    model, frame = saved_model(**THREE), table(20).drop("y")
    asked = explained(model, frame, line=3, of="middle").row
    other = explained(model, frame, line=3, of="high").row
    assert asked is not None and other is not None
    assert (asked.of, other.of) == ("middle", "high")
    outputs = TorchPredictor(model).of_inputs(encode(table(20), saved_model().federation.data_schema).x)[2]
    assert (asked.output, other.output) == pytest.approx((outputs[1], outputs[2]), abs=1e-6)


def test_the_average_row_explains_itself_by_nothing():
    model = saved_model()
    x = encode(table(50), model.federation.data_schema).x
    average = x.mean(axis=0, keepdims=True)
    assert np.abs(Attributor(TorchPredictor(model), None).attribute(average, average)).max() < 1e-12


class _Estimator:
    """What scikit-learn permutes: the model, fed with its inputs."""

    def __init__(self, model: SavedModel) -> None:
        self._predictor = TorchPredictor(model)

    def fit(self, x: Any, y: Any) -> _Estimator:
        return self

    def score(self, x: Any, y: Any) -> float:
        outputs = self._predictor.of_inputs(x)
        return float(
            (outputs.argmax(axis=1) == y).mean() if outputs.shape[1] > 1 else -np.abs(outputs[:, 0] - y).mean()
        )


@pytest.mark.parametrize("numbers", [True, False])
def test_permutation_importance_is_scikit_learns(numbers):
    model = learnt() if numbers else learnt(**THREE, training__loss="cross_entropy")
    if not numbers:
        model.weights["layers.0.weight"][:, :2] = [[-4, -1], [0, 0], [4, 1]]
    frame = table(2000)
    target = 200 + 40 * pl.col("a") + 10 * pl.col("b")
    named = (
        pl.when(target < 190).then(pl.lit("low")).when(target < 210).then(pl.lit("middle")).otherwise(pl.lit("high"))
    )
    frame = frame.with_columns(y=target if numbers else named)
    found = explained(model, frame)
    encoded = encode(frame, model.federation.data_schema)
    y = 100 + 200 * encoded.y.astype(float) if numbers else encoded.y
    oracle = permutation_importance(_Estimator(model), encoded.x, y, n_repeats=20, random_state=1)
    assert [column.column for column in found.columns] == ["a", "b", "c"]
    for column, mean, spread in zip(found.columns, oracle.importances_mean, oracle.importances_std, strict=False):
        assert column.worse == pytest.approx(mean, abs=4 * spread / np.sqrt(5) + 1e-9)
    assert found.columns[0].worse > 5 * found.columns[1].spread  # type: ignore[operator]  # not None
    assert found.baseline == pytest.approx(abs(_Estimator(model).score(encoded.x, y)), rel=1e-5)


def test_inputs_of_one_column_are_permuted_together():
    # A model that sees red and green alone, and is right only if both come from one row.
    colour = {"name": "c", "type": "categorical", "categories": ["red", "green"]}
    model = saved_model(**LINEAR, schema__features=[colour])
    model.weights["layers.0.weight"][:] = [[0.25, -0.25, 0.0]]
    model.weights["layers.0.bias"][:] = 0.5
    frame = pl.DataFrame({"c": ["red", "green"] * 200, "y": [250.0, 150.0] * 200})
    (column,) = explained(model, frame).columns
    # A permuted row is of the other colour half of the time, which is 100 off; inputs apart would also give 200.
    assert column.worse == pytest.approx(50, abs=8)


def test_without_a_target_columns_are_attributed_only():
    found = explained(saved_model(), table(50).drop("y"))
    assert found.baseline is None and all(c.worse is None and c.spread is None for c in found.columns)
    amounts = [c.attribution for c in found.columns]
    assert amounts == sorted(amounts, reverse=True) and amounts[0] > 0


def test_of_a_long_table_some_rows_are_drawn_whatever_its_blocks(monkeypatch):
    model, frame = saved_model(), table(1000)
    once = explained(model, frame, most_rows=100)
    monkeypatch.setattr(tables, "BLOCK_CELLS", 37)
    again = explained(model, frame, most_rows=100)
    assert once.rows == again.rows == 100
    assert once.columns == again.columns
    assert explained(model, frame, most_rows=100, seed=1).columns != once.columns


@pytest.mark.parametrize(
    "how, error, message",
    [
        ({"line": 99}, DataError, "line 99: no row begins there"),
        ({"of": "2"}, ConfigError, "--class 2: the schema has 0, 1"),
    ],
)
def test_what_is_not_there_is_said(how, error, message):
    with pytest.raises(error, match=message):
        explained(saved_model(), table(5), **how)
    with pytest.raises(ConfigError, match="--class x: the target is a number"):
        explained(saved_model(**NUMBER), table(5), of="x")


def test_rows_that_do_not_fit_are_told_left_out_or_have_no_explanation():
    frame = table(5).with_columns(a=pl.Series(["0", "x", "0.5", "1", "0"]))
    with pytest.raises(DataError, match="line 2: a: expected a number, found 'x'"):
        explained(saved_model(), frame)
    assert explained(saved_model(), frame, skip_bad=True).rows == 4
    with pytest.raises(DataError, match="line 2: does not fit the schema, and has no prediction"):
        explained(saved_model(), frame, skip_bad=True, line=2)
