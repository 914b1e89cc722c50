"""`cloister evaluate` as a person gives it."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner, Result

import cloister
from common.inference import saved
from tests.support import saved_model, table


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cloister.app, ["evaluate", *(str(a) for a in arguments)])


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    Path("model.safetensors").write_bytes(saved.to_bytes(saved_model(seed=3)))
    table(300).write_csv("table.csv")
    return tmp_path


def test_an_evaluation_is_shown_in_tables(files):
    done = run("model.safetensors", "table.csv", "--by", "c", "--by", "a:0")
    assert done.exit_code == 0, done.output
    for words in ("300 rows", "accuracy", "area under the ROC curve", "calibration: Brier score", "by c", "below 0"):
        assert words in done.output, words
    assert "gap in accuracy by a:0: " in done.output and "classes: 0 " in done.output


def test_json_is_all_that_is_on_stdout(files):
    done = run("model.safetensors", "table.csv", "--by", "c", "--json")
    told = json.loads(done.stdout)
    assert told["rows"] == 300 and set(told["by"]["c"]["groups"]) == {"red", "green"}
    assert f"accuracy {100 * told['accuracy']:.1f} %" in " ".join(
        run("model.safetensors", "table.csv").output.replace("│", " ").split()
    )


def test_groups_that_the_schema_declares_are_compared_without_being_asked_for(files):
    group = {"name": "c", "groups": {"warm": ["red"], "cold": ["green"]}}
    Path("model.safetensors").write_bytes(saved.to_bytes(saved_model(seed=3, schema__group=group)))
    told = json.loads(run("model.safetensors", "table.csv", "--by", "a:0", "--json").stdout)
    assert list(told["by"]) == ["c", "a:0"] and list(told["by"]["c"]["groups"]) == ["warm", "cold"]
    again = json.loads(run("model.safetensors", "table.csv", "--by", "c", "--json").stdout)
    assert list(again["by"]["c"]["groups"]) == ["green", "red"]  # as they were asked for
    table(300).drop("c").with_columns(c=pl.lit("blue")).write_csv("blue.csv")
    assert "(other)" in run("model.safetensors", "blue.csv").output
    elsewhere = saved_model(seed=3, schema__group={"name": "sex", "groups": ["f", "m"]})
    Path("model.safetensors").write_bytes(saved.to_bytes(elsewhere))
    assert json.loads(run("model.safetensors", "table.csv", "--json").stdout)["by"] == {}  # a table without it will do


def test_what_a_table_holds_is_shown_as_text(files):
    table(60).with_columns(group=pl.lit("[bold]x[/bold]")).write_csv("odd.csv")
    done = run("model.safetensors", "odd.csv", "--by", "group")
    assert done.exit_code == 0 and "[bold]x[/bold]" in done.output


def test_a_number_is_shown_in_its_units(files):
    number = saved_model(schema__target={"name": "y", "bounds": [100, 300]}, training__loss="mse")
    Path("model.safetensors").write_bytes(saved.to_bytes(number))
    table(200).with_columns(y=200 + 10 * pl.col("a")).write_csv("number.csv")
    done = run("model.safetensors", "number.csv", "--by", "c")
    assert done.exit_code == 0, done.output
    for words in ("mean absolute error", "R squared", "mean prediction", "bias", "gap in mean absolute error by c"):
        assert words in done.output, words


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["model.safetensors", "none.csv"], "none.csv: no such file"),
        (["model.safetensors", "table.csv", "--by", "d"], "--by d: the table has no column d"),
        (["table.csv", "table.csv"], "table.csv: a model is a run folder"),
    ],
)
def test_a_mistake_is_one_line(files, arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output
