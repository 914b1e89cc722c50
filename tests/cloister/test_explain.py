"""`cloister explain` as a person gives it."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner, Result

import cloister
from common.inference import saved
from server.folder.folder import RunFolder
from tests.support import saved_model, table


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cloister.app, ["explain", *(str(a) for a in arguments)])


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    Path("model.safetensors").write_bytes(saved.to_bytes(saved_model(seed=3)))
    table(80).write_csv("table.csv")
    return tmp_path


def test_columns_are_shown_and_one_row_with_its_cells(files):
    done = run("model.safetensors", "table.csv", "--row", "2")
    assert done.exit_code == 0, done.output
    for words in ("80 rows, accuracy ", "accuracy lost", "points", "line 2: probability of 1", "average row "):
        assert words in done.output, words
    assert str(pl.read_csv("table.csv")["a"][0]) in done.output
    assert sorted(p.name for p in files.iterdir()) == ["model.safetensors", "table.csv"]


def test_json_has_all_of_it(files):
    told = json.loads(run("model.safetensors", "table.csv", "--row", "2", "--json").stdout)
    assert {c["column"] for c in told["columns"]} == {"a", "b", "c"} == set(told["row"]["attributions"])
    assert told["metric"] == "accuracy" and told["rows"] == 80


def test_in_a_run_folder_it_is_kept_for_the_report_without_the_row(files):
    model = saved_model(seed=3)
    folder = RunFolder.create(model.federation, path=Path("run"))
    folder.save_model(model.weights, server_round=3)
    assert run("run", "table.csv", "--row", "2").exit_code == 0
    kept = json.loads(Path("run/explanation.json").read_text())
    assert kept["row"] is None and len(kept["columns"]) == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["table.csv", "--row", "999"], "line 999: no row begins there"),
        (["table.csv", "--class", "z"], "--class z: the schema has 0, 1"),
        (["none.csv"], "none.csv: no such file"),
    ],
)
def test_a_mistake_is_one_line(files, arguments, message):
    done = run("model.safetensors", *arguments)
    assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output
