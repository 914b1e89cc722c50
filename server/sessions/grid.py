"""GrpcGrid: Flower's Grid over the sessions of real clients.

The gRPC server runs on an asyncio loop in a thread of its own; the round loop calls the grid from its own
thread and waits.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import grpc
from flwr.app import Error, Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from common.certificates.identity import Peer, ServerIdentity
from common.document.federation import Federation
from common.errors import CertificateError, ConnectionFailed, ProtocolError
from common.wire import codec
from common.wire import session_pb2 as pb
from common.wire.address import parse
from common.wire.channel import SERVER_OPTIONS, is_loopback
from common.wire.identity import node_id, task_name
from common.wire.records import FAILED
from server.rounds.admission import Rejection
from server.rounds.run_grid import RunGrid
from server.sessions.gate import USUAL, Gate, Limits
from server.sessions.service import Answer, Sessions, Task, handlers

LONGEST_CALL_S = 8.0
BESIDE_THE_MODEL = 1 << 20  # bytes that a reply may have beside its model: names, metrics, statements


@dataclass(frozen=True)
class _Arrived:
    """An answer that waits to be taken."""

    client: str
    task_id: str
    answer: Answer
    room: int


class GrpcGrid(RunGrid):
    """Serves sessions from `start` (or `with`) to `stop`."""

    def __init__(
        self,
        federation: Federation,
        *,
        run: str,
        address: str,
        identity: ServerIdentity | None,
        limits: Limits = USUAL,
        status: Callable[[Peer], pb.StatusReply] = lambda peer: pb.StatusReply(),
    ) -> None:
        """`address` is HOST:PORT; port 0 takes a free one. Without an identity only loopback is served, in plain
        text. `status` answers `cloister status`."""
        super().__init__(run)
        self._name, self._address, self._identity = run, address, identity
        self._condition = threading.Condition()
        self._asked: dict[tuple[str, str], Message] = {}  # client and task -> the question, until its answer is taken
        self._arrived: deque[_Arrived] = deque()
        self._replies: dict[str, Message] = {}  # for pull_messages
        self._names: dict[int, str] = {}
        self._nodes: set[int] = set()
        self.sessions = Sessions(
            federation,
            run,
            Gate(identity, limits),
            limits,
            largest_reply=2 * federation.model_bytes + BESIDE_THE_MODEL,
            answer=self._answered,
            changed=self._changed,
            status=status,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sessions", daemon=True)
        self._server: Any = None
        self._finished = False
        self._watch: asyncio.Task[None] | None = None
        self.port = 0

    # Lifetime

    def start(self) -> None:
        """Raises `ConnectionFailed` if the port is in use, `CertificateError` if plain text would leave the machine."""
        host = parse(self._address, lowest=0).host
        if self._identity is None and not is_loopback(host):
            raise CertificateError(f"without certificates only loopback is served, not {host}; see `cloister certs`")
        self._thread.start()
        self.port = self._call(self._start())

    def finish(self, reason: str, model: bytes | None) -> None:
        """Gives all clients the model of a run that is over, if there is one, and says goodbye; whoever comes later is
        told the same, until `stop`."""
        self._finished = True
        self._call(self.sessions.finish(pb.Goodbye(reason=reason, finished=True), model), timeout_s=None)

    def stop(self, reason: str, *, comes_back: bool = False) -> None:
        """Says goodbye to all clients, and ends. With `comes_back` they wait for the next server."""
        if self._server is not None:
            if not self._finished:
                goodbye = pb.Goodbye(reason=reason, finished=not comes_back, comes_back=comes_back)
                self._call(self.sessions.finish(goodbye), timeout_s=None)
            self._call(self._stop())
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    def describe(self) -> Future[dict[str, tuple[str, float, str]]]:
        """Asks the sessions' loop what `Sessions.describe` tells: from any thread, while we serve."""

        async def ask() -> dict[str, tuple[str, float, str]]:
            return self.sessions.describe()

        return asyncio.run_coroutine_threadsafe(ask(), self._loop)

    async def _start(self) -> int:
        self._server, port = await self._open(self._address)
        self._watch = asyncio.create_task(self.sessions.keep_watch(self._reopen))
        return port

    async def _open(self, address: str) -> tuple[Any, int]:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        server.add_generic_rpc_handlers((handlers(self.sessions),))
        status = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(status, server)
        await status.set("", health_pb2.HealthCheckResponse.SERVING)
        try:
            if self._identity is None:
                port = server.add_insecure_port(address)
            else:
                material = self._identity.material
                credentials = grpc.ssl_server_credentials(
                    [(material.key, material.certificate)], material.ca, require_client_auth=True
                )
                port = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConnectionFailed(
                f"{address}: cannot be served; the port is in use, or the address is not this machine's"
            ) from error
        await server.start()
        return server, int(port)

    async def _reopen(self) -> None:
        """Serves with the certificates as they are now; clients come back by themselves. gRPC's own way to change
        them (dynamic_ssl_server_credentials) can crash the process: github.com/grpc/grpc/issues/36693."""
        await self._server.stop(grace=None)
        self._server, _ = await self._open(f"{parse(self._address, lowest=0).host}:{self.port}")

    async def _stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        await self._server.stop(grace=1.0)

    def _call(self, coroutine: Any, *, timeout_s: float | None = LONGEST_CALL_S) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)

    def _on_loop(self, function: Callable[..., None], *args: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    # What the sessions tell us, on their loop

    def _changed(self, client: str, ready: bool) -> None:
        node = node_id(client)
        with self._condition:
            self._names[node] = client
            if ready:
                self._nodes.add(node)
            else:
                self._nodes.discard(node)

    def _answered(self, client: str, task_id: str, answer: Answer, room: int) -> None:
        with self._condition:
            self._arrived.append(_Arrived(client, task_id, answer, room))
            self._condition.notify_all()

    # Flower's Grid

    @property
    def transfer_s(self) -> float:  # type: ignore[override]  # a figure that changes
        return self.sessions.slowest_s

    def get_node_ids(self) -> list[int]:
        with self._condition:
            return list(self._nodes)

    def name_of(self, node: int) -> str:
        """The client's name, also after it has gone."""
        return self._names.get(node, str(node))

    def refusals(self) -> list[Rejection]:
        said = list(self.sessions.refusals.items())
        with self._condition:  # they may never have been ready
            self._names |= {node_id(name): name for name, _ in said}
        return [Rejection(node_id(name), refusal.code, refusal.reason) for name, refusal in said]

    def settle(self) -> None:
        """Lets clients forget the replies that were taken so far: the rounds they belong to are on disk."""
        self._on_loop(self.sessions.settle)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Gives each message to its client. A content that several messages share is encoded once."""
        return [f"{client}/{task_id}" for client, task_id in self._push(messages)]

    def _push(self, messages: Iterable[Message]) -> list[tuple[str, str]]:
        shared: dict[tuple[int, str, str], tuple[Task, list[str]]] = {}
        asked: list[tuple[str, str]] = []
        for message in messages:
            metadata = message.metadata
            key = (id(message.content), metadata.message_type, metadata.group_id)
            if key not in shared:
                # The same task after a restart of the server, so that a reply that was finished can be used.
                task_id = task_name(self._name, metadata.message_type, metadata.group_id)
                task = Task.of(
                    task_id,
                    type=metadata.message_type,
                    group=metadata.group_id,
                    ttl=metadata.ttl,
                    content=codec.encode(message.content),
                )
                shared[key] = task, []
            task, clients = shared[key]
            clients.append(self.name_of(metadata.dst_node_id))
            asked.append((clients[-1], task.id))
            self._asked[asked[-1]] = message
        for task, clients in shared.values():
            self._on_loop(self.sessions.give, clients, task)
        return asked

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The answers that are there, each once."""
        for one in self._arrivals(0.0):
            if (reply := self._reply(one)) is not None:
                self._replies[f"{one.client}/{one.task_id}"] = reply
            self._on_loop(self.sessions.room.give_back, one.room)
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Waits until all have answered or the time is up; what comes later is dropped."""
        return list(self.stream(messages, timeout=timeout))

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Generator[Message]:
        """The replies as they come, until all are there, the time is up, or the caller has enough."""
        self.sessions.slowest_s = 0.0
        waiting = set(self._push(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while waiting:
                left = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
                arrived = self._arrivals(max(left, 0.0))
                if left <= 0 and not arrived:
                    return  # what came in time has been taken, however long adding it up took
                try:
                    for one in arrived:
                        reply = self._reply(one)
                        if reply is not None and (one.client, one.task_id) in waiting:
                            waiting.discard((one.client, one.task_id))
                            yield reply
                finally:  # the caller has done with them
                    self._on_loop(self.sessions.room.give_back, sum(one.room for one in arrived))
        finally:
            self._forget(waiting)

    def _arrivals(self, wait_s: float) -> list[_Arrived]:
        """What has arrived, once there is something or the time is up."""
        with self._condition:
            if not self._arrived and wait_s:
                self._condition.wait(wait_s)
            arrived = list(self._arrived)
            self._arrived.clear()
        return arrived

    def _reply(self, one: _Arrived) -> Message | None:
        """The reply to what was asked; None if its round ended a moment ago."""
        question = self._asked.pop((one.client, one.task_id), None)
        if question is None:
            return None
        if isinstance(one.answer, pb.Failure):
            return Message(Error(code=one.answer.code, reason=one.answer.reason), reply_to=question)
        try:
            return Message(codec.decode(one.answer), reply_to=question)
        except ProtocolError as error:
            return Message(Error(code=FAILED, reason=str(error)), reply_to=question)

    def _forget(self, waiting: set[tuple[str, str]]) -> None:
        by_task: dict[str, list[str]] = {}
        for client, task_id in waiting:
            self._asked.pop((client, task_id), None)
            by_task.setdefault(task_id, []).append(client)
        for task_id, clients in by_task.items():
            self._on_loop(self.sessions.forget, clients, task_id)
