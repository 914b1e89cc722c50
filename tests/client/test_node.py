"""A real client process' inner life, against a server that follows a script."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from rich.console import Console
from safetensors import numpy as safetensors

from client import node as node_room
from client.account.entries import cost_of_run, spent
from client.account.plan import NOT_COVERED
from client.account.policy import Policy
from client.node import Node
from client.training import plain
from common.document.federation import Federation
from common.errors import BudgetExhausted, CertificateError, ConnectionFailed, DataError, ProtocolError, Refusal
from common.text import shown_lines
from common.wire import codec, records
from common.wire import session_pb2 as pb
from tests.client.scripted import Link, Script, entries, play
from tests.support import PRIVATE, federation, table


def test_a_node_agrees_answers_and_ends_with_the_run(tmp_path):
    fed = federation()

    async def server(link: Link) -> None:
        await link.welcome(fed)
        assert (await link.hear("ready")).fingerprint == fed.fingerprint
        await link.ask(fed)
        task_id, content = await link.answer()
        assert task_id == "run/train/1/ada"
        assert set(codec.decode(content)["metrics"]) == {"num-examples", "train_loss"}
        await link.say(ack=pb.Ack(id=task_id))
        await link.finish()

    result, said = play(tmp_path, server)
    assert result == "completed"
    assert any("device cpu" in line for line in said)
    assert any(line.startswith("round 1: train done") for line in said)


def test_a_finished_reply_is_sent_again_byte_for_byte_and_charged_once(tmp_path):
    fed = federation(**PRIVATE)
    answers = []

    async def loses_it(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        await link.ask(fed)
        answers.append(await link.answer())  # and no acknowledgement

    async def asks_again(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        await link.ask(fed)
        answers.append(await link.answer())
        await link.say(ack=pb.Ack(id=answers[-1][0]))
        await link.finish()

    result, said = play(tmp_path, loses_it, asks_again)
    assert result == "completed"
    assert answers[0] == answers[1]
    (done,) = [line for line in said if line.startswith("round 1: train done")]
    assert re.fullmatch(r"round 1: train done, epsilon \d\.\d\d of 4 spent", done) and "epsilon 0.00" not in done
    assert [e.task for e in entries(tmp_path) if e.mechanism == "gaussian"] == ["run/train/1"]


def test_the_stored_reply_survives_a_restart_of_the_process(tmp_path):
    fed = federation(**PRIVATE)
    answers = []

    async def ask_and_vanish(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        await link.ask(fed)
        answers.append(await link.answer())
        await link.finish()  # the client ends without an acknowledgement

    async def ask_again(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        await link.ask(fed)
        answers.append(await link.answer())
        await link.finish()

    play(tmp_path, ask_and_vanish)
    play(tmp_path, ask_again)
    assert answers[0] == answers[1]
    assert len([e for e in entries(tmp_path) if e.mechanism == "gaussian"]) == 1


def test_once_acknowledged_a_task_that_is_asked_again_is_charged_again(tmp_path, monkeypatch):
    fed = federation(**PRIVATE)
    # The second question comes before the client has told its owner of the first.
    monkeypatch.setattr(Node, "_report", lambda self, task: time.sleep(0.5))

    async def server(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        first, second = [await _ask_and_acknowledge(link, fed) for _ in range(2)]
        assert first != second  # other noise
        await link.finish()

    play(tmp_path, server)
    charged = [e for e in entries(tmp_path) if e.mechanism == "gaussian"]
    assert [(e.task, e.attempt) for e in charged] == [("run/train/1", 1), ("run/train/1", 2)]


async def _ask_and_acknowledge(link: Link, fed: Federation) -> bytes:
    await link.ask(fed)
    task_id, content = await link.answer()
    await link.say(ack=pb.Ack(id=task_id))
    return content


def test_a_server_that_asks_beyond_the_plan_is_refused_and_nothing_is_charged(tmp_path):
    fed = federation(**PRIVATE)  # three rounds

    async def server(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        for server_round in (1, 2, 3):
            await link.ask(fed, server_round=server_round)
            await link.answer()
        await link.ask(fed, server_round=4)
        failure = await link.hear("failure")
        assert failure.code == records.BUDGET_EXHAUSTED
        assert "3 rounds are all charged" in failure.reason
        await link.finish()

    play(tmp_path, server)
    assert len([e for e in entries(tmp_path) if e.part == "train" and e.mechanism == "gaussian"]) == 3


def test_what_a_private_client_sends_is_only_what_is_accounted(tmp_path):
    fed = federation(**PRIVATE)

    async def server(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        await link.ask(fed)
        _, content = await link.answer()
        reply = codec.decode(content)
        assert set(reply) == {"arrays", "metrics", "privacy"}
        assert set(reply["metrics"]) == {"num-examples"}
        assert reply["metrics"]["num-examples"] == reply["privacy"]["rows"]
        await link.ask(fed, server_round=3, task_type="evaluate")
        _, content = await link.answer()
        reply = codec.decode(content)
        assert set(reply) == {"metrics", "privacy"}
        assert reply["metrics"]["num-examples"] == 1.0
        counts = reply["metrics"]["counts"]
        assert all(c != round(c) for c in counts)  # noisy
        await link.finish()

    _, said = play(tmp_path, server)
    assert [e.mechanism for e in entries(tmp_path)] == ["geometric", "gaussian", "gaussian"]
    (end,) = (line for line in said if line.startswith("run run is over: "))
    charged = cost_of_run(entries(tmp_path), 1e-3)
    assert f"what was charged costs a row epsilon {charged:.2f} at delta 0.001; Opacus (PRV): " in end
    assert float(end.split("Opacus (PRV): ")[1].split(",")[0]) == pytest.approx(charged, abs=0.011)


@pytest.mark.parametrize(
    ("policy", "error", "code", "reason"),
    [
        (Policy(epsilon=8.0, delta=1e-4), Refusal, records.REFUSED, "policy.delta: asked 0.001, allowed 0.0001"),
        (Policy(epsilon=8.0, delta=1e-3, approved=("0" * 64,)), Refusal, records.REFUSED, "policy.approved"),
        (Policy(epsilon=0.1, delta=1e-3), BudgetExhausted, records.BUDGET_EXHAUSTED, NOT_COVERED),
    ],
)
def test_a_policy_refusal_reaches_the_server_with_its_reason_and_charges_nothing(tmp_path, policy, error, code, reason):
    async def server(link: Link) -> None:
        await link.welcome(federation(**PRIVATE))
        failure = await link.hear("failure")
        assert (failure.id, failure.code) == ("", code)
        assert reason in failure.reason
        await link.hear("goodbye")

    result, _ = play(tmp_path, server, policy=policy)
    assert isinstance(result, error)
    if error is BudgetExhausted:
        assert "policy.epsilon: 0.1 at delta 0.001, of which 0.10 is left" in str(result)  # numbers are the owner's
    ledger = tmp_path / "state" / "ada.ledger"
    assert not ledger.exists() or entries(tmp_path) == []


SMALL = {"row": {"epsilon": 4.0, "delta": 1e-3, "clip": 1.0}, "evaluation": {"every": 0}}
A = [{"name": "a", "type": "numeric", "bounds": [-1, 1]}]
RATE = {"epsilon": 4.0, "delta": 1e-3, "clip": 1.0, "count_epsilon": None, "sampling_rate": 0.1}


@pytest.mark.parametrize(
    "probe",
    [
        {"training__batch_size": 333},  # more than there are
        {"training__batch_size": 10},
        {"privacy__row": RATE},  # with 1,200 rows delta is above 1 / rows
        {"schema__target": {"name": "c", "classes": ["red", "blue"]}, "schema__features": A},  # a row with c = green?
        {"schema__features": [{"name": "c", "type": "numeric", "bounds": [0, 1]}]},  # ... whose c is no number?
        {"schema__validation_fraction": 0.9999},  # are all rows in one part?
    ],
    ids=["batch", "small batch", "delta", "class", "cell", "part"],
)
@pytest.mark.parametrize("rows", [0, 1, 5, 1200])
def test_whether_a_private_client_takes_part_says_nothing_about_its_rows(tmp_path, probe, rows):
    document = federation(**{"privacy": SMALL, **probe})

    async def server(link: Link) -> None:
        await link.welcome(document)
        await link.hear("ready")
        await link.finish()

    table(max(rows, 1)).head(rows).write_csv(tmp_path / "ada.csv")
    # With a count, 1,200 rows are too many for the delta, by what was told and paid for.
    policy = Policy(epsilon=8.0, delta=1e-3)
    if rows == 1200 and "privacy__row" not in probe:
        document = federation(**{"privacy": {**SMALL, "row": {**SMALL["row"], "delta": 1e-6}}, **probe})
    result, _ = play(tmp_path, server, policy=policy)
    assert result == "completed"


def test_rows_that_do_not_fit_are_left_out_and_the_owner_hears_which(tmp_path):
    lines = [f"{a / 50},0.5,red,1" for a in range(40)]
    lines[3], lines[7] = "0,confidential,red,1", "0,0.5,red,2"
    (tmp_path / "ada.csv").write_text("\n".join(["a,b,c,y", *lines, ""]))

    async def server(link: Link) -> None:
        await link.welcome(federation(privacy=SMALL))
        await link.hear("ready")
        await link.finish()

    _, said = play(tmp_path, server)
    (told,) = (line for line in said if "left out" in line)
    assert told.startswith("left out: 2 rows that do not fit the schema: line 5: b: expected a number, found")
    assert "confidential" in told and "line 9: y: unknown class '2'" in told
    assert any(line.startswith("38 rows: ") for line in said)


def probes(folder: Path, documents: list[Federation], **policy: Any) -> list[tuple[int, str, str]]:
    """What a server hears to each document, and what the owner is told."""
    heard = []
    for document in documents:

        async def server(link: Link, document: Federation = document) -> None:
            await link.welcome(document, run=document.name)
            try:
                failure = await link.hear("failure")
                heard.append((failure.code, failure.reason))
                await link.hear("goodbye")
            except AssertionError:
                heard.append((0, "ready"))
                await link.finish()

        result, _ = play(folder, server, policy=Policy(epsilon=8.0, delta=1e-3, **policy))
        heard[-1] = (*heard[-1], str(result))
    return heard


def test_documents_that_do_not_fit_hear_one_sentence_and_after_three_none_is_tried(tmp_path):
    def asking(column: str) -> Federation:
        features = [{"name": column, "type": "numeric", "bounds": [0, 1]}]
        return federation(privacy=SMALL, name=f"asks-{column}", schema__features=features)

    heard = probes(
        tmp_path, [asking("x"), asking("y1"), asking("a"), asking("z"), asking("b"), asking("a"), asking("w")]
    )
    sentence = "the client could not open its data; its own log says more"
    assert [reason for _, reason, _ in heard] == [sentence, sentence, "ready", sentence, sentence, "ready", sentence]
    assert {code for code, reason, _ in heard if reason == sentence} == {records.FAILED}
    assert "the table lacks x" in heard[0][2] and "the table lacks z" in heard[3][2]
    assert (
        "policy.refusals: 3 documents that did not fit this table were told so, and 3 may be" in heard[4][2]
    )  # b fits
    assert heard[6][2] == heard[4][2]  # it was not tried
    assert [e.mechanism for e in entries(tmp_path)].count("refusal") == 3
    assert spent(entries(tmp_path), 1e-3) == pytest.approx(0.1)  # one row count
    more = probes(tmp_path, [asking("b")], refusals=4)
    assert more[0][1] == "ready"


def test_a_file_that_is_not_there_is_the_owners_mistake_and_no_refusal(tmp_path):
    async def server(link: Link) -> None:
        await link.welcome(federation(privacy=SMALL))
        await link.hear("failure")
        await link.hear("goodbye")

    (tmp_path / "ada.csv").mkdir()
    result, _ = play(tmp_path, server)
    assert isinstance(result, DataError)
    assert entries(tmp_path) == []


def test_a_document_that_the_owner_did_not_approve_does_not_meet_the_data(tmp_path):
    (tmp_path / "ada.csv").write_text("nothing,fits\n1,2\n")

    async def server(link: Link) -> None:
        await link.welcome(federation(privacy=SMALL))
        failure = await link.hear("failure")
        assert (failure.code, "policy.approved" in failure.reason) == (records.REFUSED, True)
        await link.hear("goodbye")

    result, _ = play(tmp_path, server, policy=Policy(epsilon=8.0, delta=1e-3, approved=("0" * 64,)))
    assert isinstance(result, Refusal)
    assert not (tmp_path / "state" / "ada.ledger").exists()


def test_data_that_does_not_fit_is_the_owners_to_see(tmp_path):
    (tmp_path / "ada.csv").write_text("a,b,c,y\n0,confidential,red,1\n")

    async def server(link: Link) -> None:
        await link.welcome(federation())
        failure = await link.hear("failure")
        assert failure.code == records.FAILED
        assert "confidential" not in failure.reason
        await link.hear("goodbye")

    result, _ = play(tmp_path, server)
    assert isinstance(result, DataError)
    assert "line 2: b: expected a number, found 'confidential'" in str(result)


def test_another_federation_after_a_reconnection_is_refused(tmp_path):
    async def first(link: Link) -> None:
        await link.welcome(federation())
        await link.hear("ready")

    async def then(link: Link) -> None:
        await link.welcome(federation(training__learning_rate=0.2))
        assert "not the one that was agreed to" in (await link.hear("failure")).reason
        await link.hear("goodbye")

    result, _ = play(tmp_path, first, then)
    assert isinstance(result, Refusal)


def test_a_new_run_that_the_budget_does_not_cover_is_refused_to_the_server(tmp_path):
    fed = federation(**PRIVATE)

    async def first(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        for server_round in (1, 2, 3):
            await link.ask(fed, server_round=server_round)
            await link.answer()

    async def then(link: Link) -> None:
        await link.welcome(fed, run="another")
        failure = await link.hear("failure")
        assert (failure.id, failure.code) == ("", records.BUDGET_EXHAUSTED)
        assert failure.reason == NOT_COVERED  # and not what others, or this one, have spent
        await link.hear("goodbye")

    result, _ = play(tmp_path, first, then, policy=Policy(epsilon=4.2, delta=1e-3))
    assert isinstance(result, BudgetExhausted)
    assert "policy.epsilon: 4.2" in str(result)


def test_arrays_that_do_not_fit_the_model_are_refused(tmp_path):
    fed, other = federation(), federation(model__hidden=[3])

    async def server(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        await link.ask(other)
        failure = await link.hear("failure")
        assert failure.code == records.REFUSED
        assert "do not fit the federation's model" in failure.reason
        await link.finish()

    play(tmp_path, server)


NOW, WELCOMED = "before the welcome", "after it"


def a_task(**changes: Any) -> pb.Task:
    return pb.Task(**{"id": "t", "type": "train", "group": "1", "size": 1, "ttl": 9.0, "data": b"x", **changes})


@pytest.mark.parametrize(
    ("when", "frame", "reason"),
    [
        (NOW, {"chunk": pb.Chunk(data=b"x")}, "a frame chunk before the welcome"),
        (NOW, {"task": a_task()}, "a frame task before the welcome"),
        (NOW, {"ack": pb.Ack(id="t")}, "a frame ack before the welcome"),
        (NOW, {}, "a frame None, which is not expected here"),
        (NOW, {"rejected": pb.Rejected(reason="who are you")}, "the server turned us away: who are you"),
        (NOW, {"welcome": pb.Welcome(federation="", run="a\nb", name="ada")}, "a welcome with a run's name that is"),
        (NOW, {"welcome": pb.Welcome(federation="", run="r" * 257, name="ada")}, "a welcome with a run's name that"),
        (NOW, {"welcome": pb.Welcome(federation="", run="r", name="\x1b[2J")}, "a welcome with a client's name that"),
        (WELCOMED, {"chunk": pb.Chunk(data=b"x")}, "a frame chunk, which is not expected here"),
        (WELCOMED, {"task": pb.Task(id="t", size=1 << 40)}, "is not accepted"),
        (
            WELCOMED,
            {"task": pb.Task(id="t", type="query", group="1", size=1, ttl=9, data=b"x")},
            "a task 'query'; known",
        ),
        (
            WELCOMED,
            {"task": pb.Task(id="\x07", type="train", group="1", size=1, ttl=9, data=b"x")},
            "a task with a name",
        ),
        (WELCOMED, {"task": pb.Task(id="t", type="train", group="", size=1, ttl=9, data=b"x")}, "a task with a name"),
        (
            WELCOMED,
            {"task": pb.Task(id="t", type="train", group="1", size=1, ttl=np.nan, data=b"x")},
            "a task of nan s",
        ),
        (WELCOMED, {"task": pb.Task(id="t", type="train", group="1", size=1, ttl=-5, data=b"x")}, "a task of -5 s"),
    ],
)
def test_a_server_that_breaks_the_protocol_is_answered_and_left(tmp_path, when, frame, reason):
    async def server(link: Link) -> None:
        if when == WELCOMED:
            await link.welcome(federation(**PRIVATE))
            await link.hear("ready")
        else:
            await link.hear("hello")
        await link.say(**frame)
        failure = await link.hear("failure")
        assert (failure.id, failure.code) == ("", records.FAILED)
        assert failure.reason.startswith("protocol error: ")
        assert reason in failure.reason

    result, _ = play(tmp_path, server)
    assert isinstance(result, ProtocolError)
    assert reason in str(result)


@pytest.mark.parametrize("wrong", [{"id": "\x07"}, {"group": "\n"}, {"type": "query"}, {"ttl": np.nan}])
def test_a_task_is_turned_away_by_its_head_and_its_content_is_not_waited_for(tmp_path, wrong):
    async def server(link: Link) -> None:
        await link.welcome(federation())
        await link.hear("ready")
        await link.say(task=a_task(size=1 << 29, **wrong))  # of which one byte comes
        failure = await link.hear("failure")
        assert failure.reason.startswith("protocol error: a task ")

    result, _ = play(tmp_path, server)
    assert isinstance(result, ProtocolError)


def test_a_task_of_another_run_than_the_welcomed_one_is_refused_and_not_charged(tmp_path):
    fed = federation(**PRIVATE)

    async def server(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        for kind in ("train", "evaluate"):
            await link.ask(fed, run="another", task_type=kind)
            failure = await link.hear("failure")
            assert failure.code == records.REFUSED
            assert failure.reason == "this task is of another run than the one that this client was welcomed to"
        await link.ask(fed)
        await link.answer()
        await link.finish()

    play(tmp_path, server)
    assert [(e.mechanism, e.run) for e in entries(tmp_path)] == [("geometric", "run"), ("gaussian", "run")]


@pytest.mark.parametrize("document", [federation(), federation(**PRIVATE)], ids=["exact", "private"])
def test_max_rounds_holds_whatever_runs_and_documents_are_called(tmp_path, document):
    told: list[str] = []

    def asking(number: int) -> Script:
        async def server(link: Link) -> None:
            renamed = document.model_copy(update={"name": f"name-{number}"})
            await link.welcome(renamed, run=f"run-{number}")
            await link.hear("ready")
            await link.ask(renamed, run=f"run-{number}")
            frame = await asyncio.wait_for(anext(link._requests), 30)
            told.append(frame.failure.reason if frame.HasField("failure") else "update")
            await link.finish()

        return server

    policy = Policy(epsilon=100.0, delta=1e-3, without_privacy=True, max_rounds=3)
    for number in range(5):
        play(tmp_path, asking(number), policy=policy)
    assert told == ["update"] * 3 + ["policy.max_rounds: asked 4, allowed 3"] * 2


EVIL = "\x1b[2J\x1b[31m\x07\x9b8m\u202eEVIL\r\n"


def every_text_field() -> list[tuple[str, str]]:
    frames = pb.ServerFrame.DESCRIPTOR.fields
    found = [(f.name, t.name) for f in frames for t in f.message_type.fields if t.type == t.TYPE_STRING]
    assert ("welcome", "run") in found and ("goodbye", "reason") in found and len(found) >= 8
    return found


@pytest.mark.parametrize(("frame", "text"), every_text_field())
def test_no_text_of_a_server_can_move_the_owners_cursor(tmp_path, capfd, frame, text):
    fed = federation(**PRIVATE)

    async def server(link: Link) -> None:
        await link.hear("hello")
        welcome = {"federation": fed.canonical, "run": "run", "name": "ada"}
        if frame == "welcome":
            # In the document too: a column's name is shown where the table lacks it.
            named = json.dumps(json.loads(fed.canonical) | {"schema": {"features": [{"name": EVIL}]}})
            await link.say(welcome=pb.Welcome(**{**welcome, text: named if text == "federation" else EVIL}))
        else:
            await link.say(welcome=pb.Welcome(**welcome))
            await link.hear("ready")
            finished = {"finished": True} if frame == "goodbye" else {}
            kind = {"task": a_task, "rejected": pb.Rejected, "ack": pb.Ack, "goodbye": pb.Goodbye}[frame]
            await link.say(**{frame: kind(**finished, **{text: EVIL})})
        with contextlib.suppress(Exception):  # the client may have left
            if frame != "ack":
                await link.hear("failure")
            await link.say(goodbye=pb.Goodbye(reason=EVIL, finished=True))

    result, said = play(tmp_path, server)
    console, err = Console(file=io.StringIO()), io.StringIO()
    for line in [*said, shown_lines(str(result))]:
        console.print(line, markup=False)
    printed = console.file.getvalue() + err.getvalue() + "".join(capfd.readouterr())  # type: ignore[attr-defined]
    assert "EVIL" in printed or (frame, text) in [("ack", "id"), ("welcome", "federation")]
    assert not [c for c in printed if not c.isprintable() and c != "\n"]


def test_an_array_that_the_server_names_is_told_to_the_owner_as_text(tmp_path):
    fed = federation()
    content = safetensors.save({EVIL: np.zeros(1)}, metadata={"cloister": "[]"})

    async def server(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        await link.say(task=a_task(size=len(content), ttl=60.0, data=content))
        assert (await link.hear("failure")).code == records.FAILED
        await link.finish()

    _, said = play(tmp_path, server)
    (told,) = (line for line in said if "arrays that belong to no record" in line)
    assert "EVIL" in told and told.isprintable()


def test_a_column_that_the_server_names_is_shown_as_text(tmp_path):
    named = federation(privacy=SMALL, schema__features=[{"name": EVIL, "type": "numeric", "bounds": [0, 1]}])

    async def server(link: Link) -> None:
        await link.welcome(named)
        await link.hear("failure")
        await link.hear("goodbye")

    result, _ = play(tmp_path, server)
    assert "EVIL" in str(result)
    assert all(line.isprintable() for line in shown_lines(str(result)).split("\n"))


def test_whoever_leaves_is_heard_and_does_not_come_back(tmp_path):
    fed = federation()

    async def server(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        assert (await link.hear("goodbye")).reason == "interrupted"

    result, said = play(tmp_path, server, leave_when=lambda said: any("ready" in line for line in said))
    assert result == "left"
    assert not any("no server at" in line for line in said)


def test_a_task_in_hand_is_finished_and_kept_when_its_owner_leaves(tmp_path, monkeypatch):
    fed = federation()
    started, fit = threading.Event(), plain.fit

    def slow(*args: Any, **kwargs: Any) -> float:
        started.set()
        time.sleep(1.0)  # the goodbye is said and the stream has ended meanwhile
        return fit(*args, **kwargs)

    monkeypatch.setattr(plain, "fit", slow)

    async def server(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        await link.ask(fed)
        await link.hear("goodbye")

    result, _ = play(tmp_path, server, leave_when=lambda said: started.is_set())
    assert result == "left"
    (kept,) = [path for path in (tmp_path / "state" / "ada.outbox").rglob("*") if path.is_file()]
    assert kept.stat().st_size > 100


def test_a_server_that_stays_away_is_given_up(tmp_path):
    async def server(link: Link) -> None:
        await link.welcome(federation())
        await link.hear("ready")

    async def broken(link: Link) -> None:
        raise_away = link._context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        try:
            await raise_away
        except BaseException:
            return

    result, said = play(tmp_path, server, *[broken] * 20, wait_s=0.5)
    assert isinstance(result, ConnectionFailed)
    assert any("waiting up to 0.5 s" in line for line in said)


def test_a_stored_reply_is_not_for_another_federation_that_asks_for_the_same_task(tmp_path):
    first, second = federation(), federation(name="second")

    async def server(link: Link, fed: Federation) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        await link.ask(fed)
        await link.answer()  # never acknowledged
        await link.finish()

    for fed in (first, first, second):
        play(tmp_path, functools.partial(server, fed=fed))
    assert [e.federation for e in entries(tmp_path)] == [first.fingerprint, second.fingerprint]  # trained twice


# The owner is asked


ASK = Policy(epsilon=8.0, delta=1e-3, approved="ask")


def test_a_yes_is_asked_for_once_and_remembered(tmp_path):
    fed = federation(**PRIVATE)

    async def server(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        await link.finish()

    result, said = play(tmp_path, server, policy=ASK, answer=True)
    assert result == "completed"
    (question,) = [line for line in said if "Take part in this federation?" in line]
    assert fed.fingerprint in question and "epsilon: 4.0" in question
    result, said = play(tmp_path, server, policy=ASK, answer=False)  # not asked again
    assert result == "completed"
    assert not any("Take part" in line for line in said)


@pytest.mark.parametrize(
    "answer, reason", [(False, "the owner said no"), (None, "policy.approved is ask, and the owner has not said yes")]
)
def test_a_no_or_nobody_there_is_a_refusal_that_touches_nothing(tmp_path, answer, reason):
    async def server(link: Link) -> None:
        await link.welcome(federation(**PRIVATE))
        failure = await link.hear("failure")
        assert (failure.code, failure.reason.startswith(reason)) == (records.REFUSED, True)
        await link.hear("goodbye")

    result, _ = play(tmp_path, server, policy=ASK, answer=answer)
    assert isinstance(result, Refusal)
    assert not (tmp_path / "state" / "ada.ledger").exists()


def test_nobody_is_asked_about_what_the_policy_rules_out(tmp_path):
    async def server(link: Link) -> None:
        await link.welcome(federation())  # without privacy
        assert (await link.hear("failure")).reason.startswith("policy.without_privacy is false")
        await link.hear("goodbye")

    result, said = play(tmp_path, server, policy=ASK, answer=True)
    assert isinstance(result, Refusal)
    assert not any("Take part" in line for line in said)


# What a server might try


def test_what_a_server_writes_beside_the_task_changes_nothing(tmp_path):
    """More steps, less noise, a larger clip, an epsilon or a seed in a message: only the agreed document counts."""
    fed = federation(**PRIVATE)
    greedy = {"local_steps": 500, "noise_multiplier": 0.0, "clip": 1e9, "epsilon": 1e9, "seed": 1, "sampling_rate": 1.0}

    async def server(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        await link.ask(fed, **greedy)
        await link.answer()
        await link.ask(fed, server_round=2)
        await link.answer()
        await link.finish()

    assert play(tmp_path, server)[0] == "completed"
    asked, plain = [e for e in entries(tmp_path) if e.mechanism == "gaussian"]
    assert (asked.steps, asked.noise_multiplier, asked.sampling_rate) == (
        plain.steps,
        plain.noise_multiplier,
        plain.sampling_rate,
    )
    assert asked.steps == 2


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_a_real_clients_noise_follows_no_seed_of_the_document(tmp_path, seeds):
    """Equal seeds do not repeat it; were it drawn from the seed, the first two updates would be equal."""
    updates = []
    for number, seed in enumerate(seeds):
        fed = federation(**PRIVATE, training__seed=seed)

        async def server(link: Link, fed: Federation = fed, number: int = number) -> None:
            await link.welcome(fed, run=f"run-{number}")
            await link.hear("ready")
            await link.ask(federation(**PRIVATE), run=f"run-{number}")  # the same model to start from
            updates.append(codec.decode((await link.answer())[1])["arrays"])
            await link.finish()

        folder = tmp_path / f"{number}"
        folder.mkdir()
        (folder / "state").mkdir()
        (folder / "state" / "split.key").write_bytes(b"k" * 32)  # the same rows to train on
        assert play(folder, server)[0] == "completed"
    first, second = (np.concatenate([np.ravel(a.numpy()) for a in u.values()]) for u in updates)
    difference = first - second
    assert (difference != 0).all()
    # Two independent noises: learning rate x clip x multiplier / batch size, sqrt(2) for two, sqrt(2) for two steps.
    (sigma,) = {e.noise_multiplier for e in entries(tmp_path / "0") if e.mechanism == "gaussian"}
    assert sigma is not None
    assert np.std(difference) > 0.7 * 0.1 * sigma / 8 * 2


# Rounds that must not come too fast

SLOW = Policy(epsilon=8.0, delta=1e-3, min_seconds_between_rounds=2.0)


def test_a_client_waits_until_its_policy_allows_the_next_round(tmp_path):
    fed, began = federation(**PRIVATE), time.monotonic()

    async def server(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        for server_round in (1, 2):
            await link.ask(fed, server_round=server_round)
            await link.answer()
        await link.finish()

    result, said = play(tmp_path, server, policy=SLOW)
    assert result == "completed"
    assert any(line.startswith("round 2: waiting") for line in said)
    assert not any(line.startswith("round 1: waiting") for line in said)
    assert time.monotonic() - began > 1.0  # entries have whole seconds


def test_a_round_that_cannot_wait_so_long_is_refused_with_the_rule(tmp_path):
    fed, patient = federation(**PRIVATE), Policy(epsilon=8.0, delta=1e-3, min_seconds_between_rounds=3600)

    async def server(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        await link.ask(fed)
        await link.answer()
        await link.ask(fed, server_round=2, ttl=30)
        failure = await link.hear("failure")
        assert failure.code == records.REFUSED
        assert failure.reason.startswith("policy.min_seconds_between_rounds: asked a round at")
        await link.finish()

    assert play(tmp_path, server, policy=patient)[0] == "completed"
    assert sum(e.mechanism == "gaussian" for e in entries(tmp_path)) == 1


# What a broken link means


def broken_link(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    empty = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, empty, empty, details)


@pytest.mark.parametrize(
    "code, details, told",
    [
        (
            grpc.StatusCode.UNAUTHENTICATED,
            "not accepted",
            "the server does not accept our certificate; it may be revoked",
        ),
        (
            grpc.StatusCode.UNAVAILABLE,
            "x CERTIFICATE_VERIFY_FAILED x",
            "not from the authority we trust",
        ),
        (grpc.StatusCode.UNAVAILABLE, "x Hostname Verification Check failed", "is for another host than the address"),
        (grpc.StatusCode.UNAVAILABLE, "SSL: WRONG_VERSION_NUMBER", "it does not speak TLS"),
    ],
)
def test_a_certificate_that_is_not_accepted_is_not_tried_again(code, details, told):
    with pytest.raises(CertificateError, match=told):
        node_room._reason(broken_link(code, details))


@pytest.mark.parametrize("code", [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ALREADY_EXISTS])
def test_a_server_that_is_full_or_has_our_older_session_is_tried_again(code):
    assert node_room._reason(broken_link(code, "told to wait\nand more")) == "told to wait"


def test_a_server_that_will_come_back_is_waited_for(tmp_path):
    fed = federation()

    async def first(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        await link.say(goodbye=pb.Goodbye(reason="upgrade", comes_back=True))

    async def second(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        await link.finish()

    result, said = play(tmp_path, first, second)
    assert result == "completed"
    assert "the server has ended and will come back: upgrade" in said
