"""`cloister compress` as a person gives it, and what the file that it writes does."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import polars as pl
import pytest
from typer.testing import CliRunner, Result

import cloister
from cloister.compress import bytes_of
from common.errors import ConfigError
from common.inference import onnx_predictor, saved
from common.inference.compression import smaller
from common.inference.predictor import TorchPredictor
from tests.support import saved_model, table


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cloister.app, [str(a) for a in arguments])


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(smaller, "PRUNING_STEPS", 10)
    monkeypatch.setattr(smaller, "DISTILLING_STEPS", 100)
    model = saved_model(seed=3, model={"hidden": [24, 12]})
    Path("model.safetensors").write_bytes(saved.to_bytes(model))
    table(60).write_csv("table.csv")
    table(300, seed=1).drop("y").write_csv("public.csv")
    return tmp_path


def test_the_file_that_is_written_does_what_the_table_said(files):
    done = run(
        "compress", "model.safetensors", "--table", "table.csv", "--target-size", "5kB", "--json", "-o", "s.onnx"
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    (chosen,) = (m for m in told["models"] if m["model"] == told["chosen"])
    assert told["written"] == "s.onnx" and Path("s.onnx").stat().st_size == chosen["bytes"] <= 5000
    best = max(m["accuracy"] for m in told["models"] if m["bytes"] <= 5000)
    scored = json.loads(run("evaluate", "s.onnx", "table.csv", "--json").stdout)
    assert scored["accuracy"] == chosen["accuracy"] == best
    assert run("predict", "s.onnx", "table.csv", "-o", "out.csv").exit_code == 0
    hits = pl.read_csv("out.csv")["prediction"] == pl.read_csv("table.csv")["y"]
    assert hits.mean() == pytest.approx(chosen["accuracy"])
    assert "tell a little of its rows" in told["basis"][-1]


def test_the_table_is_shown_with_what_its_figures_are_of(files):
    done = run("compress", "model.safetensors")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    (marked,) = (line for line in lines if line.strip().startswith(">"))
    assert "100.0 %" in next(line for line in lines if line.strip(" >").startswith("original "))
    assert "pruned 95 %, int8" in done.output and "distilled 12, int8" in done.output
    assert all(len(line) <= 100 for line in lines[: lines.index(marked)])
    assert "rows generated from the schema: that costs no privacy\n" in done.output
    assert "is not to be right" in done.output
    assert f"small.onnx: {Path('small.onnx').stat().st_size / 1000:.1f} kB, " in done.output


def test_public_rows_are_taken_at_their_owners_word(files):
    done = run("compress", "model.safetensors", "--rows", "public.csv", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert "for 240 rows of public.csv: that costs no privacy, as long as public.csv is public" in told["basis"][0]
    assert "60 more of them" in told["basis"][1]


def test_numbers_are_compared_in_their_own_units(files):
    model = saved_model(schema__target={"name": "y", "bounds": [0, 4]}, training__loss="mse", model={"hidden": [4]})
    Path("number.safetensors").write_bytes(saved.to_bytes(model))
    done = run("compress", "number.safetensors", "--table", "table.csv")
    assert done.exit_code == 0, done.output
    assert "off by" in done.output and "error" in done.output
    told = json.loads(run("compress", "number.safetensors", "--table", "table.csv", "--force", "--json").stdout)
    scored = json.loads(run("evaluate", "small.onnx", "table.csv", "--json").stdout)
    assert scored["mae"] == next(m["mae"] for m in told["models"] if m["model"] == told["chosen"])


def test_a_seed_gives_one_file(files):
    for out, seed in (("one.onnx", 0), ("two.onnx", 0), ("three.onnx", 1)):
        done = run("compress", "model.safetensors", "-o", out, "--seed", seed, "--target-size", "5kB")
        assert done.exit_code == 0, done.output
    one, two, three = (Path(name).read_bytes() for name in ("one.onnx", "two.onnx", "three.onnx"))
    assert one == two != three


def test_the_example_beside_the_file_runs_as_it_is_named(files):
    said = run("compress", "model.safetensors").output
    command = said.split("`")[1].replace("TABLE.csv", "table.csv").split()
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_where_nothing_fits_nothing_is_written_and_the_smallest_is_named(files):
    before = sorted(files.iterdir())
    done = run("compress", "model.safetensors", "--target-size", "100")
    assert done.exit_code == 2
    assert "original, int8" in done.output and "> " not in done.output
    assert "--target-size 100: nothing is written: the smallest found is " in done.output
    assert "encoding, document and privacy statement alone take about" in done.output
    assert sorted(files.iterdir()) == before
    told = json.loads(run("compress", "model.safetensors", "--target-size", "100", "--json").stdout)
    assert told["chosen"] is None and told["written"] is None


def test_a_file_that_does_otherwise_than_what_was_made_is_not_written(files, monkeypatch):
    other = TorchPredictor(saved_model(seed=4))
    monkeypatch.setattr(onnx_predictor.OnnxPredictor, "outputs", lambda self, rows: other.outputs(rows))
    done = run("compress", "model.safetensors")
    assert done.exit_code == 2 and "not written: it differs from what was made by 0." in done.output
    assert not Path("small.onnx").exists()


@pytest.mark.parametrize(
    "text, size",
    [("50kB", 50_000), ("50 kb", 50_000), ("2MB", 2_000_000), ("50000", 50_000), ("1.5kB", 1500), ("800B", 800)],
)
def test_a_size_is_read_as_people_write_it(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "big", "-5kB", "0", "0.1", "5 GiB", "1e3", "kB", "nan", "٣kB"])
def test_what_is_no_size_is_told_with_what_is_accepted(text):
    with pytest.raises(ConfigError, match="--target-size: must be bytes, kB or MB, as in 50000, 50kB or 2MB"):
        bytes_of(text)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--target-size", "much"], "as in 50000, 50kB or 2MB (got much)"),
        (["-o", "model.pt"], "model.pt: its name must end in .onnx"),
        (["-o", "none/model.onnx"], "no such folder"),
        (["--table", "none.csv"], "none.csv: no such file"),
        (["--rows", "none.csv"], "none.csv: no such file"),
        (["--table", "public.csv"], "lacks y"),
        (["--rows", "few.csv"], "few.csv: 3 rows are too few to make a model smaller on"),
        (["--rows", "unfit.csv"], "unfit.csv: 20 cells do not fit the schema"),
        (["--table", "unfit.csv"], "unfit.csv: 20 cells do not fit the schema"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(files, arguments, message):
    table(3).write_csv("few.csv")
    table(20).with_columns(pl.lit("much").alias("a")).write_csv("unfit.csv")
    before = sorted(files.iterdir())
    done = run("compress", "model.safetensors", *arguments)
    assert done.exit_code == 2 and message in done.output, done.output
    assert sorted(files.iterdir()) == before


def test_nothing_is_replaced_unless_it_is_wanted(files):
    Path("small_onnx.py").write_text("mine")
    done = run("compress", "model.safetensors")
    assert done.exit_code == 2 and "small_onnx.py: is there already; --force replaces it" in done.output
    assert not Path("small.onnx").exists()


def test_what_is_no_model_of_a_run_is_refused(files):
    done = run("compress", "none")
    assert done.exit_code == 2 and "none: no such file or folder" in done.output
    assert run("compress", "model.safetensors").exit_code == 0
    done = run("compress", "small.onnx", "-o", "again.onnx")
    assert done.exit_code == 2 and "give what it was exported from" in done.output


def test_a_missing_package_is_named_with_its_extra(files, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = run("compress", "model.safetensors")
    assert done.exit_code == 2
    assert "this needs onnx and onnxruntime: pip install 'cloister[export]'" in done.output


def test_that_nothing_had_to_be_compressed_is_said(files):
    number = saved_model(schema__target={"name": "y", "bounds": [0, 4]}, training__loss="mse", model={"hidden": [24]})
    Path("wide.safetensors").write_bytes(saved.to_bytes(number))
    done = run("compress", "wide.safetensors", "--target-size", "2MB", "-o", "wide.onnx")
    assert "the original itself is no larger than 2.0 MB: nothing was compressed" in done.output


def test_what_comes_of_a_personal_model_is_called_no_more_private_than_that(files):
    own = replace(saved_model(model={"hidden": [4]}), privacy={"personal": "not to be given away"})
    Path("own.safetensors").write_bytes(saved.to_bytes(own))
    done = run("compress", "own.safetensors", "-o", "own.onnx")
    assert (
        "the original was made of its owner's rows without noise: what comes of it can reveal them, too" in done.output
    )
    held = {p.key: p.value for p in onnx.load("own.onnx").metadata_props}
    assert json.loads(held["compression"])["privacy"].endswith("it can reveal them, too")
