"""A client's process is killed at random times, and what has left is compared with what was charged."""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from client.account.ledger import Ledger
from common.wire import codec
from common.wire import session_pb2 as pb
from common.wire import session_pb2_grpc as service
from tests.client.scripted import Link
from tests.integration.federation import PATIENCE_S, Process, until
from tests.support import PRIVATE, federation, table

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

KILLS = 6
EPSILON, DELTA = 50.0, 1e-3
FEDERATION = federation(
    **PRIVATE, training__rounds=2000, privacy__row__epsilon=EPSILON, privacy__evaluation={"every": 3, "noise": 60.0}
)
TASKS = [
    (kind, n) for n in range(1, 2001) for kind in ("train", "evaluate") if kind == "train" or n % 3 == 0
]  # as a server would ask


class Watching(service.SessionServicer):
    """A server that asks for one release after another, and looks up at each whether it was charged before it came.

    Every other reply is not acknowledged, and sometimes the link breaks instead: then the same is asked again.
    """

    def __init__(self, ledger: Path, chance: random.Random) -> None:
        self.replies: dict[str, set[str]] = {}  # by task, the digests of its different replies
        self.asked, self.answers = 0, 0
        self.problems: list[str] = []
        self._ledger, self._chance = ledger, chance

    async def Connect(self, requests, context):  # type: ignore[no-untyped-def]
        try:
            await self._session(Link(requests, context))
        except (StopAsyncIteration, asyncio.CancelledError):
            pass  # the client is dead
        except AssertionError as error:  # it says something else than a reply
            self.problems.append(str(error))

    async def _session(self, link: Link) -> None:
        await link.welcome(FEDERATION)
        await link.hear("ready")
        while True:
            kind, server_round = TASKS[self.asked]
            await link.ask(FEDERATION, server_round=server_round, task_type=kind)
            task, content = await link.answer()
            self._note(task.removesuffix("/ada"), content)
            if self._chance.random() < 0.05:
                return
            if self._chance.random() < 0.5:
                await link.say(ack=pb.Ack(id=task))
            self.asked += 1

    def _note(self, task: str, content: bytes) -> None:
        known = self.replies.setdefault(task, set())
        known.add(hashlib.sha256(content).hexdigest())
        stated, charged = dict(codec.decode(content)["privacy"]), charges(self._ledger)
        if charged[task] < len(known):
            self.problems.append(f"{len(known)} different replies of {task} have come, {charged[task]} were charged")
        left = Counter({t: len(replies) for t, replies in self.replies.items()})
        for what, each, part in (("steps", FEDERATION.training.local_steps, "train"), ("evaluations", 1, "evaluate")):
            least, most = (each * sum(n for t, n in found.items() if f"/{part}/" in t) for found in (left, charged))
            if not least <= stated[what] <= most:
                self.problems.append(f"{task} states {what} {stated[what]}; {least} left and {most} were charged")
        self.answers += 1


def charges(path: Path) -> Counter[str]:
    """How often each task was charged, in the ledger of a client that may be at work."""
    ledger = Ledger.reading(path)
    try:
        return Counter(e.task for e in ledger.entries() if e.mechanism == "gaussian")
    finally:
        ledger.close()


def serve(server: Watching, started: list[Any], ready: threading.Event) -> None:
    """Until `started`, which holds the loop and what ends it, is told to."""

    async def main() -> None:
        endpoint = grpc.aio.server()
        service.add_SessionServicer_to_server(server, endpoint)
        ended = asyncio.Event()
        started.extend([endpoint.add_insecure_port("127.0.0.1:0"), asyncio.get_running_loop(), ended])
        await endpoint.start()
        ready.set()
        await ended.wait()
        await endpoint.stop(0)

    asyncio.run(main())


def test_what_left_a_client_that_is_killed_at_random_times_was_charged(tmp_path):
    seed = random.randrange(1 << 32)  # other times in each run: what is asserted holds for all of them
    print(f"seed {seed}")
    chance = random.Random(seed)
    ledger = tmp_path / "state" / "ada.ledger"
    server, started, ready = Watching(ledger, random.Random(chance.random())), [], threading.Event()
    thread = threading.Thread(target=serve, args=(server, started, ready), daemon=True)
    thread.start()
    assert ready.wait(PATIENCE_S)
    port, loop, ended = started
    table().write_csv(tmp_path / "ada.csv")
    document = {
        "server": f"127.0.0.1:{port}",
        "tls": None,
        "name": "ada",
        "data": {"path": "ada.csv", "name": "ada"},
        "device": "cpu",
        "state": "state",
        "policy": {"epsilon": 2 * EPSILON, "delta": DELTA, "attempts": KILLS},
    }
    (tmp_path / "ada.yaml").write_text(yaml.safe_dump(document))
    try:
        with ExitStack() as processes:
            for kill in range(KILLS):
                before = server.answers
                client = Process(["join", "ada.yaml"], tmp_path)
                processes.callback(client.end)
                if kill == 0:  # in its start, in which the row count is charged
                    time.sleep(chance.uniform(0.5, 3))
                else:
                    until(lambda: server.answers > before + 5 or server.problems, "no reply", client)  # noqa: B023
                    time.sleep(chance.uniform(0, 1))
                client.destroy()
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(PATIENCE_S)

    assert server.problems == []
    assert server.asked > 5 * (KILLS - 1)  # it went on after each kill
    book = Ledger(ledger)
    book.verify()
    entries = book.entries()
    book.close()
    assert sum(e.mechanism == "geometric" for e in entries) == 1
    charged, left = charges(ledger), Counter({task: len(known) for task, known in server.replies.items()})
    assert left <= charged
    burnt = (charged - left).total()
    assert burnt <= KILLS  # a kill over-counts by what was in hand, and by no more
