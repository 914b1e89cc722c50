from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

import cloister
from common.errors import ConfigError, RunFolderError
from server.observers.scoring import HeldOut
from server.observers.summary import Summary
from server.rounds.events import RoundEnded
from server.serve import _scorer
from tests.server.observers.test_scoring import SUM
from tests.support import document, federation, table

LINEAR = {"model__hidden": []}


def relies(*columns: tuple[str, float], rows: int = 40) -> dict[str, Any]:
    told = [{"column": name, "worse": worse, "spread": 0.01} for name, worse in columns]
    return {"rows": rows, "repeats": 5, "columns": told}


def test_a_model_relies_on_the_columns_that_it_adds_up(tmp_path):
    table(400).write_csv(tmp_path / "rows.csv")
    score = HeldOut(federation(**LINEAR), tmp_path / "rows.csv", explain_every=2)
    assert "relies_on" not in score(SUM)
    found = score(SUM)["relies_on"]
    assert (found["rows"], found["repeats"]) == (400, 5)
    columns = {column["column"]: column for column in found["columns"]}
    assert [column["column"] for column in found["columns"]][-1] == "c"  # which has no weight
    assert columns["c"]["worse"] == 0.0 and min(columns[name]["worse"] for name in "ab") > 0.1
    assert "relies_on" not in score(SUM)


def test_of_several_targets_the_first_is_explained_on_the_rows_that_have_it(tmp_path):
    targets = {
        "schema__target": {"name": "y", "classes": [0, 1], "optional": True},
        "schema__also": [{"name": "size", "bounds": [0, 2]}],
    }
    rows = table(400).with_columns(size=pl.col("a") + 1)
    rows = rows.with_columns(y=pl.when(pl.int_range(400) % 4 == 0).then(None).otherwise(pl.col("y")))
    rows.write_csv(tmp_path / "rows.csv")
    score = HeldOut(federation(**LINEAR, **targets), tmp_path / "rows.csv", explain_every=1)
    head = [SUM["layers.0.weight"], np.array([[1.0, 0, 0, 0, 0]], np.float32)]
    bias = [SUM["layers.0.bias"], np.array([0.0], np.float32)]
    found = score({"layers.0.weight": np.concatenate(head), "layers.0.bias": np.concatenate(bias)})
    assert found["rows"] == 300 == found["relies_on"]["rows"]
    alone = HeldOut(federation(**LINEAR), _with_y(rows, tmp_path))
    assert found["accuracy"] == alone(SUM)["accuracy"]
    # The head puts out a, clamped to [0, 1]; the target is (a + 1) / 2 of its range.
    a = rows["a"].to_numpy()
    assert found["tasks"]["size"]["mae"] == pytest.approx(2 * np.abs(a.clip(0, 1) - (a + 1) / 2).mean(), abs=1e-4)


def _with_y(rows: pl.DataFrame, folder: Path) -> Path:
    rows.filter(pl.col("y").is_not_null()).write_csv(folder / "with.csv")
    return folder / "with.csv"


def test_of_many_rows_some_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("server.observers.scoring.MOST_EXPLAINED", 50)
    table(400).write_csv(tmp_path / "rows.csv")
    score = HeldOut(federation(**LINEAR), tmp_path / "rows.csv", explain_every=1)
    assert score(SUM)["relies_on"]["rows"] == 50
    assert score(SUM)["relies_on"] == score(SUM)["relies_on"]  # always the same ones


def test_a_summary_says_what_mattered_now_and_before(tmp_path):
    summary = Summary(federation(training__rounds=9), tmp_path)
    summary(RoundEnded(round=1, rounds=9))
    summary(RoundEnded(round=2, rounds=9, held_out={"accuracy": 0.5}))
    assert not (tmp_path / "summary.md").exists()
    first = relies(("a", 0.2), ("b", 0.1), ("c", 0.0))
    summary(RoundEnded(round=3, rounds=9, held_out={"accuracy": 0.625, "relies_on": first}))
    summary(
        RoundEnded(round=6, rounds=9, held_out={"accuracy": 0.75, "relies_on": relies(("b|<x>", 0.3), ("a", -0.0))})
    )
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("# small after round 6 of 9\n")
    assert "accuracy 75.0 %" in text and "dealt anew to 40 of these rows, 5 times" in text
    assert "| b\\|&lt;x> | 30.0 ± 1.0 points |\n| a | 0.0 ± 1.0 points |" in text
    assert "| 3 | accuracy 62.5 % | a, b, c |\n| 6 | accuracy 75.0 % | b\\|&lt;x>, a |" in text


def test_numbers_are_told_in_the_targets_unit(tmp_path):
    number = {"schema__target": {"name": "y", "bounds": [-3, 5]}, "training__loss": "mse"}
    summary = Summary(federation(**number), tmp_path)
    told = relies(*((f"x{i}", 1.5 - i) for i in range(25)))
    summary(RoundEnded(round=1, rounds=3, held_out={"mae": 0.75, "relies_on": told}))
    text = (tmp_path / "summary.md").read_text()
    assert "the mean absolute error 0.75" in text and "| x0 | 1.5 ± 0.01 |" in text
    assert "| x19 |" in text and "| x20 |" not in text and "| and 5 more | |" in text


def test_a_full_disk_ends_it_in_our_own_words(tmp_path):
    summary = Summary(federation(), tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match=r"summary\.md: cannot be written: No such file"):
        summary(RoundEnded(round=1, rounds=3, held_out={"accuracy": 0.5, "relies_on": relies(("a", 0.1))}))


def test_without_rows_to_look_at_nothing_is_explained():
    with pytest.raises(ConfigError, match="--explain-every needs rows that the server may look at: give --held-out"):
        _scorer(federation(), None, 3)
    assert _scorer(federation(), None, None) is None


def test_a_simulation_leaves_a_summary_every_so_many_rounds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("federation.yaml").write_text(json.dumps(document(training__rounds=4)))  # JSON is YAML
    table().write_csv("table.csv")
    rng = np.random.default_rng(3)
    table(60, seed=3).with_columns(pl.Series("a", rng.uniform(-1, 1, 60))).write_csv("held.csv")
    how = ["simulate", "federation.yaml", "--data", "table.csv", "--clients", "2", "--out", "run", "--no-report"]
    done = CliRunner().invoke(cloister.app, [*how, "--held-out", "held.csv", "--explain-every", "2"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run/summary.md").read_text().startswith("# small after round 4 of 4\n")
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    explained = [e["round"] for e in events if "relies_on" in e.get("held_out", {})]
    assert explained == [2, 4]
    bad = CliRunner().invoke(cloister.app, [*how, "--explain-every", "2"])
    assert bad.exit_code == 2 and "--explain-every needs rows" in bad.output
