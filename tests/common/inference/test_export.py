"""An exported model predicts what `cloister predict` does, whatever its schema, without Cloister."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import polars as pl
import pytest
import torch

from common.data import tables
from common.errors import ModelError
from common.inference import saved
from common.inference.onnx_model import quantized, to_onnx
from common.inference.onnx_predictor import OnnxPredictor
from common.inference.predict import predict
from common.inference.predictor import TorchPredictor
from common.inference.probes import compare, probes
from common.inference.saved import SavedModel
from common.inference.torch_file import from_torch, inputs_of, to_torch
from tests.common.inference.oracle import logits, softmax
from tests.support import PRIVATE, saved_model

FEATURES: list[dict[str, Any]] = [
    {"name": "plain", "type": "numeric", "bounds": [0, 1]},
    {"name": "far", "type": "numeric", "bounds": [1e9, 1e9 + 1]},  # a float32 has steps of 64 there
    {"name": "marked", "type": "numeric", "bounds": [-5, 5], "missing": [-9, "?"]},
    {"name": "optional", "type": "numeric", "bounds": [0, 100], "optional": True},
    {"name": "unread", "type": "numeric", "bounds": [0, 1], "unfit": "missing"},
    {"name": "colour", "type": "categorical", "categories": ["red", "green"]},
    {"name": "level", "type": "categorical", "categories": [1, 2, 10], "missing": [0]},
    {"name": "code", "type": "categorical", "categories": ["01", "1", "x"], "unfit": "missing"},
    {"name": "truth", "type": "categorical", "categories": [True, False], "optional": True},
    {"name": "strict", "type": "categorical", "categories": ["a", "b"], "unfit": "left_out"},
    {"name": "größe: µ", "type": "numeric", "bounds": [0, 1], "optional": True},
]
TARGETS: dict[str, dict[str, Any]] = {
    "two": {"schema__target": {"name": "y", "classes": [0, 1]}},
    "one output": {"schema__target": {"name": "y", "classes": [0, 1]}, "training__loss": "binary_cross_entropy"},
    "three": {"schema__target": {"name": "y", "classes": ["low", "µ", "high"]}},
    "number": {"schema__target": {"name": "y", "bounds": [-50, 1000]}, "training__loss": "mse"},
}
MODELS: dict[str, dict[str, Any]] = {
    "relu": {"model": {"hidden": [16, 8]}},
    "tanh": {"model": {"hidden": [16], "activation": "tanh"}},
    "sigmoid": {"model": {"hidden": [16], "activation": "sigmoid", "dropout": 0.5}},
}


def mixed(**changes: Any) -> SavedModel:
    model = saved_model(**{"schema__features": FEATURES, **TARGETS["two"], **changes})
    for array in model.weights.values():
        array *= 3  # so that outputs differ from row to row
    return model


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", MODELS)
def test_an_onnx_file_is_as_predict_on_every_kind_of_column(target, kind):
    model = mixed(**TARGETS[target], **MODELS[kind])
    found = compare(TorchPredictor(model), OnnxPredictor(to_onnx(model), "it"), rows=3000)
    assert found.largest < 1e-5
    assert found.same == 1.0


@pytest.mark.parametrize("part", [FEATURES[:1], FEATURES[5:6], FEATURES[:5], FEATURES[5:10], FEATURES[::-1]])
def test_an_onnx_file_is_as_predict_with_columns_of_one_kind_or_in_any_order(part):
    model = mixed(schema__features=part)
    assert compare(TorchPredictor(model), OnnxPredictor(to_onnx(model), "it")).largest < 1e-5


def test_a_comparison_sees_a_model_that_differs():
    model, other = mixed(), mixed()
    other.weights["layers.0.weight"][0, 0] += 1.0
    assert compare(TorchPredictor(model), OnnxPredictor(to_onnx(other), "it")).largest > 1e-3
    broken = mixed()
    broken.weights["layers.0.bias"][:] = np.nan
    assert not compare(TorchPredictor(model), OnnxPredictor(to_onnx(broken), "it")).largest <= 1e-5


def test_made_up_rows_hold_every_kind_of_cell():
    model = mixed()
    frame = probes(model.federation.data_schema, rows=3000)
    far = frame["far"].cast(pl.Float64)
    assert far.min() < 1e9 and far.max() > 1e9 + 1
    assert {"-9", "?", ""} <= set(frame["marked"]) and "" not in set(frame["plain"])
    assert set(frame["strict"]) == {"a", "b"}
    assert {"01", "1", "x", "", "none of those that are listed"} <= set(frame["code"])


def test_whoever_has_only_the_file_feeds_it_columns_of_numbers_and_texts():
    model = saved_model()
    session = onnxruntime.InferenceSession(to_onnx(model), providers=["CPUExecutionProvider"])
    kinds = {put.name: (put.type, put.shape) for put in session.get_inputs()}
    assert kinds == {
        "a": ("tensor(double)", ["rows", 1]),
        "b": ("tensor(double)", ["rows", 1]),
        "c": ("tensor(string)", ["rows", 1]),
    }
    rows = [(0.5, -0.25, "red"), (-3.0, 1.0, "blue"), (0.0, 0.0, "green")]
    fed = {
        "a": np.array([[a] for a, _, _ in rows]),
        "b": np.array([[b] for _, b, _ in rows]),
        "c": np.array([[c] for _, _, c in rows], object),
    }
    prediction, probability = session.run(["prediction", "probabilities"], fed)
    expected = np.array([softmax(logits(model, *row)) for row in rows])
    assert probability == pytest.approx(expected, abs=1e-6)
    assert prediction.tolist() == [str(i) for i in expected.argmax(axis=1)]


@pytest.mark.parametrize("target", TARGETS)
def test_a_number_that_may_not_be_missing_gives_no_prediction_without_it(target):
    session = onnxruntime.InferenceSession(to_onnx(saved_model(**TARGETS[target])), providers=["CPUExecutionProvider"])
    names = [put.name for put in session.get_outputs()]
    fed = {"a": np.array([[np.nan], [0.0]]), "b": np.zeros((2, 1)), "c": np.array([["red"]] * 2, object)}
    found = dict(zip(names, session.run(names, fed), strict=True))
    if target == "number":
        assert np.isnan(found["prediction"]).tolist() == [True, False]
        return
    assert np.isnan(found["probabilities"]).any(axis=1).tolist() == [True, False]
    assert found["prediction"][0] == "" and found["prediction"][1] != ""


def test_an_exported_file_has_nothing_that_its_runtime_warns_of(capfd):
    for target in TARGETS.values():
        onnxruntime.InferenceSession(to_onnx(mixed(**target)), providers=["CPUExecutionProvider"])
    assert capfd.readouterr().err == ""


def test_columns_may_be_called_anything():
    names = ["\nconstant 0", "\n\nMax 1", "a\nb", "probabilities", '"', "x y"]
    model = mixed(schema__features=[{"name": name, "type": "numeric", "bounds": [0, 1]} for name in names])
    assert compare(TorchPredictor(model), OnnxPredictor(to_onnx(model), "it")).largest < 1e-5


def test_the_example_for_onnx_says_which_columns_it_misses(tmp_path):
    (tmp_path / "model.onnx").write_bytes(to_onnx(saved_model()))
    (tmp_path / "t.csv").write_text("a;b;c\n0;0;red\n")
    script = files("common.inference").joinpath("example_onnx.py")
    command = [sys.executable, "-I", str(script), str(tmp_path / "model.onnx"), str(tmp_path / "t.csv")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert "lacks the columns a, b, c; this program reads CSV with commas and a header" in done.stderr


def test_a_column_that_is_named_like_an_output_has_an_input_of_another_name():
    features = [{"name": "prediction", "type": "numeric", "bounds": [0, 1]}, *FEATURES[:1]]
    model = mixed(schema__features=features)
    data = to_onnx(model)
    assert [put.name for put in onnx.load_from_string(data).graph.input] == ["prediction_", "plain"]
    assert compare(TorchPredictor(model), OnnxPredictor(data, "it")).largest < 1e-5


def test_the_file_carries_document_schema_and_privacy_statement():
    model = saved_model(**PRIVATE)
    model.privacy["row"] = {"epsilon": 3.5}  # type: ignore[index]
    for data in (to_onnx(model), quantized(to_onnx(model))):
        held = {p.key: p.value for p in onnx.load_from_string(data).metadata_props}
        assert held["fingerprint"] == model.federation.fingerprint
        assert json.loads(held["privacy"]) == {"row": {"epsilon": 3.5}}
        assert json.loads(held["schema"]) == json.loads(model.federation.canonical)["schema"]
        about = json.loads(held["cloister"])
        assert saved.from_about(about, model.weights, "it").federation == model.federation


def test_int8_is_close_and_smaller_where_the_model_is_large():
    model = saved_model(model={"hidden": [256, 256]})
    data = to_onnx(model)
    packed = quantized(data)
    assert len(packed) < 0.4 * len(data)
    found = compare(TorchPredictor(model), OnnxPredictor(packed, "it"))
    assert 0 < found.largest < 0.02 and found.same > 0.95


@pytest.mark.parametrize("data", [b"", b"nonsense", to_torch(saved_model())])
def test_a_file_that_is_no_export_is_said(data):
    with pytest.raises(ModelError, match="it: not an ONNX file that Cloister exported, or damaged"):
        OnnxPredictor(data, "it")


def test_an_onnx_file_of_another_program_is_said():
    made = onnx.load_from_string(to_onnx(saved_model()))
    del made.metadata_props[:]
    with pytest.raises(ModelError, match="not an ONNX file that Cloister exported"):
        OnnxPredictor(made.SerializeToString(), "it")


# Torch


def test_a_torch_file_comes_back_as_it_was():
    model = mixed()
    back = from_torch(to_torch(model), "it")
    assert back.federation == model.federation and back.round == model.round
    assert all(np.array_equal(back.weights[name], array) for name, array in model.weights.items())


@pytest.mark.parametrize("data", [b"", b"nonsense", to_torch(saved_model())[:900]])
def test_a_file_that_is_no_torch_file_is_said(data):
    with pytest.raises(ModelError, match="it: not a torch file that Cloister exported, or damaged"):
        from_torch(data, "it")


def test_each_input_of_a_model_is_named():
    named = inputs_of(mixed().federation.data_schema)
    assert len(named) == mixed().federation.data_schema.inputs
    assert named[2:5] == [
        "marked: -1 at -5, 1 at 5, clamped, 0 if missing",
        "marked is missing: 1 or 0",
        "optional: -1 at 0, 1 at 100, clamped, 0 if missing",
    ]
    assert "level is 10: 1 or 0" in named and "truth is true: 1 or 0" in named and "colour is another: 1 or 0" in named


# The programs that lie beside an exported file


def example(name: str, *arguments: Path) -> str:
    script = files("common.inference").joinpath(name)
    command = [sys.executable, "-I", str(script), *map(str, arguments)]  # -I: nothing of this project can be imported
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", MODELS)
def test_the_example_for_torch_gives_what_the_model_does(tmp_path, kind):
    model = mixed(**MODELS[kind])
    (tmp_path / "model.pt").write_bytes(to_torch(model))
    last = example("example_torch.py", tmp_path / "model.pt").splitlines()[-1]
    with torch.no_grad():
        expected = TorchPredictor(model).module(torch.zeros(1, model.federation.data_schema.inputs))
    assert json.loads(last[last.index("[[") :]) == pytest.approx(expected.numpy(), rel=1e-6)


@pytest.mark.parametrize("target", ["two", "number"])
def test_the_example_for_onnx_reads_a_table_as_predict_does(tmp_path, target):
    model = mixed(**TARGETS[target])
    schema = model.federation.data_schema
    frame = probes(schema, rows=400)
    frame = frame.with_columns(level=pl.col("level").replace({"1": "1.0", "2": "2e0"}))
    frame = frame.with_columns(truth=pl.col("truth").replace({"true": "TRUE", "false": "0"}))
    frame.write_csv(tmp_path / "t.csv")
    (tmp_path / "model.onnx").write_bytes(to_onnx(model))
    shown = example("example_onnx.py", tmp_path / "model.onnx", tmp_path / "t.csv").splitlines()
    predict(tables.read(tmp_path / "t.csv", schema, with_target=False), TorchPredictor(model), tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        expected = list(csv.DictReader(file))
    assert len(shown) == len(expected) == 400
    for line, row in zip(shown, expected, strict=True):
        said, _, probabilities = line.partition(" ")
        if target == "number":
            assert float(said) == pytest.approx(float(row["prediction"]), rel=1e-6, abs=1e-3)
            continue
        assert said == row["prediction"]
        assert json.loads(probabilities) == pytest.approx([float(row[f"probability_{c}"]) for c in "01"], abs=1e-6)
