"""`cloister report` as a person gives it, and the report that a run leaves when it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

import cloister
from cloister.report import after_run
from tests.server.report.runs import completed
from tests.support import document, table

SIMULATED = ["--data", "table.csv", "--clients", "3", "--out", "run", "--device", "cpu", "--quiet"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cloister.app, [str(a) for a in arguments])


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("federation.yaml").write_text(yaml.safe_dump(document()))
    table().write_csv("table.csv")
    return tmp_path


def test_a_run_leaves_its_report_and_its_card(files):
    done = run("simulate", "federation.yaml", *SIMULATED)
    assert done.exit_code == 0, done.output
    assert f"report: {Path('run/report.html')}" in done.output and "model card: run/model_card.md" in done.output
    assert "It completed 3 of 3 rounds." in Path("run/report.html").read_text()
    assert Path("run/model_card.md").read_text().startswith("# Model card: small")


def test_a_run_that_is_to_leave_none_leaves_none(files):
    done = run("simulate", "federation.yaml", *SIMULATED, "--no-report")
    assert done.exit_code == 0 and "report" not in done.output
    assert not Path("run/report.html").exists() and not Path("run/model_card.md").exists()


def test_a_run_that_fails_in_its_first_round_has_a_report_all_the_same(files):
    failing = document(training__learning_rate=1e12, strategy__max_failed_rounds=1)
    Path("federation.yaml").write_text(yaml.safe_dump(failing))
    done = run("simulate", "federation.yaml", *SIMULATED)
    assert done.exit_code == 1 and "report: run/report.html" in done.output
    assert "This run failed: " in Path("run/report.html").read_text()


def test_without_the_packages_a_run_leaves_its_card_and_says_what_is_missing(files, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    record = completed(Path("run"))
    assert after_run(record.path) == [
        "model card: run/model_card.md",
        "no report: pip install 'cloister[report]', then `cloister report` makes it",
    ]
    done = run("report", "run")
    assert done.exit_code == 2 and "this needs altair and vl_convert and jinja2" in done.output


def test_a_report_that_cannot_be_made_is_no_fault_of_the_run(files):
    record = completed(Path("run"))
    (record.path / "privacy.json").write_text("{")
    (said,) = after_run(record.path)
    assert said.startswith("warning: no report: run/privacy.json: cannot be read")
    (record.path / "privacy.json").write_text('{"row": 3}')
    (said,) = after_run(record.path)
    assert said.startswith("warning: no report: run: a file of this run is damaged")


def test_a_bug_in_the_report_keeps_its_traceback_and_leaves_the_run_as_it_ended(files, monkeypatch, caplog):
    record = completed(Path("run"))
    monkeypatch.setattr("server.report.page.report", lambda record: 1 / 0)
    assert after_run(record.path) == []
    assert "its report could not be made" in caplog.text and "ZeroDivisionError" in caplog.text


def test_a_report_is_made_anew_in_its_folder_and_elsewhere_only_by_force(files):
    completed(Path("run"))
    Path("run/report.html").write_text("old")
    done = run("report", "run")
    assert done.exit_code == 0 and done.output.split() == ["run/report.html", "run/model_card.md"]
    assert Path("run/report.html").read_text() != "old"
    Path("mine.html").write_text("mine")
    done = run("report", "run", "-o", "mine.html")
    assert done.exit_code == 2 and "mine.html: is there already; --force replaces it" in done.output
    assert run("report", "run", "-o", "mine.html", "--force").exit_code == 0


def test_pictures_are_written_beside_it_and_replace_nothing(files):
    completed(Path("run"))
    done = run("report", "run", "--png", "pictures")
    assert done.exit_code == 0 and len(list(Path("pictures").glob("*.png"))) == 8
    Path("run/report.html").write_text("as it was")
    done = run("report", "run", "--png", "pictures")
    assert done.exit_code == 2 and "learning.png: is there already" in done.output
    assert Path("run/report.html").read_text() == "as it was"


def test_several_runs_are_compared(files):
    completed(Path("one"))
    completed(Path("two"), changes={})
    done = run("report", "one", "two", "--png", "pictures")
    assert done.exit_code == 0, done.output
    assert "Comparison of 2 runs" in Path("comparison.html").read_text()
    assert sorted(p.name for p in Path("pictures").iterdir()) == ["curves.png", "tradeoff.png"]
    done = run("report", "one", "two")
    assert done.exit_code == 2 and "comparison.html: is there already" in done.output


@pytest.mark.parametrize(
    "spoil, given, message",
    [
        (lambda: None, "none", "none: not the folder of a run"),
        (lambda: None, ".", ".: not the folder of a run, or of one that never began: it has no events.jsonl"),
        (lambda: Path("run/federation.yaml").write_text("a: ["), "run", "federation.yaml:1: not valid YAML"),
        (lambda: Path("run/result.json").write_text("{"), "run", "result.json: cannot be read"),
        (lambda: Path("run/explanation.json").write_text("3"), "run", "explanation.json: damaged"),
    ],
)
def test_what_is_no_run_is_one_line(files, spoil, given, message):
    completed(Path("run"))
    spoil()
    done = run("report", given)
    assert done.exit_code == 2 and message in done.output and done.output.count("error: ") == 1
    assert not Path("run/report.html").exists()
