"""The session protocol, fed frame by frame: no network, no threads, no waiting."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ProtocolError
from common.wire import protocol
from common.wire import session_pb2 as pb
from common.wire.protocol import (
    CHUNK,
    LONGEST_ID,
    PROTOCOL,
    ClientSide,
    ModelGiven,
    ReplyBegun,
    ReplyEnded,
    ServerSide,
    State,
    TaskGiven,
)

SIZES = st.integers(1, 9) | st.sampled_from([CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 1])
SERVER = {
    "welcome": pb.ServerFrame(welcome=pb.Welcome(run="run", name="ada")),
    "task": pb.ServerFrame(task=pb.Task(id="t", size=1, data=b"x")),
    "chunk": pb.ServerFrame(chunk=pb.Chunk(data=b"x")),
    "model": pb.ServerFrame(model=pb.Model(size=1, data=b"x")),
    "ack": pb.ServerFrame(ack=pb.Ack(id="t")),
    "rejected": pb.ServerFrame(rejected=pb.Rejected(reason="no")),
    "goodbye": pb.ServerFrame(goodbye=pb.Goodbye(reason="over", finished=True)),
    "None": pb.ServerFrame(),
}
CLIENT = {
    "hello": protocol.hello(name="ada", version="1"),
    "ready": pb.ClientFrame(ready=pb.Ready(fingerprint="f")),
    "reply": pb.ClientFrame(reply=pb.Reply(id="t", size=1, data=b"x")),
    "chunk": pb.ClientFrame(chunk=pb.Chunk(data=b"x")),
    "failure": pb.ClientFrame(failure=pb.Failure(code=1, reason="no")),
    "goodbye": pb.ClientFrame(goodbye=pb.Goodbye(reason="lunch")),
    "None": pb.ClientFrame(),
}


def client(state: State) -> ClientSide:
    side = ClientSide()
    if state != State.OPENED:
        side.heard(SERVER["welcome"])
    if state == State.READY:
        side.agreed()
    assert side.state == state
    return side


def server(state: State, **limits: int) -> ServerSide:
    side = ServerSide(**limits)
    for kind in {State.OPENED: (), State.JOINING: ("hello",), State.READY: ("hello", "ready")}[state]:
        side.heard(CLIENT[kind])
    assert side.state == state
    return side


# Who may say what, and when


@pytest.mark.parametrize("kind", SERVER)
@pytest.mark.parametrize("state", [State.OPENED, State.JOINING, State.READY])
def test_a_client_hears_what_the_table_allows_and_nothing_else(state, kind):
    allowed = {State.OPENED: {"welcome"}, State.JOINING: set(), State.READY: {"task", "ack", "model"}}[state]
    side = client(state)
    if kind in {*allowed, "rejected", "goodbye"}:
        assert side.heard(SERVER[kind]) is not None
        assert (side.state == State.ENDED) == (kind in ("rejected", "goodbye"))
    else:
        early = state != State.READY and kind in ("task", "chunk", "ack", "model")
        problem = f"a frame {kind} before the welcome" if early else f"a frame {kind}, which is not expected here"
        with pytest.raises(ProtocolError, match=rf"^{problem}$"):
            side.heard(SERVER[kind])


@pytest.mark.parametrize("kind", CLIENT)
@pytest.mark.parametrize("state", [State.OPENED, State.JOINING, State.READY])
def test_a_server_hears_what_the_table_allows_and_nothing_else(state, kind):
    allowed = {
        State.OPENED: {"hello"},
        State.JOINING: {"ready", "failure", "reply", "goodbye"},
        State.READY: {"failure", "reply", "goodbye"},
    }[state]
    side = server(state)
    if kind in allowed:
        assert side.heard(CLIENT[kind]) is not None
        assert (side.state == State.ENDED) == (kind == "goodbye")
        return
    with pytest.raises(ProtocolError) as refused:
        side.heard(CLIENT[kind])
    if state == State.OPENED:
        assert str(refused.value) == "the first frame must be a hello"
    elif kind == "ready":
        assert str(refused.value) == "is ready already"
    else:
        assert str(refused.value) == f"a frame {kind} is not expected here"


def test_another_protocol_is_turned_away_by_its_number():
    with pytest.raises(ProtocolError, match=rf"^speaks protocol 99; this server speaks {PROTOCOL}$"):
        ServerSide().heard(pb.ClientFrame(hello=pb.Hello(protocol=99)))


# Payloads in frames and out of them


@given(SIZES)
def test_a_task_comes_out_of_its_frames_as_it_went_in(size):
    content = bytes(range(256)) * (size // 256) + b"z" * (size % 256)
    side, got = client(State.READY), []
    for frame in protocol.task_frames("run/train/1", type="train", group="1", ttl=9.0, content=content):
        assert len(frame.SerializeToString()) < CHUNK + 200
        got.append(side.heard(frame))
    assert got[:-1] == [None] * (len(got) - 1)
    (last,) = got[-1:]
    assert isinstance(last, TaskGiven) and last.content == content
    assert (last.task.id, last.task.type, last.task.group, last.task.ttl) == ("run/train/1", "train", "1", 9.0)


@pytest.mark.parametrize("wanted", [True, False])
@given(SIZES)
def test_a_reply_comes_out_of_its_frames_or_is_only_counted(wanted, size):
    content = bytes(range(256)) * (size // 256) + b"z" * (size % 256)
    side = server(State.READY)
    head, *others = protocol.reply_frames("t", content)
    assert side.heard(head) == side.receiving == ReplyBegun("t", size)
    ended: Any = side.keep(wanted)
    for frame in others:
        assert ended is None
        ended = side.heard(frame)
    assert ended == ReplyEnded("t", content if wanted else b"") and side.receiving is None


@given(SIZES)
def test_a_model_comes_out_of_its_frames_as_it_went_in_and_a_task_may_follow(size):
    content = bytes(range(256)) * (size // 256) + b"z" * (size % 256)
    side = client(State.READY)
    got = [side.heard(frame) for frame in protocol.model_frames(content)]
    assert got == [None] * (len(got) - 1) + [ModelGiven(content)]
    assert isinstance(side.heard(SERVER["task"]), TaskGiven)


@pytest.mark.parametrize("kind", [kind for kind in SERVER if kind not in ("chunk", "rejected", "goodbye")])
@pytest.mark.parametrize(
    "what, head",
    [
        ("a task", pb.ServerFrame(task=pb.Task(id="t", size=9, data=b"x"))),
        ("a model", pb.ServerFrame(model=pb.Model(size=9, data=b"x"))),
    ],
)
def test_nothing_but_an_end_comes_between_the_frames_of_a_payload(kind, what, head):
    side = client(State.READY)
    assert side.heard(head) is None
    with pytest.raises(ProtocolError, match=rf"^a frame {kind}, which is not expected within {what}$"):
        side.heard(SERVER[kind])


@pytest.mark.parametrize("kind", [kind for kind in CLIENT if kind != "chunk"])
def test_nothing_comes_between_the_frames_of_a_reply(kind):
    side = server(State.READY)
    side.heard(pb.ClientFrame(reply=pb.Reply(id="t", size=9, data=b"x")))
    assert side.keep(True) is None
    with pytest.raises(ProtocolError, match=rf"^a frame {kind} is not expected in a reply$"):
        side.heard(CLIENT[kind])


def test_an_empty_chunk_gets_a_reply_no_further_and_is_refused():
    side = server(State.READY)
    side.heard(pb.ClientFrame(reply=pb.Reply(id="t", size=9, data=b"x")))
    side.keep(True)
    with pytest.raises(ProtocolError, match="a frame chunk is not expected in a reply"):
        side.heard(pb.ClientFrame(chunk=pb.Chunk()))


def test_more_than_was_announced_is_refused():
    side = client(State.READY)
    side.heard(pb.ServerFrame(task=pb.Task(id="t", size=3, data=b"xx")))
    with pytest.raises(ProtocolError, match=r"^a payload announced with 3 bytes has at least 4$"):
        side.heard(pb.ServerFrame(chunk=pb.Chunk(data=b"yy")))


@pytest.mark.parametrize("size", [0, 101, 1 << 40])
def test_a_size_that_is_not_accepted_is_refused_before_a_byte_is_kept(size):
    with pytest.raises(ProtocolError, match=rf"^a payload of {size} bytes is not accepted; from 1 to 100 are$"):
        server(State.READY, largest_reply=100).heard(pb.ClientFrame(reply=pb.Reply(id="t", size=size)))


def test_a_name_that_is_too_long_is_refused():
    side = server(State.READY)
    with pytest.raises(ProtocolError, match="its task's name is too long"):
        side.heard(pb.ClientFrame(reply=pb.Reply(id="t" * (LONGEST_ID + 1), size=1, data=b"x")))
