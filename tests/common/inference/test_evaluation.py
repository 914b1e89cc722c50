"""Figures of an evaluation are scikit-learn's, over all rows and of each group, however a table is cut into blocks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn import metrics
from sklearn.calibration import calibration_curve

from common.data import tables
from common.data.cells import Cells
from common.errors import ConfigError, DataError
from common.inference.evaluation import evaluate
from common.inference.grouping import Grouping
from common.inference.predictor import TorchPredictor
from common.inference.saved import SavedModel
from common.inference.tallies import proportion_interval
from tests.common.inference.oracle import logits, softmax
from tests.support import saved_model, table

NUMBER = {"schema__target": {"name": "y", "bounds": [100, 300]}, "training__loss": "mse"}
THREE = {"schema__target": {"name": "y", "classes": ["low", "middle", "high"]}}


def told(model: SavedModel, frame: pl.DataFrame, *by: str, skip_bad: bool = False) -> dict[str, Any]:
    given = tables.of_frame(frame)
    groupings = [Grouping.parse(text, given) for text in by]
    return evaluate(given, TorchPredictor(model), by=groupings, skip_bad=skip_bad).to_json()


def three(rows: int) -> pl.DataFrame:
    total = pl.col("a") + pl.col("b")
    named = pl.when(total < -0.3).then(pl.lit("low")).when(total < 0.4).then(pl.lit("middle")).otherwise(pl.lit("high"))
    return table(rows).with_columns(y=named)


def probabilities(model: SavedModel, frame: pl.DataFrame) -> np.ndarray[Any, Any]:
    return np.array([softmax(logits(model, row["a"], row["b"], row["c"])) for row in frame.iter_rows(named=True)])


@pytest.mark.parametrize("cells", [None, 200], ids=["one block", "many blocks"])
def test_figures_of_two_classes_are_scikit_learns(monkeypatch, cells):
    if cells:
        monkeypatch.setattr(tables, "BLOCK_CELLS", cells)
    model, frame = saved_model(seed=3), table(300)
    found, p, y = told(model, frame), probabilities(model, frame), frame["y"].to_numpy()
    predicted = p.argmax(axis=1)
    assert found["rows"] == 300
    assert found["accuracy"] == metrics.accuracy_score(y, predicted)
    assert found["confusion"] == {"classes": ["0", "1"], "counts": metrics.confusion_matrix(y, predicted).tolist()}
    for name, score in (
        ("precision", metrics.precision_score),
        ("recall", metrics.recall_score),
        ("f1", metrics.f1_score),
    ):
        assert found[name] == pytest.approx(score(y, predicted, average="macro", zero_division=0))
    assert found["roc_auc"] == pytest.approx(metrics.roc_auc_score(y, p[:, 1]), abs=1e-6)
    assert found["log_loss"] == pytest.approx(metrics.log_loss(y, p), rel=1e-5)
    assert found["calibration"]["brier"] == pytest.approx(metrics.brier_score_loss(y, p[:, 1]), rel=1e-5)


def test_figures_of_three_classes_are_scikit_learns():
    model, frame = saved_model(seed=5, **THREE), three(400)
    found, p = told(model, frame), probabilities(model, frame)
    y = frame["y"].replace_strict({"low": 0, "middle": 1, "high": 2}).to_numpy()
    assert found["confusion"]["counts"] == metrics.confusion_matrix(y, p.argmax(axis=1), labels=[0, 1, 2]).tolist()
    assert found["calibration"]["brier"] == pytest.approx(metrics.brier_score_loss(y, p), rel=1e-5)
    assert found["log_loss"] == pytest.approx(metrics.log_loss(y, p), rel=1e-5)
    assert "roc_auc" not in found


def test_the_bins_of_calibration_are_scikit_learns_and_their_gaps_the_expected_error():
    model, frame = saved_model(seed=3), table(2000)
    model.weights["layers.1.weight"][:] *= 6  # so that probabilities reach far
    found, p, y = told(model, frame)["calibration"], probabilities(model, frame), frame["y"].to_numpy()
    confidence, right = p.max(axis=1), p.argmax(axis=1) == y
    shares, means = calibration_curve(right, confidence, n_bins=10)
    assert [b["accuracy"] for b in found["bins"]] == pytest.approx(shares)
    assert [b["mean_probability"] for b in found["bins"]] == pytest.approx(means, abs=1e-6)
    assert len(found["bins"]) == 5 and sum(b["rows"] for b in found["bins"]) == 2000
    rows = [np.sum((confidence >= low) & (confidence < low + 0.1)) for low in (0.5, 0.6, 0.7, 0.8, 0.9)]
    assert [b["rows"] for b in found["bins"]] == rows
    expected = sum(n * abs(a - b) for n, a, b in zip(rows, shares, means, strict=True)) / 2000
    assert found["expected_calibration_error"] == pytest.approx(expected, abs=1e-6)


def test_figures_of_a_number_are_in_the_units_of_its_target():
    model = saved_model(**NUMBER)
    frame = table(300).with_columns(y=200 + 60 * pl.col("a"))
    found = told(model, frame)
    scaled = [logits(model, row["a"], row["b"], row["c"])[0] for row in frame.iter_rows(named=True)]
    predicted, y = 100 + 200 * np.clip(scaled, 0, 1), frame["y"].to_numpy()
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(y, predicted), rel=1e-5)
    assert found["rmse"] == pytest.approx(metrics.root_mean_squared_error(y, predicted), rel=1e-5)
    assert found["r2"] == pytest.approx(metrics.r2_score(y, predicted), rel=1e-4)
    assert found["bias"] == pytest.approx(np.mean(predicted - y), rel=1e-4)
    assert found["scaled"]["mae"] * 200 == pytest.approx(found["mae"])
    assert found["scaled"]["mse"] * 200**2 == pytest.approx(found["mse"]) == pytest.approx(found["rmse"] ** 2)
    error = np.abs(predicted - y)
    half = 1.96 * error.std() / math.sqrt(300)
    assert found["mae_interval"] == pytest.approx([error.mean() - half, error.mean() + half], rel=1e-3)
    bins = found["calibration"]["bins"]
    assert sum(b["rows"] for b in bins) == 300
    assert sum(b["rows"] * b["mean_target"] for b in bins) == pytest.approx(y.sum(), rel=1e-5)
    assert all(b["from"] - 1e-3 <= b["mean_prediction"] <= b["to"] + 1e-3 for b in bins)


def test_targets_beyond_the_bounds_are_clamped_and_said():
    found = told(saved_model(**NUMBER), table(50).with_columns(y=pl.lit(500.0)))
    assert found["clamped_targets"] == 50
    assert found["r2"] is None  # all targets are equal


def test_each_group_is_scored_as_if_it_were_the_table():
    model, frame = saved_model(seed=3), table(600)
    frame = frame.with_columns(age=pl.Series(np.linspace(20, 80, 600)))
    found = told(model, frame, "c", "age:40,60")
    assert list(found["by"]) == ["c", "age:40,60"]
    assert list(found["by"]["c"]["groups"]) == ["green", "red"]
    assert list(found["by"]["age:40,60"]["groups"]) == ["below 40", "40 to below 60", "from 60"]
    for column, part, where in [
        ("c", "red", pl.col("c") == "red"),
        ("age:40,60", "below 40", pl.col("age") < 40),
        ("age:40,60", "40 to below 60", (pl.col("age") >= 40) & (pl.col("age") < 60)),
        ("age:40,60", "from 60", pl.col("age") >= 60),
    ]:
        group, alone = found["by"][column]["groups"][part], told(model, frame.filter(where))
        assert (group["rows"], group["accuracy"]) == (alone["rows"], alone["accuracy"])
        assert group["accuracy_interval"] == alone["accuracy_interval"]
        assert group["recall"] == {label: of["recall"] for label, of in alone["per_class"].items()}
        assert group["brier"] == pytest.approx(alone["calibration"]["brier"])
        counts = np.array(alone["confusion"]["counts"])
        assert list(group["predicted"].values()) == pytest.approx(counts.sum(axis=0) / counts.sum())
    accuracies = {name: group["accuracy"] for name, group in found["by"]["age:40,60"]["groups"].items()}
    gap = found["by"]["age:40,60"]["gaps"]["accuracy"]
    assert gap["gap"] == pytest.approx(max(accuracies.values()) - min(accuracies.values()))
    assert accuracies[gap["worst"]] == min(accuracies.values()) and accuracies[gap["best"]] == max(accuracies.values())


def test_groups_differ_in_how_sure_the_model_is_beside_how_often_it_is_right():
    model, frame = saved_model(seed=3), table(300)
    p, y = probabilities(model, frame), frame["y"].to_numpy()
    by = told(model, frame, "c")["by"]["c"]
    sure = {}
    for name in ("red", "green"):
        its = (frame["c"] == name).to_numpy()
        sure[name] = float((p.max(axis=1) - (p.argmax(axis=1) == y))[its].mean())
        assert by["groups"][name]["overconfidence"] == pytest.approx(sure[name], abs=1e-6)
    assert by["gaps"]["overconfidence"]["gap"] == pytest.approx(abs(sure["red"] - sure["green"]), abs=1e-6)
    assert by["gaps"]["overconfidence"]["worst"] == max(sure, key=lambda name: abs(sure[name]))


def test_groups_of_numbers_differ_in_their_bias():
    model = saved_model(**NUMBER)
    frame = table(300).with_columns(y=200 + 20 * pl.col("a"))
    by = told(model, frame, "c")["by"]["c"]
    bias = {name: group["bias"] for name, group in by["groups"].items()}
    assert by["gaps"]["bias"]["gap"] == pytest.approx(abs(bias["red"] - bias["green"]))


def test_of_numbers_the_worst_group_has_the_largest_error():
    frame = table(200).with_columns(y=pl.when(pl.col("c") == "red").then(300.0).otherwise(200.0))
    found = told(saved_model(**NUMBER), frame, "c")["by"]["c"]
    errors = {name: group["mae"] for name, group in found["groups"].items()}
    assert found["gaps"]["mae"]["worst"] == max(errors, key=errors.__getitem__)
    assert found["gaps"]["mae"]["gap"] == pytest.approx(abs(errors["red"] - errors["green"]))


def test_a_gap_to_a_group_of_few_rows_is_none():
    frame = table(200).with_columns(site=pl.Series(["big"] * 150 + ["small"] * 21 + ["other"] * 29))
    found = told(saved_model(seed=3), frame, "site")["by"]["site"]
    assert set(found["groups"]) == {"big", "small", "other"} and found["gaps"] == {}


def test_groups_come_in_a_readers_order_and_what_is_missing_last():
    schema = saved_model(schema__features=[{"name": "a", "type": "numeric", "bounds": [0, 99], "missing": [-9]}])
    frame = pl.DataFrame({"a": ["10", "9", "", "1e1", "-9", "x"]})
    names = Grouping("a").groups(Cells(frame["a"]), schema.federation.data_schema)
    assert names.tolist() == ["10", "9", "(empty)", "10", "(empty)", "x"]
    assert Grouping("a").ordered(map(str, names)) == ["9", "10", "x", "(empty)"]
    cut = Grouping("a", ("9.5",)).groups(Cells(frame["a"]), schema.federation.data_schema)
    assert cut.tolist() == ["from 9.5", "below 9.5", "(empty)", "from 9.5", "(empty)", "(empty)"]
    at = Grouping("a", ("9", "10")).groups(Cells(frame["a"][:2]), schema.federation.data_schema)
    assert at.tolist() == ["from 10", "9 to below 10"]


@pytest.mark.parametrize(
    "hits, rows, expected",
    [
        # Newcombe 1998, "Two-sided confidence intervals for the single proportion", Table I, method 3.
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0000, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_the_interval_of_a_share_is_wilsons(hits, rows, expected):
    assert proportion_interval(hits, rows) == pytest.approx(list(expected), abs=5e-5)


def test_rows_that_do_not_fit_are_told_or_left_out():
    frame = table(40).with_columns(a=pl.col("a").cast(pl.String)).with_row_index()
    bad = frame.with_columns(a=pl.when(pl.col("index") == 3).then(pl.lit("x")).otherwise("a"))
    with pytest.raises(DataError, match="1 cell does not fit the schema:\n  line 4: a: expected a number, found 'x'"):
        told(saved_model(), bad)
    found = told(saved_model(), bad, skip_bad=True)
    assert (found["rows"], found["left_out"]) == (39, 1)
    good = told(saved_model(), frame.filter(pl.col("index") != 3))
    assert found["confusion"] == good["confusion"]


def test_a_table_without_a_row_that_fits_or_without_a_target_is_said(tmp_path):
    with pytest.raises(DataError, match="no row is left to evaluate on"):
        told(saved_model(), table(3).with_columns(a=pl.lit("x")), skip_bad=True)
    path = Path(tmp_path / "t.csv")
    table(3).drop("y").write_csv(path)
    with pytest.raises(DataError, match=r"the table lacks y|does not name"):
        evaluate(tables.read(path, saved_model().federation.data_schema), TorchPredictor(saved_model()))


@pytest.mark.parametrize(
    "text, error, message",
    [
        ("cc", DataError, r"--by cc: the table has no column cc \(did you mean c\?\)"),
        ("d:3", DataError, "the table has no column d"),
        ("a:x", ConfigError, "--by a:x: after the colon expected rising numbers, as in a:40,60"),
        ("a:3,2", ConfigError, "expected rising numbers"),
        ("a:3,nan", ConfigError, "expected rising numbers"),
    ],
)
def test_a_wrong_group_is_said(text, error, message):
    with pytest.raises(error, match=message):
        Grouping.parse(text, tables.of_frame(table(3)))


def test_a_column_may_have_a_colon_in_its_name():
    given = tables.of_frame(pl.DataFrame({"a": [1], "a:b": [1]}))
    assert Grouping.parse("a:b", given) == Grouping("a:b")
    assert Grouping.parse("a:b:3", given) == Grouping("a:b", ("3",))


def test_cuts_are_named_as_they_were_given_and_one_column_may_be_cut_twice():
    frame = table(200).with_columns(date=pl.Series([20200101, 20200110, 20200118, 20200131] * 50))
    found = told(saved_model(seed=3), frame, "date:20200105,20200115", "date:20200120")["by"]
    parts = {name: {part: group["rows"] for part, group in by["groups"].items()} for name, by in found.items()}
    assert parts == {
        "date:20200105,20200115": {"below 20200105": 50, "20200105 to below 20200115": 50, "from 20200115": 100},
        "date:20200120": {"below 20200120": 150, "from 20200120": 50},
    }


def test_a_column_that_holds_no_cells_makes_no_groups():
    given = tables.of_frame(table(3).with_columns(tags=pl.Series([["x"]] * 3)))
    with pytest.raises(DataError, match=r"--by tags: the column holds List\(String\), not text or numbers"):
        Grouping.parse("tags", given)


def test_targets_that_are_all_equal_have_no_r_squared_however_they_are_added_up(monkeypatch):
    monkeypatch.setattr(tables, "BLOCK_CELLS", 500)
    for value in range(101, 300, 7):
        found = told(saved_model(**NUMBER), table(400).with_columns(y=pl.lit(float(value))))
        assert found["r2"] is None, value


def test_a_column_of_too_many_values_says_how_to_cut_it():
    with pytest.raises(DataError, match="--by a: more than 50 values; numbers can be cut, as in --by a:40,60"):
        told(saved_model(), table(100), "a")
