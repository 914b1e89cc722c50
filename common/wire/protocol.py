"""The session protocol without a network: what either side may say when, and payloads in frames and out of them.

`ClientSide` and `ServerSide` are fed the frames that the other side sends and give what they mean; whoever owns the
stream (client/node.py, server/sessions/service.py) acts on it. session.proto draws the order of frames; the tables here
are all of it:

    state     the client hears              the server hears
    OPENED    welcome -> JOINING            hello -> JOINING
    JOINING                                 ready -> READY, failure, reply
    READY     task, ack, model              failure, reply
    any       rejected, goodbye -> ENDED    goodbye -> ENDED

A task, a model or a reply that does not fit a frame goes on in chunks, and nothing else may come between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from common.errors import ProtocolError
from common.text import shown
from common.wire import session_pb2 as pb

PROTOCOL = 3
CHUNK = 256 << 10  # bytes of content in a frame: a thousand streams hold no more than a thousand of them
LARGEST_CONTENT = 1 << 30  # bytes
LONGEST_ID = 300  # characters


class State(StrEnum):
    """How far a session has come."""

    OPENED = "opened"
    JOINING = "joining"
    READY = "ready"
    ENDED = "ended"


_CLIENT_HEARS = {
    (State.OPENED, "welcome"): State.JOINING,
    (State.READY, "task"): State.READY,
    (State.READY, "ack"): State.READY,
    (State.READY, "model"): State.READY,
}
_SERVER_HEARS = {
    (State.OPENED, "hello"): State.JOINING,
    (State.JOINING, "ready"): State.READY,
    (State.JOINING, "failure"): State.JOINING,
    (State.JOINING, "reply"): State.JOINING,  # of a task that was given before the link broke
    (State.READY, "failure"): State.READY,
    (State.READY, "reply"): State.READY,
}


@dataclass(frozen=True)
class ReplyBegun:
    """The head of a reply. The server says with `ServerSide.keep` whether its content is wanted."""

    id: str
    size: int


@dataclass(frozen=True)
class ReplyEnded:
    """A whole reply; its content is empty if it was not kept."""

    id: str
    content: bytes


@dataclass(frozen=True)
class TaskGiven:
    """A whole task."""

    task: pb.Task
    content: bytes


@dataclass(frozen=True)
class ModelGiven:
    """A whole model (common/inference/saved.py)."""

    content: bytes


Said: TypeAlias = "pb.Welcome | pb.Rejected | pb.Ack | pb.Goodbye | pb.Hello | pb.Ready | pb.Failure"


class ClientSide:
    """A client's end of one stream."""

    def __init__(self) -> None:
        self.state = State.OPENED
        self._head: pb.Task | pb.Model | None = None
        self._assembly: Assembly | None = None

    def heard(self, frame: pb.ServerFrame) -> Said | TaskGiven | ModelGiven | None:
        """What a frame means; None if more of a task or a model is to come.

        Raises:
            ProtocolError: the server may not say that now.
        """
        kind = _kind(frame)
        if self._assembly is not None:
            if kind == "chunk":
                return self._add(frame.chunk.data)
            if kind not in ("rejected", "goodbye"):
                what = "a model" if isinstance(self._head, pb.Model) else "a task"
                raise ProtocolError(f"a frame {kind}, which is not expected within {what}")
        if kind in ("rejected", "goodbye"):
            self.state = State.ENDED
            return frame.rejected if kind == "rejected" else frame.goodbye
        if self.state != State.READY and kind in ("task", "chunk", "ack", "model"):
            raise ProtocolError(f"a frame {kind} before the welcome")
        self.state = _next(_CLIENT_HEARS, self.state, kind, "a frame {}, which is not expected here")
        if kind in ("task", "model"):
            self._head = frame.task if kind == "task" else frame.model
            self._assembly = Assembly(self._head.size)
            return self._add(self._head.data)
        return frame.welcome if kind == "welcome" else frame.ack

    def agreed(self) -> None:
        """We have said that we are ready: tasks may come."""
        self.state = State.READY

    def _add(self, data: bytes) -> TaskGiven | ModelGiven | None:
        assert self._head is not None and self._assembly is not None
        if (content := self._assembly.add(data)) is None:
            return None
        head, self._head, self._assembly = self._head, None, None
        return TaskGiven(head, content) if isinstance(head, pb.Task) else ModelGiven(content)


class ServerSide:
    """The server's end of one client's stream."""

    def __init__(self, *, largest_reply: int = LARGEST_CONTENT) -> None:
        """`largest_reply` is in bytes."""
        self.state = State.OPENED
        self._largest = largest_reply
        self._head: pb.Reply | None = None
        self._assembly: Assembly | None = None

    @property
    def receiving(self) -> ReplyBegun | None:
        """The reply that has begun, and is not whole yet."""
        return None if self._head is None else ReplyBegun(self._head.id, self._head.size)

    def heard(self, frame: pb.ClientFrame) -> Said | ReplyBegun | ReplyEnded | None:
        """What a frame means; None if more of a reply is to come. After `ReplyBegun`, `keep` must be called.

        Raises:
            ProtocolError: the client may not say that now.
        """
        kind = _kind(frame)
        if self._head is not None:
            assert self._assembly is not None, "keep() says what becomes of a reply that has begun"
            if kind != "chunk" or not frame.chunk.data:
                raise ProtocolError(f"a frame {kind} is not expected in a reply")
            return self._add(frame.chunk.data)
        if self.state == State.OPENED:
            return self._hello(frame)
        if kind == "goodbye":
            self.state = State.ENDED
            return frame.goodbye
        if kind == "ready" and self.state == State.READY:
            raise ProtocolError("is ready already")
        self.state = _next(_SERVER_HEARS, self.state, kind, "a frame {} is not expected here")
        if kind == "reply":
            if len(frame.reply.id) > LONGEST_ID:
                raise ProtocolError("its task's name is too long")
            check_size(frame.reply.size, self._largest)
            self._head = frame.reply
            return self.receiving
        return frame.ready if kind == "ready" else frame.failure

    def keep(self, wanted: bool) -> ReplyEnded | None:
        """Takes the content of the reply that has begun, or (not `wanted`) counts it and drops it. Returns the reply
        if its head was all."""
        assert self._head is not None
        self._assembly = Assembly(self._head.size, self._largest, keep=wanted)
        return self._add(self._head.data)

    def _add(self, data: bytes) -> ReplyEnded | None:
        assert self._head is not None and self._assembly is not None
        if (content := self._assembly.add(data)) is None:
            return None
        ended = ReplyEnded(self._head.id, content)
        self._head = self._assembly = None
        return ended

    def _hello(self, frame: pb.ClientFrame) -> pb.Hello:
        if _kind(frame) != "hello":
            raise ProtocolError("the first frame must be a hello")
        if frame.hello.protocol != PROTOCOL:
            raise ProtocolError(f"speaks protocol {frame.hello.protocol}; this server speaks {PROTOCOL}")
        self.state = _SERVER_HEARS[self.state, "hello"]
        return frame.hello


def hello(*, name: str = "", version: str = "") -> pb.ClientFrame:
    """A client's first frame."""
    return pb.ClientFrame(hello=pb.Hello(protocol=PROTOCOL, name=name, version=version))


def task_frames(task_id: str, *, type: str, group: str, ttl: float, content: bytes) -> Iterator[pb.ServerFrame]:
    """A task, in as many frames as its content needs."""
    first, others = parts(content)
    head = pb.Task(id=task_id, type=type, group=group, ttl=ttl, size=len(content), data=first)
    yield pb.ServerFrame(task=head)
    for part in others:
        yield pb.ServerFrame(chunk=pb.Chunk(data=part))


def model_frames(content: bytes) -> Iterator[pb.ServerFrame]:
    """A model, in as many frames as it needs."""
    first, others = parts(content)
    yield pb.ServerFrame(model=pb.Model(size=len(content), data=first))
    for part in others:
        yield pb.ServerFrame(chunk=pb.Chunk(data=part))


def reply_frames(task_id: str, content: bytes) -> Iterator[pb.ClientFrame]:
    """A reply, in as many frames as its content needs."""
    first, others = parts(content)
    yield pb.ClientFrame(reply=pb.Reply(id=task_id, size=len(content), data=first))
    for part in others:
        yield pb.ClientFrame(chunk=pb.Chunk(data=part))


def parts(data: bytes) -> tuple[bytes, list[bytes]]:
    """`data` in pieces of at most `CHUNK` bytes: the one that its head carries, and the others."""
    if len(data) <= CHUNK:
        return data, []
    view = memoryview(data)
    first, *others = (bytes(view[start : start + CHUNK]) for start in range(0, len(view), CHUNK))
    return first, others


def check_size(size: int, limit: int = LARGEST_CONTENT) -> None:
    """Raises `ProtocolError` for a payload of a size that is not accepted."""
    if not 0 < size <= limit:
        raise ProtocolError(f"a payload of {size} bytes is not accepted; from 1 to {limit} are")


class Assembly:
    """Puts a payload of known size together again."""

    def __init__(self, size: int, limit: int = LARGEST_CONTENT, *, keep: bool = True) -> None:
        """Without `keep` pieces are counted and dropped, and the payload is given as empty."""
        check_size(size, limit)
        self.size, self._keep, self._have, self._data = size, keep, 0, bytearray()

    def add(self, data: bytes) -> bytes | None:
        """Adds a piece; returns the payload once it is whole. Raises `ProtocolError` if there is too much."""
        self._have += len(data)
        if self._have > self.size:
            raise ProtocolError(f"a payload announced with {self.size} bytes has at least {self._have}")
        if self._keep:
            self._data += data
        return bytes(self._data) if self._have == self.size else None


def _kind(frame: pb.ClientFrame | pb.ServerFrame) -> str:
    kind = frame.WhichOneof("frame")
    return "None" if kind is None else shown(kind)


def _next(table: dict[tuple[State, str], State], state: State, kind: str, problem: str) -> State:
    if (following := table.get((state, kind))) is None:
        raise ProtocolError(problem.format(kind))
    return following
