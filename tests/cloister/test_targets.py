"""The verbs that use a model of several targets: each takes one of them, by default the first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import polars as pl
import pytest
import torch
from typer.testing import CliRunner, Result

import cloister
from common.data.encoding import encode
from common.inference import saved
from common.model import mlp
from tests.support import saved_model, table

ALSO: dict[str, Any] = {
    "schema__also": [
        {"name": "kind", "classes": ["p", "q", "r"], "optional": True},
        {"name": "size", "bounds": [10, 30], "missing": ["?"]},
    ]
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cloister.app, [str(a) for a in arguments])


@pytest.fixture
def logits(tmp_path, monkeypatch) -> np.ndarray:
    """What the model puts out for the rows of table.csv, [200, 6]."""
    monkeypatch.chdir(tmp_path)
    model, rng = saved_model(seed=3, **ALSO), np.random.default_rng(0)
    Path("model.safetensors").write_bytes(saved.to_bytes(model))
    size = [None if i % 4 == 0 else str(10 + i % 20) for i in range(200)]
    rows = table(200).with_columns(
        kind=pl.Series(rng.choice(["p", "q", "r"], 200)), size=pl.Series(size).fill_null("?")
    )
    rows.write_csv("table.csv")
    x = torch.from_numpy(encode(rows, model.federation.data_schema).x)
    with torch.no_grad():
        return mlp.with_weights(model.federation, model.weights)(x).numpy()


def test_predictions_are_those_of_the_target_that_is_asked_for(logits):
    for target, column in (("kind", slice(2, 5)), ("y", slice(0, 2))):
        assert (
            run("predict", "model.safetensors", "table.csv", "-o", f"{target}.csv", "--target", target).exit_code == 0
        )
        found = pl.read_csv(f"{target}.csv")["prediction"].cast(pl.String).to_list()
        names = ["p", "q", "r"] if target == "kind" else ["0", "1"]
        assert found == [names[i] for i in logits[:, column].argmax(1)]
    assert run("predict", "model.safetensors", "table.csv", "-o", "first.csv").exit_code == 0
    assert Path("first.csv").read_text() == Path("y.csv").read_text()
    assert run("predict", "model.safetensors", "table.csv", "-o", "size.csv", "--target", "size").exit_code == 0
    found = pl.read_csv("size.csv")["prediction"].to_numpy()
    np.testing.assert_allclose(found, 10 + 20 * logits[:, 5].clip(0, 1), rtol=1e-5)


def test_a_target_is_evaluated_on_the_rows_that_have_it(logits):
    told = json.loads(run("evaluate", "model.safetensors", "table.csv", "--target", "size", "--json").stdout)
    size = np.array([10 + i % 20 for i in range(200)])
    has = np.arange(200) % 4 != 0
    expected = np.abs(10 + 20 * logits[:, 5].clip(0, 1) - size)[has].mean()
    assert told["rows"] == 150 and told["mae"] == pytest.approx(expected, rel=1e-5)
    assert json.loads(run("evaluate", "model.safetensors", "table.csv", "--json").stdout)["rows"] == 200


def test_an_exported_file_is_of_one_target_and_says_so(logits):
    done = run("export", "model.safetensors", "-o", "kind.onnx", "--target", "kind")
    assert done.exit_code == 0, done.output
    assert run("predict", "kind.onnx", "table.csv", "-o", "one.csv").exit_code == 0
    assert run("predict", "model.safetensors", "table.csv", "-o", "two.csv", "--target", "kind").exit_code == 0
    held = {p.key: p.value for p in onnx.load("kind.onnx").metadata_props}
    whole = saved.from_bytes(Path("model.safetensors").read_bytes(), "it").federation
    assert (held["target"], held["fingerprint"]) == ("kind", whole.fingerprint)
    assert run("export", "model.safetensors", "--target", "size").exit_code == 0 and Path("small-size.onnx").is_file()
    assert pl.read_csv("one.csv")["prediction"].equals(pl.read_csv("two.csv")["prediction"])
    other = run("predict", "kind.onnx", "table.csv", "-o", "three.csv", "--target", "size")
    assert other.exit_code == 2 and "the federation has no target size; it has kind" in other.output
    assert not Path("three.csv").exists()


def test_it_is_explained_by_what_one_target_goes_by(logits):
    done = run("explain", "model.safetensors", "table.csv", "--target", "kind", "--class", "r", "--json")
    assert done.exit_code == 0, done.output
    assert {column["column"] for column in json.loads(done.stdout)["columns"]} == {"a", "b", "c"}


@pytest.mark.parametrize("verb", ["predict", "evaluate", "export", "explain", "compress"])
def test_a_target_that_is_not_there_is_said(logits, verb):
    rows = [] if verb in ("export", "compress") else ["table.csv"]
    out = [] if verb in ("evaluate", "explain") else ["-o", "out.onnx" if verb != "predict" else "out.csv"]
    done = run(verb, "model.safetensors", *rows, *out, "--target", "weight")
    assert done.exit_code == 2 and "the federation has no target weight; it has y, kind, size" in done.output
    assert "Traceback" not in done.output and not [*Path().glob("out.*")]
