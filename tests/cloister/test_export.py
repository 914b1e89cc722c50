"""`cloister export` as a person gives it, and what can be done with the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner, Result

import cloister
from common.inference import onnx_predictor, saved
from common.inference.predictor import TorchPredictor
from tests.support import saved_model, table


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cloister.app, [str(a) for a in arguments])


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    Path("model.safetensors").write_bytes(saved.to_bytes(saved_model(seed=3)))
    table(60).write_csv("table.csv")
    return tmp_path


@pytest.mark.parametrize("arguments, path", [([], "small.onnx"), (["--format", "torch"], "small.pt")])
def test_an_exported_file_predicts_and_is_evaluated_as_the_model_is(files, arguments, path):
    done = run("export", "model.safetensors", *arguments)
    assert done.exit_code == 0, done.output
    assert done.output.startswith(f"{path}: ")
    for model, out in (("model.safetensors", "one.csv"), (path, "other.csv")):
        assert run("predict", model, "table.csv", "-o", out).exit_code == 0
    one, other = pl.read_csv("one.csv"), pl.read_csv("other.csv")
    assert one["prediction"].equals(other["prediction"])
    assert (one["probability_1"] - other["probability_1"]).abs().max() < 1e-5
    told = [json.loads(run("evaluate", m, "table.csv", "--json").stdout) for m in ("model.safetensors", path)]
    assert told[0]["confusion"] == told[1]["confusion"]


def test_the_example_beside_a_file_runs_as_it_is_named(files):
    for arguments in ([], ["--format", "torch"]):
        said = run("export", "model.safetensors", *arguments).output
        command = said.split("`")[1].replace("TABLE.csv", "table.csv").split()
        assert command[0] == "python"
        done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, done.stderr


def test_int8_tells_what_it_costs(files):
    done = run("export", "model.safetensors", "--quantize", "int8", "--table", "table.csv", "-o", "q.onnx")
    assert done.exit_code == 0, done.output
    assert "int8: " in done.output and "% with the same class" in done.output
    assert "table.csv: accuracy " in done.output and "of 60 rows" in done.output
    assert "at most" in done.output.splitlines()[1]


def test_a_file_that_predicts_otherwise_is_not_written(files, monkeypatch):
    other = TorchPredictor(saved_model(seed=4))
    monkeypatch.setattr(onnx_predictor.OnnxPredictor, "outputs", lambda self, rows: other.outputs(rows))
    done = run("export", "model.safetensors")
    assert done.exit_code == 2 and "not written: it differs from `cloister predict` by 0." in done.output
    assert not Path("small.onnx").exists()


def test_nothing_is_replaced_unless_it_is_wanted(files):
    Path("small_onnx.py").write_text("mine")
    done = run("export", "model.safetensors")
    assert done.exit_code == 2 and "small_onnx.py: is there already; --force replaces it" in done.output
    assert not Path("small.onnx").exists()
    assert run("export", "model.safetensors", "--force").exit_code == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--quantize", "int8", "--format", "torch"], "--quantize: is for --format onnx"),
        (["--table", "table.csv"], "--table: is for --quantize"),
        (["-o", "model.pt"], "model.pt: its name must end in .onnx"),
        (["-o", "none/model.onnx"], "no such folder"),
        (["--quantize", "int8", "--table", "none.csv"], "none.csv: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(files, arguments, message):
    before = sorted(files.iterdir())
    done = run("export", "model.safetensors", *arguments)
    assert done.exit_code == 2 and message in done.output, done.output
    assert sorted(files.iterdir()) == before


def test_an_onnx_file_is_no_model_to_export(files):
    assert run("export", "model.safetensors").exit_code == 0
    done = run("export", "small.onnx", "-o", "again.onnx")
    assert done.exit_code == 2 and "give what it was exported from" in done.output
    Path("small.onnx").write_bytes(b"x")
    done = run("predict", "small.onnx", "table.csv", "-o", "out.csv")
    assert done.exit_code == 2 and "not an ONNX file that Cloister exported" in done.output


def test_a_missing_package_is_named_with_its_extra(files, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = run("export", "model.safetensors")
    assert done.exit_code == 2
    assert "this needs onnx and onnxruntime: pip install 'cloister[export]'" in done.output
