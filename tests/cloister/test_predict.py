"""`cloister predict` as a person gives it: where the model may lie, and what is said of a wrong one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from typer.testing import CliRunner, Result

import cloister
from client.kept import keep
from common.inference.torch_file import from_torch
from server.folder import folder
from tests.support import document, table


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cloister.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a run and a table."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "federation.yaml").write_text(yaml.safe_dump(document(training__rounds=20)))
    table().write_csv(folder / "table.csv")
    where = ["--data", folder / "table.csv", "--clients", 2, "--out", folder / "run", "--device", "cpu", "--quiet"]
    assert run("simulate", folder / "federation.yaml", *where).exit_code == 0
    return folder


@pytest.fixture
def files(finished, tmp_path, monkeypatch) -> Path:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_folder_predicts_and_its_model_file_does_the_same(files):
    done = run("predict", "run", "table.csv", "-o", "out.csv", "--keep", "a")
    assert done.exit_code == 0, done.output
    assert "out.csv: predictions for 200 rows" in done.output
    made = pl.read_csv("out.csv")
    assert made.columns == ["a", "prediction", "probability_0", "probability_1"]
    assert (made["prediction"] == pl.read_csv("table.csv")["y"]).mean() > 0.75, "it has learnt something"
    assert run("predict", "run/model.safetensors", "table.csv", "-o", "same.csv", "--keep", "a").exit_code == 0
    assert Path("same.csv").read_text() == Path("out.csv").read_text()


def test_a_file_that_is_there_is_replaced_only_by_force(files):
    Path("out.csv").write_text("old")
    done = run("predict", "run", "table.csv", "-o", "out.csv")
    assert done.exit_code == 2 and "error: out.csv: is there already; --force replaces it" in done.output
    assert Path("out.csv").read_text() == "old"
    assert run("predict", "run", "table.csv", "-o", "out.csv", "--force").exit_code == 0
    assert Path("out.csv").read_text().startswith("prediction,")


def test_the_table_itself_is_never_replaced(files):
    done = run("predict", "run", "table.csv", "-o", "table.csv", "--force")
    assert done.exit_code == 2 and "table.csv: is what is read; name another file" in done.output


def test_bad_rows_are_left_empty_if_wanted(files):
    Path("new.csv").write_text("a,b,c\n0,0,red\nx,0,red\n")
    done = run("predict", "run", "new.csv", "-o", "out.csv")
    assert done.exit_code == 2 and "line 3: a: expected a number, found 'x'" in done.output
    done = run("predict", "run", "new.csv", "-o", "out.csv", "--skip-bad")
    assert done.exit_code == 0 and "predictions for 2 rows, 1 of them without one" in done.output
    assert "left empty: 1 row that does not fit the schema: line 3" in done.output


def test_rows_that_are_hardly_what_the_schema_means_are_warned_of(files):
    Path("new.csv").write_text("a,b,c\n90,0,red\n80,0,red\n")
    done = run("predict", "run", "new.csv", "-o", "out.csv")
    assert "warning: column a: 2 of 2 cells are outside its bounds" in done.output


@pytest.mark.parametrize(
    "spoil, given, message",
    [
        (lambda: None, "nowhere", "nowhere: no such file or folder; a model is a run folder"),
        (lambda: None, "table.csv", "table.csv: a model is a run folder"),
        (lambda: Path("empty").mkdir(), "empty", "empty: not the folder of a run"),
        (lambda: Path("run/model.safetensors").unlink(), "run", "a run has a model once its first round is complete"),
        (lambda: Path("run/model.safetensors").write_bytes(b"x" * 9), "run", "not the model of a run, or damaged"),
        (lambda: Path("run/privacy.json").write_text("{"), "run", "privacy.json: cannot be read"),
        (lambda: Path("run/federation.yaml").write_text("name: [\n"), "run", "federation.yaml:2: not valid YAML"),
        (
            lambda: Path("run/federation.yaml").write_text(yaml.safe_dump(document(model__hidden=[5]))),
            "run",
            "the model does not fit its federation's document",
        ),
    ],
)
def test_what_is_no_model_is_one_line(files, spoil, given, message):
    spoil()
    done = run("predict", given, "table.csv", "-o", "out.csv")
    assert done.exit_code == 2 and message in done.output
    assert done.output.startswith("error: ") and not Path("out.csv").exists()


CLIENT = """
server: localhost:4433
tls: null
name: ada
data: {path: table.csv, name: ada}
state: state
policy: {epsilon: 4.0, delta: 1.0e-3, without_privacy: true}
"""


def test_a_client_file_predicts_with_the_model_that_the_client_keeps(files):
    Path("ada.yaml").write_text(CLIENT)
    done = run("predict", "ada.yaml", "table.csv", "-o", "out.csv")
    assert done.exit_code == 2 and "ada.models: no model yet" in done.output
    assert run("predict", "run", "table.csv", "-o", "run.csv").exit_code == 0
    path = keep(Path("state/ada.models"), folder.saved_model(Path("run")))
    for model in ("ada.yaml", path):
        done = run("predict", model, "table.csv", "-o", "out.csv", "--force")
        assert done.exit_code == 0, done.output
        assert Path("out.csv").read_text() == Path("run.csv").read_text()


def test_a_client_file_is_evaluated_explained_and_exported_as_the_run_is(files):
    Path("ada.yaml").write_text(CLIENT)
    keep(Path("state/ada.models"), folder.saved_model(Path("run")))
    for arguments in (["evaluate", "{}", "table.csv", "--json"], ["explain", "{}", "table.csv", "--json"]):
        of_run, of_client = (
            run(*(argument.format(model) for argument in arguments)).stdout for model in ("run", "ada.yaml")
        )
        assert of_run == of_client and json.loads(of_run)["rows"] == 200
    for model, name in (("run", "one.pt"), ("ada.yaml", "other.pt")):
        done = run("export", model, "--format", "torch", "-o", name)
        assert done.exit_code == 0, done.output
    one, other = (from_torch(Path(name).read_bytes(), name) for name in ("one.pt", "other.pt"))
    assert all(np.array_equal(one.weights[name], array) for name, array in other.weights.items())


def test_paths_that_cannot_be_are_one_line(files):
    Path("loop.csv").symlink_to("loop.csv")
    for arguments, message in (
        (["run", "table.csv", "-o", "loop.csv"], "loop.csv: "),
        (["run", "table.csv", "-o", "loop.csv", "--force"], "loop.csv: cannot be used"),
        (["run", "table.csv", "-o", f"{'x' * 300}.csv"], "cannot be used: File name too long"),
        (["x" * 300, "table.csv", "-o", "out.csv"], "cannot be used: File name too long"),
    ):
        done = run("predict", *arguments)
        assert done.exit_code == 2 and message in done.output and done.output.startswith("error: "), done.output
        assert done.exception is None or isinstance(done.exception, SystemExit)
