"""Many light clients in one process: each its own connection and certificate, and an answer ready for every task.

They speak the session protocol in raw frames, so that what is measured is the server.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import grpc
from flwr.app import MetricRecord, RecordDict

from common.wire import codec, protocol, records
from common.wire import session_pb2 as pb
from common.wire.identity import identify_process
from simulations.benchmarks.wire_processes import material, say

METHOD = "/cloister.session.v1.Session/Connect"
OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 2 * protocol.CHUNK),
    ("grpc.max_send_message_length", 2 * protocol.CHUNK),
]
AT_ONCE = 50  # handshakes under way
# The first byte of a frame tells its kind: the number of its field in the oneof, and wire type 2.
WELCOME, TASK, CHUNK, ACK = (number << 3 | 2 for number in (1, 3, 4, 5))


class Crowd:
    def __init__(self, port: int, certs: Path, fingerprint: str) -> None:
        self._address, self._certs = f"127.0.0.1:{port}", certs
        self._ready = pb.ClientFrame(ready=pb.Ready(fingerprint=fingerprint)).SerializeToString()
        self._answers: dict[int, tuple[int, bytes, list[bytes]]] = {}  # a task's size -> the reply's, and its parts
        self._streams: list[asyncio.Task[None]] = []
        self._gate = asyncio.Semaphore(AT_ONCE)
        self.connected, self.lost = 0, 0

    async def connect(self, first: int, count: int, seconds: float) -> int:
        """Connects clients `first` onwards; returns how many were welcomed in time."""
        waiting = []
        for i in range(first, first + count):
            welcomed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._streams.append(asyncio.create_task(self._client(f"c{i}", welcomed)))
            waiting.append(welcomed)
        done, _ = await asyncio.wait(waiting, timeout=seconds)
        return sum(not future.cancelled() and future.exception() is None for future in done)

    async def _client(self, name: str, welcomed: asyncio.Future[None]) -> None:
        await self._gate.acquire()
        welcomed.add_done_callback(lambda _: self._gate.release())
        own = material(self._certs, name)
        credentials = grpc.ssl_channel_credentials(own.ca, own.key, own.certificate)
        try:
            async with grpc.aio.secure_channel(self._address, credentials, options=OPTIONS) as channel:
                call = channel.stream_stream(METHOD)()
                await call.write(protocol.hello(version="light").SerializeToString())
                await self._session(call, welcomed)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            if not welcomed.done():
                welcomed.set_exception(error)
        finally:
            self.lost += 1
            if not welcomed.done():
                welcomed.cancel()

    async def _session(self, call: Any, welcomed: asyncio.Future[None]) -> None:
        parts: list[bytes] = []
        task, have = pb.Task(), 0
        while (frame := await call.read()) is not grpc.aio.EOF:
            kind = frame[0]
            if kind in (TASK, CHUNK):
                if kind == TASK:
                    task, have, parts = pb.ServerFrame.FromString(frame).task, 0, []
                    data = task.data
                else:
                    data = pb.ServerFrame.FromString(frame).chunk.data
                have += len(data)
                if task.size not in self._answers:
                    parts.append(data)
                if have == task.size:
                    await self._reply(call, task, parts)
            elif kind == WELCOME:
                await call.write(self._ready)
                if not welcomed.done():
                    welcomed.set_result(None)
            elif kind != ACK:
                return

    async def _reply(self, call: Any, task: pb.Task, parts: list[bytes]) -> None:
        """Sends the same arrays back, as a valid reply. All but its head is made once for each size of task."""
        if task.size not in self._answers:
            arrays = codec.decode(b"".join(parts))[records.ARRAYS]
            metrics = MetricRecord({records.WEIGHT: 160.0, records.LOSS: 0.5})
            data = codec.encode(RecordDict({records.ARRAYS: arrays, records.METRICS: metrics}))
            head, *more = protocol.reply_frames(task.id, data)
            first = head.reply.data
            self._answers[task.size] = len(data), first, [chunk.SerializeToString() for chunk in more]
        size, first, chunks = self._answers[task.size]
        await call.write(pb.ClientFrame(reply=pb.Reply(id=task.id, size=size, data=first)).SerializeToString())
        for chunk in chunks:
            await call.write(chunk)


async def main() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    identify_process("benchmark")
    port, certs, fingerprint = sys.argv[1:4]
    crowd = Crowd(int(port), Path(certs), fingerprint)
    say(ready=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        started = time.monotonic()
        connected = await crowd.connect(command["first"], command["count"], command["seconds"])
        say(connected=connected, lost=crowd.lost, seconds=time.monotonic() - started)


if __name__ == "__main__":
    asyncio.run(main())
