"""A real client process against a server that follows a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from flwr.app import ConfigRecord, RecordDict

from client.account.ledger import Ledger
from client.account.policy import Policy
from client.node import Node
from client.settings import ClientFile, DataFile
from common.document.federation import Federation
from common.model import mlp
from common.wire import codec, protocol, records
from common.wire import session_pb2 as pb
from common.wire import session_pb2_grpc as service
from tests.support import table

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
