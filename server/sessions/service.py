"""The gRPC service: who is connected, and which task is where.

Everything in this file runs on one asyncio loop. A session is one client's stream; a task belongs to a client,
not to its stream, so a client that comes back is given again what it has not answered. An answer is taken once, and
acknowledged when the round that it belongs to is on disk: until then the client keeps it, for a server that restarts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TypeAlias

import grpc
from google.protobuf.message import DecodeError

from common.certificates.identity import Peer
from common.document.federation import Federation
from common.errors import CloisterError, ModelError, ProtocolError
from common.text import shown
from common.wire import protocol
from common.wire import session_pb2 as pb
from common.wire import session_pb2_grpc as service
from common.wire.protocol import ReplyBegun, ReplyEnded, ServerSide, State
from common.wire.records import BUDGET_EXHAUSTED, FAILED, LOST, REFUSED
from server.sessions.gate import Gate, Limits, Stream, TurnedAway
from server.sessions.memory import Room

FAREWELL_S = 5.0  # for a last word to be heard
SILENCE_S = 2.0  # without a client that reads, before the last words are given up
LONGEST_FAREWELL_S = 600.0
SLOWEST = 65_536  # bytes a second that a peer must send
MOST_UNASKED = 100
REFRESH_S = 2.0  # between looks at certificates and the revocation list

log = logging.getLogger("cloister.server")

Answer: TypeAlias = "bytes | pb.Failure"


@dataclass(frozen=True)
class Task:
    """What clients are to do: for all of them the same frames, encoded once."""

    id: str
    frames: tuple[bytes, ...]

    @classmethod
    def of(cls, task_id: str, *, type: str, group: str, ttl: float, content: bytes) -> Task:
        frames = protocol.task_frames(task_id, type=type, group=group, ttl=ttl, content=content)
        return cls(task_id, tuple(frame.SerializeToString() for frame in frames))


@dataclass
class Session:
    """One client's stream. What is to be sent waits in `outbox`: encoded frames, and tasks, which many share; None
    ends the stream."""

    peer: Peer
    protocol: ServerSide
    outbox: asyncio.Queue[bytes | Task | None] = field(default_factory=asyncio.Queue)
    unasked: int = 0  # answers that nobody waited for
    stream: asyncio.Task[None] | None = None
    reader: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.peer.name

    @property
    def ready(self) -> bool:
        """Can it be given tasks?"""
        return self.protocol.state == State.READY

    def send(self, frame: pb.ServerFrame) -> None:
        self.outbox.put_nowait(frame.SerializeToString())

    def finish(self, frame: pb.ServerFrame) -> None:
        """Says this last frame after all that waits."""
        self.send(frame)
        self.outbox.put_nowait(None)

    def end(self, frame: pb.ServerFrame) -> None:
        """Says this last frame, instead of all that waits, and hears no more. A peer that does not read is cut off."""
        while not self.outbox.empty():
            self.outbox.get_nowait()
        self.finish(frame)
        if self.reader is not None:
            self.reader.cancel()
        if self.stream is not None:
            asyncio.get_running_loop().call_later(FAREWELL_S, self.stream.cancel)


class Sessions(service.SessionServicer):
    """All sessions of one run."""

    def __init__(
        self,
        federation: Federation,
        run: str,
        gate: Gate,
        limits: Limits,
        *,
        largest_reply: int,
        answer: Callable[[str, str, Answer, int], None],
        changed: Callable[[str, bool], None],
        status: Callable[[Peer], pb.StatusReply] = lambda peer: pb.StatusReply(),
        model: Callable[[], bytes] | None = None,
    ) -> None:
        """`answer` is called once a client and task with the reply's content or a failure, and with the room that it
        takes, to be given back to `room`; `changed` when a client can be given tasks, or no longer. Neither may
        block. `model` reads the model after the last complete round, in a thread; where there is none it raises an
        error of ours."""
        self._federation, self._run, self._gate, self._limits = federation, run, gate, limits
        self._largest_reply, self._answer, self._changed, self._status = largest_reply, answer, changed, status
        self.model = model
        self._fetching: set[str] = set()  # clients that are being sent the model which they asked for
        self._fetched = b""  # the last model that one asked for: whoever asks for the same shares its memory
        self._last_words: tuple[bytes, ...] = ()  # what each client is told once the run is over
        self._frames_taken = 0
        self.slowest_s = 0.0  # a reply that took longest to arrive, once it had begun; set to 0 by who asks anew
        self._sessions: dict[str, Session] = {}
        self._tasks: dict[str, dict[str, Task]] = {}  # client -> what it has not answered, by the task's id
        self._answered: list[tuple[str, str]] = []  # client and task, not yet acknowledged
        self._done: dict[str, deque[str]] = {}  # client -> the last tasks that were answered or forgotten
        self.room = Room(limits.replies)
        self.refusals: dict[str, pb.Failure] = {}  # clients that refused the federation, and how
        self.seen: dict[str, float] = {}  # when each client was last heard, by the monotonic clock

    @property
    def ready(self) -> list[str]:
        """The clients that can be given tasks."""
        return [s.name for s in self._sessions.values() if s.ready]

    def state_of(self, client: str) -> str:
        """What a client is doing, in a word: idle, working, joining, away or refused."""
        session = self._sessions.get(client)
        if client in self.refusals:
            return "refused"
        if session is None:
            return "away"
        return "joining" if not session.ready else "working" if self._tasks.get(client) else "idle"

    def describe(self) -> dict[str, tuple[str, float, str]]:
        """For each client that has been here: what it is doing, seconds since it was heard, and why it refused."""
        now = time.monotonic()
        why = {name: refusal.reason for name, refusal in self.refusals.items()}
        return {name: (self.state_of(name), now - at, why.get(name, "")) for name, at in self.seen.items()}

    def give(self, clients: list[str], task: Task) -> None:
        """Sends a task to clients now, or to each when it comes back."""
        for client in clients:
            self._tasks.setdefault(client, {})[task.id] = task
            session = self._sessions.get(client)
            if session is not None and session.ready:
                self._send(session, task)

    def forget(self, clients: list[str], task_id: str) -> None:
        """Waits for these answers no longer; those that come late are acknowledged and dropped."""
        for client in clients:
            if self._tasks.get(client, {}).pop(task_id, None) is not None:
                self._note_done(client, task_id)

    def _note_done(self, client: str, task_id: str) -> None:
        self._done.setdefault(client, deque(maxlen=8)).append(task_id)

    def settle(self) -> None:
        """Acknowledges all that was answered."""
        for client, task_id in self._answered:
            if (session := self._sessions.get(client)) is not None:
                session.send(pb.ServerFrame(ack=pb.Ack(id=task_id)))
        self._answered.clear()

    async def finish(self, goodbye: pb.Goodbye, model: bytes | None = None) -> None:
        """Gives every client, also those that come yet, the model if there is one, says goodbye, and waits until that
        has been said, for as long as anyone reads."""
        frames = [*(protocol.model_frames(model) if model else ()), pb.ServerFrame(goodbye=goodbye)]
        self._last_words = tuple(frame.SerializeToString() for frame in frames)
        for session in self._sessions.values():
            self._say_last_words(session)
        began = heard = time.monotonic()
        taken = self._frames_taken
        while self._sessions and time.monotonic() - heard < SILENCE_S and time.monotonic() - began < LONGEST_FAREWELL_S:
            await asyncio.sleep(0.02)
            if self._frames_taken != taken:
                heard, taken = time.monotonic(), self._frames_taken

    def _say_last_words(self, session: Session) -> None:
        """Once it is ready, or else without the model: who has not agreed to the federation is given nothing of it."""
        for frame in self._last_words if session.ready else self._last_words[-1:]:
            session.outbox.put_nowait(frame)
        session.outbox.put_nowait(None)

    async def keep_watch(self, reopen: Callable[[], Awaitable[None]]) -> None:
        """Rereads certificates and revocation list while the server runs: sends away who was revoked, and serves anew
        if our own certificate was renewed."""
        renewed = False
        while True:
            await asyncio.sleep(REFRESH_S)
            changed = self._gate.refresh()
            renewed = renewed or (changed and self._gate.is_renewed())
            if renewed:
                log.info("our certificate was renewed: all connections are made anew")
                try:
                    await reopen()
                    renewed = False
                except Exception:  # whatever it is, the next turn tries again
                    log.exception("the port could not be opened anew; trying again")
            elif changed:
                for session in self._sessions.values():
                    if self._gate.is_revoked(session.peer):
                        log.warning("%s is sent away: its certificate is revoked", session.name)
                        session.end(pb.ServerFrame(rejected=pb.Rejected(reason="not accepted")))

    async def _caller(self, stream: Stream, *, said: str) -> Peer:
        """Who asks, outside a session; whoever may not is turned away, which ends the call."""
        try:
            return self._gate.peer(stream, said=said)
        except TurnedAway as turned:
            await stream.abort(turned.code, str(turned))  # raises
            raise AssertionError from turned

    async def Status(self, request: pb.StatusRequest, stream: Stream) -> pb.StatusReply:
        """How the run goes, to who may know it."""
        return self._status(await self._caller(stream, said="operator"))

    async def Fetch(self, request: pb.FetchRequest, stream: Stream) -> AsyncIterator[pb.Chunk]:
        """The model after the last complete round, to any client of the federation."""
        peer = await self._caller(stream, said=request.name)
        if peer.name in self._fetching:  # it holds a model, and may not read it
            await stream.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "this client is being sent the model already")
        self._fetching.add(peer.name)
        try:
            content = await self._read_model()
            log.info("%s fetches the model", peer.name, extra={"client": peer.name})
            for start in range(0, len(content), protocol.CHUNK):
                yield pb.Chunk(data=content[start : start + protocol.CHUNK])
        except CloisterError as error:  # which may name paths
            log.info("%s asked for the model: %s", peer.name, error, extra={"client": peer.name})
            await stream.abort(grpc.StatusCode.NOT_FOUND, "no round is complete yet")
        finally:
            self._fetching.discard(peer.name)

    async def Document(self, request: pb.DocumentRequest, stream: Stream) -> pb.DocumentReply:
        """What the federation is, to any client of it. Whether it then takes part is heard when it joins."""
        peer = await self._caller(stream, said=request.name)
        log.info("%s asks for the document", peer.name, extra={"client": peer.name})
        return pb.DocumentReply(
            federation=self._federation.canonical, name=peer.name, version=version("cloister"), time=time.time()
        )

    async def _read_model(self) -> bytes:
        """The model as it is now. Raises an error of ours where there is none."""
        if self.model is None:
            raise ModelError("the run has not begun")
        content = await asyncio.to_thread(self.model)
        if content != self._fetched:
            self._fetched = content
        return self._fetched

    async def Connect(self, requests: AsyncIterator[pb.ClientFrame], stream: Stream) -> AsyncIterator[bytes]:
        """One client's stream, from hello to goodbye. Yields encoded frames."""
        try:
            session = await self._enter(requests, stream)
        except TurnedAway as turned:
            await stream.abort(turned.code, str(turned))
            return
        except (StopAsyncIteration, DecodeError):
            return  # it left without a word that can be read
        except ProtocolError as error:
            log.warning("%s was turned away: %s", stream.peer(), error)
            yield pb.ServerFrame(rejected=pb.Rejected(reason=str(error))).SerializeToString()
            return
        name = session.name
        welcome = pb.Welcome(federation=self._federation.canonical, run=self._run, name=name)
        session.send(pb.ServerFrame(welcome=welcome))
        session.stream = asyncio.current_task()
        session.reader = reader = asyncio.create_task(self._read(session, requests))
        reader.add_done_callback(lambda _: session.outbox.put_nowait(None))
        try:
            while (frame := await session.outbox.get()) is not None:
                if isinstance(frame, bytes):
                    yield frame
                    self._frames_taken += 1
                elif frame.id in self._tasks.get(name, {}):  # else it is not waited for any more
                    for part in frame.frames:
                        yield part
            if self._last_words:  # whoever writes to a stream that has ended may lose what it has not read of it
                await asyncio.wait([reader], timeout=FAREWELL_S)
        finally:
            if self._sessions.get(name) is session:
                del self._sessions[name]
                log.info("%s is gone", name, extra={"client": name})
                self._changed(name, False)
            reader.cancel()
            await asyncio.wait([reader])

    async def _enter(self, requests: AsyncIterator[pb.ClientFrame], stream: Stream) -> Session:
        """Lets a peer in, in place of its older session if there is one."""
        try:
            async with asyncio.timeout(self._limits.hello_s):
                first = await anext(requests)
        except TimeoutError:
            log.warning("%s was turned away: no hello in time", stream.peer())
            raise TurnedAway(grpc.StatusCode.UNAVAILABLE, "no hello in time") from None
        peer = self._gate.peer(stream, said=first.hello.name)
        side = ServerSide(largest_reply=self._largest_reply)
        hello = side.heard(first)
        assert isinstance(hello, pb.Hello)
        older = self._sessions.get(peer.name)
        self._gate.check_session(peer, older.peer if older else None, len(self._sessions))
        if older is not None:
            log.warning("%s connected again; its older session ends", peer.name, extra={"client": peer.name})
            older.end(pb.ServerFrame(goodbye=pb.Goodbye(reason="a newer session replaces this one")))
            self._changed(peer.name, False)
        session = self._sessions[peer.name] = Session(peer, side)
        self.seen[peer.name] = time.monotonic()
        log.info("%s connected (Cloister %s)", peer.name, shown(hello.version, 20), extra={"client": peer.name})
        return session

    async def _read(self, session: Session, requests: AsyncIterator[pb.ClientFrame]) -> None:
        """Takes frames until the stream ends. What a client may not say ends its session, with a reason."""
        try:
            async for frame in requests:
                self.seen[session.name] = time.monotonic()
                match session.protocol.heard(frame):
                    case ReplyBegun() as begun:
                        await self._receive(session, begun, requests)
                    case pb.Ready() as ready:
                        self._agree(session, ready)
                    case pb.Failure() as failure:
                        self._fail(session, failure)
                    case pb.Goodbye() as goodbye:
                        self._leave(session, goodbye.reason)
                        return
        except (ProtocolError, DecodeError) as error:
            log.warning("%s: %s", session.name, error, extra={"client": session.name})
            session.end(pb.ServerFrame(rejected=pb.Rejected(reason=shown(str(error)))))
        except TimeoutError:
            log.warning("%s: a reply that had begun did not go on", session.name, extra={"client": session.name})
            reason = "a reply that had begun did not go on"
            session.end(pb.ServerFrame(goodbye=pb.Goodbye(reason=reason, comes_back=True)))
        except grpc.aio.AioRpcError as error:
            log.info("%s: the stream broke: %s", session.name, error.details())

    async def _receive(self, session: Session, begun: ReplyBegun, requests: AsyncIterator[pb.ClientFrame]) -> None:
        """Takes a reply and the chunks that belong to it, once there is room for them. What nobody waits for takes
        no room. Raises TimeoutError if it does not go on."""
        wanted = begun.id in self._tasks.get(session.name, {})
        taken = await self.room.take(begun.size) if wanted else 0
        passed_on, began = False, time.monotonic()
        try:
            ended = session.protocol.keep(wanted)
            async with asyncio.timeout(self._limits.stall_s + begun.size / SLOWEST):
                while not isinstance(ended, ReplyEnded):
                    async with asyncio.timeout(self._limits.stall_s):
                        ended = session.protocol.heard(await anext(requests))  # type: ignore[assignment]  # or None
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            passed_on = self._take(session, ended.id, ended.content, taken)
        except StopAsyncIteration:
            raise ProtocolError("the stream ended within a reply") from None
        finally:
            if not passed_on:
                self.room.give_back(taken)

    def _agree(self, session: Session, ready: pb.Ready) -> None:
        if ready.fingerprint != self._federation.fingerprint:
            raise ProtocolError("the client agreed to another federation than this one")
        self.refusals.pop(session.name, None)
        for task in self._tasks.get(session.name, {}).values():
            self._send(session, task)
        if self._last_words:
            self._say_last_words(session)
        else:
            self._changed(session.name, True)

    def _send(self, session: Session, task: Task) -> None:
        session.outbox.put_nowait(task)

    def _take(self, session: Session, task_id: str, answer: Answer, taken: int = 0) -> bool:
        """Takes the answer to a task, once, from a client that was given it. Was it taken?"""
        if self._tasks.get(session.name, {}).pop(task_id, None) is None:
            log.info("%s: an answer to %r, which nobody waits for, is dropped", session.name, shown(task_id))
            # One that this server did not ask for, it may be about to ask for: the client must keep its answer.
            if task_id in self._done.get(session.name, ()):
                session.send(pb.ServerFrame(ack=pb.Ack(id=task_id)))
            session.unasked += 1
            if session.unasked > MOST_UNASKED:
                raise ProtocolError("too many answers that nobody asked for")
            return False
        self._note_done(session.name, task_id)
        self._answered.append((session.name, task_id))
        self._answer(session.name, task_id, answer, taken)
        return True

    def _fail(self, session: Session, failure: pb.Failure) -> None:
        failure.reason = shown(failure.reason)
        if failure.code not in (REFUSED, BUDGET_EXHAUSTED):
            failure.code = FAILED  # the others are the server's to say
        if failure.id:
            log.warning("%s: %s", session.name, failure.reason, extra={"client": session.name})
            self._take(session, failure.id, failure)
        else:
            self.refusals[session.name] = failure
            if self._last_words:
                self._say_last_words(session)

    def _leave(self, session: Session, reason: str) -> None:
        reason = shown(reason)
        log.info("%s leaves: %s", session.name, reason, extra={"client": session.name})
        if self._sessions.get(session.name) is not session:
            return  # a newer session has its tasks
        for task_id in self._tasks.pop(session.name, {}):
            failure = pb.Failure(id=task_id, code=LOST, reason=f"the client left: {reason}")
            self._answer(session.name, task_id, failure, 0)


def handlers(sessions: Sessions) -> grpc.GenericRpcHandler:
    """The service's methods. `Connect` yields frames that are encoded already, so that what a thousand clients are
    sent is encoded once."""
    methods = {
        "Connect": grpc.stream_stream_rpc_method_handler(
            sessions.Connect, request_deserializer=pb.ClientFrame.FromString, response_serializer=None
        ),
        "Fetch": grpc.unary_stream_rpc_method_handler(
            sessions.Fetch,
            request_deserializer=pb.FetchRequest.FromString,
            response_serializer=pb.Chunk.SerializeToString,
        ),
        "Document": grpc.unary_unary_rpc_method_handler(
            sessions.Document,
            request_deserializer=pb.DocumentRequest.FromString,
            response_serializer=pb.DocumentReply.SerializeToString,
        ),
        "Status": grpc.unary_unary_rpc_method_handler(
            sessions.Status,
            request_deserializer=pb.StatusRequest.FromString,
            response_serializer=pb.StatusReply.SerializeToString,
        ),
    }
    return grpc.method_handlers_generic_handler(pb.DESCRIPTOR.services_by_name["Session"].full_name, methods)
