from __future__ import annotations

import asyncio
import io
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from client.join import INTERRUPTS, _until_interrupted
from client.node import Step
from cloister import closing as closing_room
from cloister import progress
from cloister.closing import print_result
from cloister.progress import ProgressDisplay
from cloister.terminal import JoinDisplay, tell
from server.rounds.events import from_json

HOSTILE = ["[/red]", "[bold]x", "[link=http://x]y[/link]", "[red", "\\[x]", "[]", "[[a]]"]


def event(number: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "event": "round",
        "round": number,
        "rounds": 20,
        "clients": 4,
        "asked": 4,
        "train": {"loss": 0.5},
        "rejected": [],
        "seconds": 0.1,
        "waiting": 0.0,
    } | changes


def result(**changes: Any) -> dict[str, Any]:
    metrics = {"accuracy": 0.75, "precision": 0.7, "recall": 0.65, "f1": 0.6}
    return {
        "status": "completed",
        "reason": "",
        "rounds": 20,
        "clients": ["a", "b"],
        "refused": {},
        "seconds": 12.34,
        "evaluation": metrics,
        "held_out": None,
        "privacy": {"row": None, "client": None},
    } | changes


def shown(*events: dict[str, Any], terminal: bool = False, limits: dict[str, float] | None = None) -> str:
    """What a display of these events writes."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100)
    with ProgressDisplay(console, limits=limits or {}) as display:
        for each in events:
            display(from_json(each))
    return file.getvalue()


def closing(outcome: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    print_result(outcome, Path("runs/x"))
    return capsys.readouterr().out


def test_a_plain_display_shows_ten_lines_of_a_long_run_and_always_the_last():
    lines = shown(*(event(n, rounds=25) for n in range(1, 26))).splitlines()
    rounds = [int(line.split()[1].split("/")[0]) for line in lines]
    assert rounds == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 25]


def test_a_line_tells_round_clients_loss_accuracy_and_epsilon():
    line = shown(
        event(
            20,
            evaluation={"accuracy": 0.7712},
            held_out={"accuracy": 0.5},
            privacy={"row": {"epsilon": 2.345, "per_client": {}}, "client": {"epsilon": 1.0}},
        ),
        limits={"row": 4.0, "client": 8.0},
    )
    assert line == (
        "round 20/20  clients 4  loss 0.5000  accuracy 77.1 %  held out: accuracy 50.0 %  "
        "epsilon of a row 2.35 of 4  epsilon of a client 1.00 of 8\n"
    )


def test_the_last_accuracy_stays_until_there_is_a_new_one_and_a_hidden_loss_is_left_out():
    lines = shown(event(2, evaluation={"accuracy": 0.7}), event(4, train={"loss": None})).splitlines()
    assert lines[1] == "round  4/20  clients 4  accuracy 70.0 %"


def test_regression_shows_its_error():
    assert "mean absolute error 12.35" in shown(event(20, evaluation={"mae": 12.3456, "mse": 200.0}))


@pytest.mark.parametrize("terminal", [False, True])
def test_waiting_is_shown(terminal):
    text = shown({"event": "waiting", "clients": 1, "min_clients": 4}, terminal=terminal)
    assert "waiting for clients: 1 of 4" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_a_rejection_and_a_failed_round_are_always_shown(terminal):
    rejected = [{"client": "berlin", "kind": "refused", "reason": "policy.delta: asked 0.1"}]
    text = shown(event(3, rejected=rejected, failed="1 of at least 2 replies"), terminal=terminal)
    assert "round 3: berlin refused: policy.delta: asked 0.1" in text
    assert "round 3: failed: 1 of at least 2 replies" in text


def test_advice_is_shown_with_its_round():
    assert "try a tenth, [4]" in shown(event(3, advice="try a tenth, [4]"))


@pytest.mark.parametrize("terminal", [False, True])
def test_events_that_are_not_shown_are_harmless(terminal):
    assert "start" not in shown({"event": "start", "rounds": 2}, {"event": "end", "status": "stopped"}).lower()
    shown({"event": "end", "status": "completed", "reason": ""}, terminal=terminal)


def test_a_terminal_shows_a_live_line_with_the_time_left():
    text = shown(*(event(n) for n in range(1, 21)), terminal=True)
    assert "round 20/20" in text
    assert "left" in text


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("terminal", [False, True])
def test_a_client_whose_name_or_reason_looks_like_markup_is_shown_as_it_is(name, terminal):
    text = shown(event(3, rejected=[{"client": name, "kind": "lost", "reason": name}], failed=name), terminal=terminal)
    assert f"{name} lost: {name}" in text
    assert f"failed: {name}" in text


def test_the_closing_table_tells_how_the_run_ended(capsys):
    row = {"epsilon": 3.98, "delta": 1e-3, "per_client": {"berlin": 3.9, "lyon": 3.456}}
    held_out = {"accuracy": 0.77, "per_client": {"berlin": {"accuracy": 0.8}}}
    whole = {"epsilon": 1.25, "delta": 0.01}
    text = closing(result(privacy={"row": row, "client": whole}, held_out=held_out, seconds=119.7), capsys)
    figures = {tuple(part.strip() for part in line.strip("│┃").split("│")) for line in text.splitlines()}
    assert "completed after 20 rounds" in text
    assert {
        ("accuracy (from noisy counts)", "75.0 %"),
        ("F1, macro (from noisy counts)", "60.0 %"),
        ("accuracy on held-out rows (exact)", "77.0 %"),
        ("berlin", "80.0 %"),
        ("epsilon of lyon", "3.46"),
        ("epsilon of a row, at most (whole plan)", "3.98"),
        ("delta", "0.001"),
        ("epsilon of a whole client", "1.25"),
        ("delta of a client", "0.01"),
        ("clients", "2"),
        ("time", "2 min 0 s"),
    } <= figures
    assert "run folder: runs/x" in text


def test_the_closing_table_tells_gaps_other_targets_and_energy(capsys):
    of_sex = {
        "accuracy": {"gap": 0.125, "worst": "f", "best": "m", "noise": 0.05},
        "recall of a": {"gap": 0.2, "worst": "m", "best": "f"},
        "recall of b": {"gap": 0.3, "worst": "f", "best": "m"},
    }
    gaps = {"sex": {"groups": {}, "gaps": of_sex}, "age": {"groups": {}, "gaps": {}}}
    tasks = {
        "size": {"mae": 2.5, "mse": 9.0, "rmse": 3.0, "rows": 40.0},
        "kind": {"accuracy": 0.5, "rows": 40.0},
        "rare": {"rows": 0.0},
    }
    told = {"accuracy": 0.75, "by": gaps, "tasks": tasks}
    text = closing(result(evaluation=told, energy={"joules": 1500.0, "grams": 0.2, "per_point": None}), capsys)
    for row in (
        "gap in accuracy by sex │ 12.5 points ± 5.0 points of noise, worst f",
        "gap in recall of b by sex │ 30.0 points, worst f",
        "gap by age │ too few rows to tell",
        "rare: no row has it │",
        "size: MAE │ 2.5",
        "kind: accuracy │ 50.0 %",
        "energy of clients │ 1.5 kJ, 200 mg CO2e",
    ):
        assert row in " ".join(text.split()), text
    assert "recall of a" not in text


def test_the_closing_table_shows_a_held_out_score_of_classes_and_of_a_number(capsys):
    assert "accuracy on held-out rows (exact) │ 81.2 %" in closing(result(held_out={"accuracy": 0.812}), capsys)
    number = closing(result(held_out={"mae": 1.25, "mse": 3.0}), capsys)
    (line,) = [line for line in number.splitlines() if "held-out" in line]
    assert line.strip("│ ").split(" │ ")[0] == "MAE on held-out rows (exact)"
    assert line.strip("│ ").endswith(" 1.25")
    assert "held-out" not in closing(result(), capsys)


def test_exact_figures_are_not_called_noisy(capsys):
    assert "noisy" not in closing(result(), capsys)


def test_a_run_without_evaluation_has_a_closing_table_with_its_reason(capsys):
    text = closing(result(status="budget_exhausted", reason="budgets are spent", evaluation=None), capsys)
    assert "budget exhausted after 20 rounds" in text
    assert "budgets are spent" in text


def test_a_score_against_clamped_targets_is_named_as_that(capsys):
    metrics = {"mae": 0.5, "mse": 0.4, "clamped_targets": 3}
    assert "MAE on held-out rows (exact, but against clamped targets) │" in closing(result(held_out=metrics), capsys)
    del metrics["clamped_targets"]
    assert "MAE on held-out rows (exact) │" in closing(result(held_out=metrics), capsys)


def test_an_evaluation_of_no_rows_is_told_as_that(capsys):
    assert "no validation rows" in shown(event(20, evaluation={}))
    assert "│ evaluation │ no validation rows │" in closing(result(evaluation={}), capsys)
    assert "no validation rows" not in closing(result(evaluation=None), capsys)


@pytest.mark.parametrize("name", HOSTILE)
def test_the_closing_table_shows_names_and_reasons_that_look_like_markup_as_they_are(capsys, name):
    row = {"epsilon": 1.0, "delta": 1e-3, "per_client": {name: 1.0}}
    held_out = {"accuracy": 0.5, "per_client": {name: {"accuracy": 0.5}}}
    text = closing(result(reason=name, privacy={"row": row, "client": None}, held_out=held_out), capsys)
    assert f"epsilon of {name} " in text
    assert text.count(name) == 3


# Many clients


def privacy_of(clients: int) -> dict[str, Any]:
    per_client = {f"client-{i:03}": 1.0 + i for i in range(clients)}
    return {"row": {"epsilon": 400.0, "delta": 1e-5, "per_client": per_client}, "client": None}


def test_of_more_than_ten_clients_the_closing_table_tells_the_least_the_median_and_the_largest(capsys):
    few, many = (closing(result(privacy=privacy_of(clients)), capsys) for clients in (10, 274))
    assert "epsilon of client-009" in few and "10.00" in few
    assert "client-0" not in many
    rows = [line.split("│")[1:3] for line in many.splitlines() if "epsilon of 274 clients" in line]
    assert [(name.strip().split(", ")[1], float(value)) for name, value in rows] == [
        ("least", 1.0),
        ("median", 137.5),
        ("largest", 274.0),
    ]


def test_of_more_than_ten_refusals_their_kinds_are_counted(capsys):
    few = closing(result(refused={"a": "budget_exhausted"}), capsys)
    assert "refused by a" in few
    many = closing(result(refused={f"c{i}": "refused" if i else "budget_exhausted" for i in range(20)}), capsys)
    rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in many.splitlines() if "refused by" in line]
    assert rows == [["refused by clients: refused", "19"], ["refused by clients: budget exhausted", "1"]]


def test_a_pace_is_that_of_the_last_seconds():
    pace = progress.Pace()
    assert pace.updates is None
    pace.note(10, 0.0)
    assert pace.updates is None
    for second in range(1, 4):  # ten a second, in rounds of twenty
        pace.note(20 if second % 2 else 10, float(second))
    assert pace.updates == pytest.approx(10.0) and str(pace) == "10 client updates/s"
    for second in range(4, 30):  # and then one in two seconds
        pace.note(1, second * 2.0)
    assert pace.updates == pytest.approx(0.5) and str(pace) == "0.5 client updates/s"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_simulation_tells_its_pace_and_on_a_terminal_the_time_left(monkeypatch, terminal):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    with ProgressDisplay(Console(file=file, force_terminal=terminal, width=140), limits={}) as display:
        for number in (1, 2):
            for done in (500, 1000):
                now[0] += 1.0
                display.trained(done, 1000)
            display(from_json(event(number)))
    assert "500 client updates/s" in file.getvalue()
    assert ("36.0 s left" in file.getvalue()) is terminal  # eighteen rounds of two seconds


def joined(*steps: Step, width: int = 100) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width)
    with JoinDisplay(console) as display:
        for step in steps:
            display(step)
            display._bar.refresh()
            tell(console, f"a line in round {step.round}")
    return file.getvalue()


def test_a_clients_live_line_tells_its_round_its_task_and_what_that_has_cost():
    begun = Step(round="3", rounds=30, task="train")
    text = joined(begun, replace(begun, done=True, epsilon=0.5, limit=4.0))
    assert "round 3/30  training" in text
    assert "round 3/30  waiting for the others" in text
    assert "epsilon 0.50 of 4 spent" in text
    assert "a line in round 3" in text
    assert text.endswith("\x1b[?25h\r\x1b[1A\x1b[2K")  # the cursor is back, and the line is gone


def test_a_round_that_a_server_calls_otherwise_is_shown_as_it_is_called():
    assert "round x/30  evaluating" in joined(Step(round="x", rounds=30, task="evaluate"))


def test_a_task_that_is_done_is_a_line_where_there_is_no_terminal():
    step = Step(round="3", rounds=30, task="train", done=True)
    assert str(step) == "round 3: train done"
    assert str(replace(step, epsilon=0.5, limit=4.0)) == "round 3: train done, epsilon 0.50 of 4 spent"


def test_a_result_as_json_is_all_that_stdout_has(tmp_path, capsys):
    closing_room.show_end(result(), tmp_path, no_report=True, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told == {**result(), "run_folder": str(tmp_path)}


def test_an_error_that_noise_has_made_zero_is_not_shown_as_none(capsys):
    scaled = {"mae": 0.1, "mse": 0.0}
    text = closing(result(evaluation={"mae": 5.0, "mse": 0.0, "rmse": 0.0, "scaled": scaled}), capsys)
    assert "5 (10 % of its range)" in text
    assert text.count("lost in the noise") == 2


def test_an_interrupted_client_gives_the_terminal_back_before_it_takes_leave():
    """For its process may then end at once, in the middle of a step of training."""
    out = io.StringIO()
    display = JoinDisplay(Console(file=out, force_terminal=True))
    seen: list[str] = []

    class Training:
        async def run(self) -> None:
            display(Step(round="1", rounds=3, task="train"))
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(20)

        async def leave(self, reason: str) -> None:
            display(Step(round="1", rounds=3, task="train", done=True))
            seen.append(out.getvalue())

    handlers = {number: signal.getsignal(number) for number in INTERRUPTS}
    try:
        code = asyncio.run(_until_interrupted(Training(), print, display.close))  # type: ignore[arg-type]  # all it asks
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    hides, shows = "\x1b[?25l", "\x1b[?25h"
    assert code == 130 and seen[0].index(hides) < seen[0].rindex(shows) and seen[0].count(hides) == 1
