"""GrpcGrid: Flower's Grid over the sessions of real clients.

The gRPC server runs on an asyncio loop in a thread of its own; the round loop calls the grid from its own
thread and waits.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import grpc
from flwr.app import Error, Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from common.errors import CertificateError, ConnectionFailed, ProtocolError
from common.federation import Federation
from common.wire import codec
from common.wire import session_pb2 as pb
from common.wire import session_pb2_grpc as service
from common.wire.grids import RunGrid
from common.wire.records import FAILED
from common.wire.tls import TLSMaterial, is_loopback
from server.sessions import Sessions, Task, node_id

T = TypeVar("T")

# A dead peer is noticed within KEEPALIVE + KEEPALIVE_TIMEOUT, also by routers that forget idle connections.
KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS = 20_000, 20_000
OPTIONS = [
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    ("grpc.max_receive_message_length", 2 * codec.CHUNK),
    ("grpc.so_reuseport", 0),  # a port that is in use is an error
]


class GrpcGrid(RunGrid):
    """Serves sessions from `start` (or `with`) to `stop`."""

    def __init__(self, federation: Federation, *, run: str, address: str, tls: TLSMaterial | None) -> None:
        """`address` is HOST:PORT; port 0 takes a free one. Without TLS only loopback is served."""
        super().__init__(run)
        self._name, self._address, self._tls = run, address, tls
        self._condition = threading.Condition()
        self._messages: dict[str, Message] = {}  # task id -> what was asked
        self._replies: dict[str, Message] = {}  # task id -> the answer, until it is pulled
        self._names: dict[int, str] = {}
        self._nodes: list[int] = []
        self._sessions = Sessions(federation, run, answer=self._answered, changed=self._changed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sessions", daemon=True)
        self._server: Any = None
        self.port = 0

    # Lifetime

    def start(self) -> None:
        """Raises `ConnectionFailed` if the port is in use, `CertificateError` if plain text would leave the machine."""
        host = self._address.rpartition(":")[0]
        if self._tls is None and not is_loopback(host):
            raise CertificateError(f"without certificates only loopback is served, not {host}; see `cloister certs`")
        self._thread.start()
        self.port = self._call(self._start())

    def stop(self, reason: str) -> None:
        """Says goodbye to all clients, and ends."""
        if self._server is not None:
            self._call(self._stop(reason))
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    async def _start(self) -> int:
        server = grpc.aio.server(options=OPTIONS)
        service.add_SessionServicer_to_server(self._sessions, server)
        status = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(status, server)
        await status.set("", health_pb2.HealthCheckResponse.SERVING)
        try:
            if self._tls is None:
                port = server.add_insecure_port(self._address)
            else:
                credentials = grpc.ssl_server_credentials(
                    [(self._tls.key, self._tls.certificate)], self._tls.ca, require_client_auth=True
                )
                port = server.add_secure_port(self._address, credentials)
        except RuntimeError as error:
            raise ConnectionFailed(
                f"{self._address}: cannot be served; the port is in use, or the address is not this machine's"
            ) from error
        await server.start()
        self._server = server
        return int(port)

    async def _stop(self, reason: str) -> None:
        await self._sessions.finish(reason)
        await self._server.stop(grace=1.0)

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _on_loop(self, function: Callable[..., None], *args: Any) -> None:
        self._loop.call_soon_threadsafe(function, *args)

    # What the sessions tell us, on their loop

    def _changed(self) -> None:
        ready = {node_id(name): name for name in self._sessions.ready}
        with self._condition:
            self._nodes = list(ready)
            self._names |= ready
            self._condition.notify_all()

    def _answered(self, task_id: str, answer: bytes | pb.Failure) -> None:
        message = self._messages.pop(task_id, None)
        if message is None:
            return  # its round ended a moment ago
        if isinstance(answer, pb.Failure):
            reply = Message(Error(code=answer.code, reason=answer.reason), reply_to=message)
        else:
            try:
                reply = Message(codec.decode(answer), reply_to=message)
            except ProtocolError as error:
                reply = Message(Error(code=FAILED, reason=str(error)), reply_to=message)
        with self._condition:
            self._replies[task_id] = reply
            self._condition.notify_all()

    # Flower's Grid

    def get_node_ids(self) -> list[int]:
        with self._condition:
            return list(self._nodes)

    def name_of(self, node: int) -> str:
        """The client's name, also after it has gone."""
        return self._names.get(node, str(node))

    @property
    def refusals(self) -> dict[str, str]:
        """Clients that refused the federation as a whole, and why."""
        return dict(self._sessions.refusals)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Gives each message to its client. A content that several messages share is encoded once."""
        encoded: dict[int, bytes] = {}
        task_ids: list[str] = []
        for message in messages:
            metadata = message.metadata
            client = self.name_of(metadata.dst_node_id)
            # The same task after a restart of the server, so that a reply that was finished can be used.
            task_id = f"{self._name}/{metadata.message_type}/{metadata.group_id}/{client}"
            content = encoded.get(id(message.content))
            if content is None:
                content = encoded[id(message.content)] = codec.encode(message.content)
            task = Task(task_id, client, metadata.message_type, metadata.group_id, metadata.ttl, content)
            self._messages[task_id] = message
            self._on_loop(self._sessions.give, task)
            task_ids.append(task_id)
        return task_ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The answers that are there, each once."""
        with self._condition:
            return [self._replies.pop(task_id) for task_id in message_ids if task_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Waits until all have answered or the time is up; what comes later is dropped."""
        task_ids = self.push_messages(messages)
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._condition:
            while not all(task_id in self._replies for task_id in task_ids):
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._condition.wait(1.0 if left is None else min(left, 1.0))
            late = [task_id for task_id in task_ids if task_id not in self._replies]
        replies = self.pull_messages(task_ids)
        for task_id in late:
            self._messages.pop(task_id, None)
        if late:
            self._on_loop(self._sessions.forget, late)
        return replies
