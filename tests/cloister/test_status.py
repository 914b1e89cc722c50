"""`cloister status RUN_DIR`: how a run goes or went, by its folder alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import cloister
from server.folder.folder import RunFolder
from server.rounds.events import Ended, Event, Rejected, Resumed, RoundEnded, Serving, Started, Waiting
from tests.server.folder.test_checkpoint import Fleet, Killed, begin
from tests.server.report.runs import completed, rounds, written
from tests.support import federation

SERVING, STARTED = Serving(address="127.0.0.1:1", time=1e9), Started(run="small-1", rounds=3, time=1e9)


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(cloister.app, ["status", *(str(a) for a in arguments)])


def left(path: Path, *events: Event, **result: object) -> Path:
    """The folder of a run that was served, with these events."""
    return written(path, federation(), [SERVING, STARTED, *events], **result).path


def test_a_completed_run_tells_its_figures_what_they_cost_and_who_refused(tmp_path):
    completed(tmp_path / "run")
    told = json.loads(run(tmp_path / "run", "--json").output)
    assert (told["state"], told["round"], told["rounds"]) == ("completed", 3, 3)
    # The helper's clock: it begins at 1e9 s and ends at 2e9 s.
    assert (told["began"], told["last_event"]) == ("2001-09-09T01:46:40+00:00", "2033-05-18T03:33:20+00:00")
    assert told["privacy"] == [{"unit": "row", "spent": 1.5, "limit": 4.0, "delta": 1e-3}]  # 0.5 in each of 3 rounds
    assert told["held_out"]["accuracy"] == pytest.approx(0.85)  # 45 and 40 of 100
    assert [(one["client"], one["kind"], one["rounds"]) for one in told["refused"]] == [
        ("cyd", "late", 1),
        ("dan", "refused", 0),
    ]
    assert (told["resume"], told["cannot_resume"], told["served"]) == (None, "", None)
    shown = run(tmp_path / "run").output
    assert "small: round 3 of 3, completed" in shown and "1.50 of 4" in shown and "accuracy 85.0 %" in shown
    assert "policy.delta: asked 0.001, allowed 0.0001" in shown and "to go on" not in shown


def test_a_run_whose_server_died_says_so_and_how_to_go_on(tmp_path):
    path = tmp_path / "a run"
    with pytest.raises(Killed):
        begin(path, federation(), Fleet(die=lambda kind, number, node: number == 3))
    RunFolder(path).record(SERVING)
    told = json.loads(run(path, "--json").output)
    assert (told["state"], told["served"], told["round"], told["rounds"]) == ("died", False, 2, 3)
    assert told["resume"] == f"cloister serve --resume '{path}'"  # as a shell takes it
    assert "small: round 2 of 3, its server died" in run(path).output


def test_a_run_whose_server_is_at_work_is_told_as_running_and_not_disturbed(tmp_path):
    path = left(tmp_path / "run", *rounds(federation(), count=2), Waiting(clients=1, min_clients=2, time=1e9 + 9))
    with RunFolder(path).lock():
        told = json.loads(run(path, "--json").output)
        shown = run(path).output
    assert (told["state"], told["served"], told["resume"]) == ("waiting for clients", True, None)
    assert "small: round 2 of 2, waiting for clients: 1 of 2" in shown
    with RunFolder(path).lock():  # asking has left none behind
        pass


def test_a_simulation_without_an_end_may_go_on_or_not(tmp_path):
    path = written(tmp_path / "run", federation(), [STARTED, *rounds(federation(), count=1)]).path
    shown = run(path).output
    assert "running" in shown and "whether it still runs is not known" in shown and "cannot go on: " in shown


@pytest.mark.parametrize("status", ["failed", "stopped", "budget_exhausted"])
def test_how_a_run_ended_is_told_with_its_reason(tmp_path, status):
    path = left(tmp_path / "run", Ended(status=status, reason="no [quorum]", time=1e9))
    shown = run(path).output
    assert f"small: round 0 of 3, {status.replace('_', ' ')}" in shown and "reason: no [quorum]" in shown


def test_a_server_that_died_between_its_result_and_its_last_event_had_ended(tmp_path):
    path = left(tmp_path / "run", status="completed", reason="")
    assert json.loads(run(path, "--json").output)["state"] == "completed"


def test_a_resumed_run_counts_from_where_it_went_on(tmp_path):
    path = left(tmp_path / "run", Ended(status="stopped"), Resumed(round=2, rounds=9, time=1e9))
    with RunFolder(path).lock():
        told = json.loads(run(path, "--json").output)
    assert (told["state"], told["round"], told["rounds"], told["reason"]) == ("running", 2, 9, "")


def test_what_others_say_is_shown_without_what_a_terminal_would_take_for_its_own(tmp_path):
    rejected = (Rejected("ada", "rejected", "[red]\x1b[2Jgone\nnext"),)
    path = left(tmp_path / "run", RoundEnded(round=1, rounds=3, rejected=rejected, failed="\x1b]0;title", time=1e9))
    shown = run(path).output
    assert "\x1b" not in shown and "[red] [2Jgone next" in shown and "the last round failed:  ]0;title" in shown


def test_what_is_no_run_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    RunFolder.create(federation(), path=tmp_path / "begun")
    damaged = left(tmp_path / "damaged")
    (damaged / "result.json").write_text("[]")
    for path, why in {
        tmp_path / "none": "no such folder, and of a server it must be HOST:PORT",
        tmp_path / "empty": "not the folder of a run: it has no federation.yaml",
        tmp_path / "begun": "one that never began: it has no events.jsonl",
        damaged: "damaged: it holds no object",
    }.items():
        done = run(path)
        assert (done.exit_code, done.output.count("\n")) == (2, 1)
        assert done.output.startswith("error: ") and why in done.output


@pytest.mark.parametrize(
    "event",
    [
        {"event": "end", "status": "asleep", "reason": "", "time": 2e9},
        {"event": "end", "status": 5, "reason": "", "time": 2e9},
        {"event": "end", "status": "failed", "reason": "", "time": 1e308},
        {**RoundEnded(round=1, rounds=3, clients=2, asked=2, time=1.1e9).to_json(), "evaluation": {"accuracy": {}}},
        {**RoundEnded(round=1, rounds=3, clients=2, asked=2, time=1.1e9).to_json(), "evaluation": [1]},
    ],
)
def test_an_event_that_holds_something_else_is_a_damaged_file_in_one_line(tmp_path, event):
    path = left(tmp_path / "run")
    with (path / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    done = run(path)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "damaged" in done.stderr
    assert isinstance(done.exception, SystemExit)


def test_certificates_are_for_a_server(tmp_path):
    done = run(completed(tmp_path / "run").path, "--certificates", tmp_path)
    assert done.exit_code == 2 and "a run folder is read" in done.output
