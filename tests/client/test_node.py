"""A real client process' inner life, against a server that follows a script."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from rich.console import Console
from safetensors import numpy as safetensors

from client import node as node_room
from client.account.entries import cost_of_run, spent
from client.account.ledger import Ledger
from client.account.plan import NOT_COVERED
from client.account.policy import Policy
from client.node import Node
from client.settings import ClientFile, DataFile
from client.training import plain
from common.document.federation import Federation
from common.errors import BudgetExhausted, CertificateError, ConnectionFailed, DataError, ProtocolError, Refusal
from common.inference import saved
from common.model import mlp
from common.text import shown_lines
from common.wire import codec, protocol, records
from common.wire import session_pb2 as pb
from common.wire import session_pb2_grpc as service
from tests.support import PRIVATE, federation, saved_model, table

Script = Callable[["Link"], Awaitable[None]]


class Link:
    """The server's end of one stream."""

    def __init__(self, requests: AsyncIterator[pb.ClientFrame], context: Any) -> None:
        self._requests, self._context = requests, context
        self.finished = False  # has it said its last word? The client may hang up before that is written to its end

    async def hear(self, kind: str) -> Any:
        frame = await asyncio.wait_for(anext(self._requests), 30)
        assert frame.WhichOneof("frame") == kind, frame
        return getattr(frame, kind)

    async def say(self, **frame: Any) -> None:
        await self._context.write(pb.ServerFrame(**frame))

    async def welcome(self, fed: Federation, *, run: str = "run") -> None:
        hello = await self.hear("hello")
        assert hello.protocol == protocol.PROTOCOL
        await self.say(welcome=pb.Welcome(federation=fed.canonical, run=run, name="ada"))

    async def ask(
        self,
        fed: Federation,
        *,
        server_round: int = 1,
        task_type: str = "train",
        run: str = "run",
        ttl: float = 60,
        **config_too: Any,
    ) -> None:
        arrays = records.from_weights(mlp.weights_of(mlp.build(fed)))
        config = ConfigRecord({"run": run, "server-round": server_round, **config_too})
        content = codec.encode(RecordDict({"arrays": arrays, "config": config}))
        task_id = f"{run}/{task_type}/{server_round}/ada"
        group = str(server_round)
        for frame in protocol.task_frames(task_id, type=task_type, group=group, ttl=ttl, content=content):
            await self._context.write(frame)

    async def answer(self) -> tuple[str, bytes]:
        reply = await self.hear("reply")
        assembly = protocol.Assembly(reply.size)
        content = assembly.add(reply.data)
        while content is None:
            content = assembly.add((await self.hear("chunk")).data)
        return reply.id, content

    async def finish(self) -> None:
        self.finished = True
        await self.say(goodbye=pb.Goodbye(reason="completed", finished=True))


class ScriptedServer(service.SessionServicer):
    """Plays one script a stream, in order."""

    def __init__(self, scripts: list[Script]) -> None:
        self._scripts = scripts
        self.failures: list[BaseException] = []
        self.playing = 0

    async def Connect(self, requests, context):  # type: ignore[no-untyped-def]
        self.playing += 1
        link = Link(requests, context)
        try:
            await self._scripts.pop(0)(link)
        except BaseException as error:
            if not (link.finished and isinstance(error, asyncio.CancelledError)):
                self.failures.append(error)
            raise
        finally:
            self.playing -= 1


def play(
    folder: Path,
    *scripts: Script,
    policy: Policy | None = None,
    wait_s: float = 20,
    leave_when: Callable[[list[str]], bool] | None = None,
    answer: bool | None = None,
) -> tuple[Any, list[str]]:
    """Runs a node against the scripts; returns what it returned (or raised) and what it told its owner.

    `answer` is what the owner says when asked; None if nobody can be asked. With `leave_when`, the node's owner
    interrupts it as soon as that holds of what it has said.
    """
    if not (folder / "ada.csv").exists():
        table().write_csv(folder / "ada.csv")
    said: list[str] = []

    async def main() -> Any:
        server = grpc.aio.server()
        scripted = ScriptedServer(list(scripts))
        service.add_SessionServicer_to_server(scripted, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        settings = ClientFile(
            server=f"127.0.0.1:{port}",
            tls=None,
            name="ada",
            data=DataFile(path=str(folder / "ada.csv"), name="ada"),
            device="cpu",
            state=str(folder / "state"),
            policy=policy or Policy(epsilon=8.0, delta=1e-3, without_privacy=True),
        )

        async def ask(question: str) -> bool:
            said.append(question)
            await asyncio.sleep(0.1)
            return bool(answer)

        node = Node(settings, tls=None, wait_s=wait_s, say=said.append, ask=ask if answer is not None else None)
        try:
            work = asyncio.create_task(node.run())
            if leave_when is not None:
                while not leave_when(said):
                    await asyncio.sleep(0.01)
                await node.leave("interrupted")
            result = await asyncio.wait_for(work, 60)
        except Exception as error:
            result = error
        for _ in range(500):  # a script may end a moment after the client that has heard its last word
            if scripted.playing:
                await asyncio.sleep(0.01)
        await server.stop(0)
        assert scripted.failures == []
        return result

    return asyncio.run(main()), said


def entries(folder: Path) -> list[Any]:
    ledger = Ledger(folder / "state" / "ada.ledger")
    found = ledger.entries()
    ledger.close()
    return found


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

    result, _ = play(tmp_path, loses_it, asks_again)
    assert result == "completed"
    assert answers[0] == answers[1]
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


@pytest.mark.parametrize("changes", [{}, PRIVATE], ids=["exact", "private"])
def test_a_node_keeps_the_model_of_the_last_complete_round_with_what_it_stated(tmp_path, changes):
    fed = federation(**changes)

    async def server(link: Link) -> None:
        await link.welcome(fed, run="kept-run")
        await link.hear("ready")
        for server_round in (1, 2, 3):
            await link.ask(fed, server_round=server_round, run="kept-run", **{"complete-rounds": server_round - 1})
            await link.answer()
        await link.finish()

    result, _ = play(tmp_path, server)
    assert result == "completed"
    (path,) = (tmp_path / "state" / "ada.models").iterdir()
    model = saved.from_bytes(path.read_bytes(), "it")
    assert (path.name, model.run, model.round) == ("kept-run.safetensors", "kept-run", 2)
    assert model.federation == fed
    sent = mlp.weights_of(mlp.build(fed))
    assert all(np.array_equal(model.weights[name], array) for name, array in sent.items())
    if not changes:
        assert model.privacy["row"] is None
        return
    (own,) = model.privacy["row"]["per_client"].values()
    charged = cost_of_run([e for e in entries(tmp_path) if e.run == "kept-run"], 1e-3)
    assert own["epsilon"] == pytest.approx(charged, rel=1e-6)
    assert own["released"][1]["steps"] == 6  # three rounds of two steps
    assert model.privacy["row"]["epsilon"] == own["planned_epsilon"] <= 4.0


def test_a_server_that_does_not_say_how_many_rounds_made_a_model_leaves_none(tmp_path):
    fed = federation()

    async def server(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        await link.ask(fed, server_round=3)
        await link.answer()
        await link.finish()

    play(tmp_path, server)
    assert not (tmp_path / "state" / "ada.models").exists()


def last_model(fed: Federation, *, run: str = "run", **changes: Any) -> bytes:
    claims = {"epsilon": 3.5, "per_client": {}, "withheld": "theirs"} if fed.privacy.row else None
    model = saved_model(**changes)
    return saved.to_bytes(replace(model, federation=fed, run=run, round=3, privacy={"run": run, "row": claims}))


@pytest.mark.parametrize("changes", [{}, PRIVATE], ids=["exact", "private"])
def test_the_model_of_a_run_that_is_over_is_kept_with_the_runs_statement_and_our_own(tmp_path, changes):
    fed = federation(**changes)

    async def server(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        await link.ask(fed, server_round=2, **{"complete-rounds": 1})
        await link.answer()
        for frame in protocol.model_frames(last_model(fed, **changes)):
            await link._context.write(frame)
        await link.finish()

    result, said = play(tmp_path, server)
    assert result == "completed"
    (path,) = (tmp_path / "state" / "ada.models").iterdir()
    assert f"the model after round 3 is kept: {path}" in said
    model = saved.from_bytes(path.read_bytes(), "it")
    assert model.round == 3
    expected = saved_model(**changes).weights
    assert all(np.array_equal(model.weights[name], array) for name, array in expected.items())
    if changes:
        assert model.privacy["row"]["epsilon"] == 3.5 and model.privacy["row"]["withheld"] == "theirs"
        assert list(model.privacy["row"]["per_client"]) == ["ada"]


@pytest.mark.parametrize(
    "content, said_so",
    [
        (lambda fed: b"no model at all", "not a model that Cloister saved"),
        (lambda fed: last_model(fed, run="another"), "sent the model of another run"),
        (lambda fed: last_model(federation(model__hidden=[9])), "does not fit its federation's document"),
        (lambda fed: last_model(federation(name="other")), "sent the model of another run"),
    ],
)
def test_a_last_model_that_is_none_of_the_runs_leaves_the_one_before(tmp_path, content, said_so):
    fed = federation()

    async def server(link: Link) -> None:
        await link.welcome(fed)
        await link.hear("ready")
        await link.ask(fed, server_round=2, **{"complete-rounds": 1})
        await link.answer()
        for frame in protocol.model_frames(content(fed)):
            await link._context.write(frame)
        await link.finish()

    result, said = play(tmp_path, server)
    assert result == "completed"
    (path,) = (tmp_path / "state" / "ada.models").iterdir()
    assert saved.from_bytes(path.read_bytes(), "it").round == 1
    (line,) = (line for line in said if line.startswith("warning: "))
    assert said_so in line and line.endswith("the model that was kept before stays")
