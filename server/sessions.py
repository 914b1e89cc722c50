"""The gRPC service: who is connected, and which task is where.

Everything in this file runs on one asyncio loop. A session is one client's stream; a task belongs to a client,
not to its stream, so a client that comes back is given again what it has not answered. An answer is taken once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc

from common.errors import ProtocolError
from common.federation import Federation
from common.wire import codec
from common.wire import session_pb2 as pb
from common.wire import session_pb2_grpc as service
from common.wire.identity import number
from common.wire.records import LOST

HELLO_TIMEOUT_S = 10.0

log = logging.getLogger("cloister.server")

Stream: TypeAlias = grpc.aio.ServicerContext
Answer = Callable[[str, "bytes | pb.Failure"], None]


@dataclass
class Session:
    """One client's stream."""

    name: str
    outbox: asyncio.Queue[pb.ServerFrame | None] = field(default_factory=asyncio.Queue)
    ready: bool = False


@dataclass(frozen=True)
class Task:
    """What a client is to do. `content` is shared by all tasks that carry the same."""

    id: str
    client: str
    type: str
    group: str
    ttl: float
    content: bytes

    def frames(self) -> list[pb.ServerFrame]:
        head = pb.Task(id=self.id, type=self.type, group=self.group, ttl=self.ttl, size=len(self.content))
        frames = [pb.ServerFrame(task=head)]
        frames += [pb.ServerFrame(chunk=pb.Chunk(data=c)) for c in codec.chunks(self.content)]
        return frames


class Sessions(service.SessionServicer):
    """All sessions of one run."""

    def __init__(self, federation: Federation, run: str, *, answer: Answer, changed: Callable[[], None]) -> None:
        """`answer` is called once a task with its reply's content, or with a failure; `changed` when clients
        come or go. Both are called on the loop and must not block."""
        self._federation, self._run = federation, run
        self._answer, self._changed = answer, changed
        self._sessions: dict[str, Session] = {}
        self._tasks: dict[str, Task] = {}
        self._finished: pb.Goodbye | None = None
        self.refusals: dict[str, str] = {}  # clients that refused the federation, and why

    @property
    def ready(self) -> list[str]:
        """The clients that can be given tasks."""
        return [s.name for s in self._sessions.values() if s.ready]

    def give(self, task: Task) -> None:
        """Sends a task now, or when its client comes back."""
        self._tasks[task.id] = task
        session = self._sessions.get(task.client)
        if session is not None and session.ready:
            self._send(session, task)

    def forget(self, task_ids: list[str]) -> None:
        """Waits for these tasks no longer; late answers are acknowledged and dropped."""
        for task_id in task_ids:
            self._tasks.pop(task_id, None)

    async def finish(self, reason: str) -> None:
        """Tells every client that there is nothing left to do, and waits until they have been told."""
        self._finished = pb.Goodbye(reason=reason, finished=True)
        for session in self._sessions.values():
            session.outbox.put_nowait(pb.ServerFrame(goodbye=self._finished))
            session.outbox.put_nowait(None)
        for _ in range(100):
            if not self._sessions:
                return
            await asyncio.sleep(0.02)

    async def Connect(self, requests: AsyncIterator[pb.ClientFrame], stream: Stream) -> AsyncIterator[pb.ServerFrame]:
        """One client's stream, from hello to goodbye."""
        try:
            hello = await asyncio.wait_for(anext(requests), HELLO_TIMEOUT_S)
            name = _name(stream, hello)
        except (TimeoutError, StopAsyncIteration, ProtocolError) as error:
            log.warning("a connection was turned away: %s", error or "no hello in time")
            yield pb.ServerFrame(rejected=pb.Rejected(reason=str(error) or "no hello in time"))
            return
        session = Session(name)
        if (older := self._sessions.get(name)) is not None:
            log.warning("%s connected again; its older session ends", name)
            older.outbox.put_nowait(pb.ServerFrame(goodbye=pb.Goodbye(reason="a newer session replaces this one")))
            older.outbox.put_nowait(None)
        self._sessions[name] = session
        log.info("%s connected (Cloister %s)", name, hello.hello.version)
        session.outbox.put_nowait(
            pb.ServerFrame(welcome=pb.Welcome(federation=self._federation.canonical, run=self._run, name=name))
        )
        if self._finished is not None:
            session.outbox.put_nowait(pb.ServerFrame(goodbye=self._finished))
            session.outbox.put_nowait(None)
        reader = asyncio.create_task(self._read(session, requests))
        reader.add_done_callback(lambda _: session.outbox.put_nowait(None))
        try:
            while (frame := await session.outbox.get()) is not None:
                yield frame
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
            if self._sessions.get(name) is session:
                del self._sessions[name]
                log.info("%s is gone", name)
            self._changed()

    async def _read(self, session: Session, requests: AsyncIterator[pb.ClientFrame]) -> None:
        """Takes frames until the stream ends. What a client may not say ends its session, with a reason."""
        reply: tuple[str, codec.Assembly] | None = None
        try:
            async for frame in requests:
                kind = frame.WhichOneof("frame")
                if kind == "ready":
                    self._agree(session, frame.ready)
                elif kind == "reply" and reply is None:
                    reply = frame.reply.id, codec.Assembly(frame.reply.size)
                elif kind == "chunk" and reply is not None:
                    if (content := reply[1].add(frame.chunk.data)) is not None:
                        self._take(session, reply[0], content)
                        reply = None
                elif kind == "failure":
                    self._fail(session, frame.failure)
                elif kind == "goodbye":
                    self._leave(session, frame.goodbye.reason)
                    return
                else:
                    raise ProtocolError(f"a frame {kind} is not expected here")
        except ProtocolError as error:
            log.warning("%s: %s", session.name, error)
            session.outbox.put_nowait(pb.ServerFrame(rejected=pb.Rejected(reason=str(error))))
        except grpc.aio.AioRpcError as error:
            log.info("%s: the stream broke: %s", session.name, error.details())

    def _agree(self, session: Session, ready: pb.Ready) -> None:
        if ready.fingerprint != self._federation.fingerprint:
            raise ProtocolError("the client agreed to another federation than this one")
        session.ready = True
        self.refusals.pop(session.name, None)
        for task in self._tasks.values():
            if task.client == session.name:
                self._send(session, task)
        self._changed()

    def _send(self, session: Session, task: Task) -> None:
        for frame in task.frames():
            session.outbox.put_nowait(frame)

    def _take(self, session: Session, task_id: str, answer: bytes | pb.Failure) -> None:
        """Takes the answer to a task, once, from the client that it was given to."""
        task = self._tasks.get(task_id)
        session.outbox.put_nowait(pb.ServerFrame(ack=pb.Ack(id=task_id)))
        if task is None or task.client != session.name:
            log.info("%s: an answer to %r, which nobody waits for, is dropped", session.name, task_id)
            return
        del self._tasks[task_id]
        self._answer(task_id, answer)

    def _fail(self, session: Session, failure: pb.Failure) -> None:
        if failure.id:
            log.warning("%s: %s", session.name, failure.reason)
            self._take(session, failure.id, failure)
        else:
            log.warning("%s refuses the federation: %s", session.name, failure.reason)
            self.refusals[session.name] = failure.reason
            self._changed()

    def _leave(self, session: Session, reason: str) -> None:
        log.info("%s leaves: %s", session.name, reason)
        for task in [t for t in self._tasks.values() if t.client == session.name]:
            del self._tasks[task.id]
            self._answer(task.id, pb.Failure(id=task.id, code=LOST, reason=f"the client left: {reason}"))


def _name(stream: Stream, first: pb.ClientFrame) -> str:
    """Who the client is: its certificate's name, or without TLS what it says. Raises `ProtocolError`."""
    if first.WhichOneof("frame") != "hello":
        raise ProtocolError("the first frame must be a hello")
    if first.hello.protocol != codec.PROTOCOL:
        raise ProtocolError(f"speaks protocol {first.hello.protocol}; this server speaks {codec.PROTOCOL}")
    names: Any = stream.auth_context().get("x509_common_name")
    name = names[0].decode() if names else first.hello.name
    if not name:
        raise ProtocolError("has neither a certificate nor a name")
    return str(name)


def node_id(client: str) -> int:
    """Flower's number for a client; the same after a restart."""
    return number(f"client/{client}")
