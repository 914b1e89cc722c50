"""Grids over simulated clients, and the plainest: ClientApps called one after another, the oracle for faster ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable

from flwr.app import Context, Message, RecordDict

from server.rounds.run_grid import RunGrid


class SimulatedGrid(RunGrid):
    """Flower's Grid over clients in this process' hands, each with a context. How they answer is `stream`'s to say."""

    def __init__(self, nodes: Iterable[int], *, run: str) -> None:
        super().__init__(run)
        self._contexts: dict[int, Context | None] = dict.fromkeys(nodes)
        self._replies: dict[str, Message] = {}
        self._sent = 0

    def get_node_ids(self) -> list[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for reply in self.stream(messages):
            self._sent += 1
            ids.append(str(self._sent))
            self._replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Answers in the order of the messages; those not begun within `timeout` seconds are not asked."""
        return list(self.stream(messages, timeout=timeout))

    def _context(self, node: int) -> Context:
        """A node's, made when it is first called: there may be many nodes."""
        context = self._contexts[node]
        if context is None:
            context = Context(run_id=self._run_id, node_id=node, node_config={}, state=RecordDict(), run_config={})
            self._contexts[node] = context
        return context


class InlineGrid(SimulatedGrid):
    """Calls an app for one client after another."""

    def __init__(self, app: Callable[[Message, Context], Message], nodes: Iterable[int], *, run: str) -> None:
        super().__init__(nodes, run=run)
        self._app = app

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Generator[Message]:
        deadline = None if timeout is None else time.monotonic() + timeout
        for message in messages:
            if deadline is not None and time.monotonic() > deadline:
                break
            yield self._app(message, self._context(message.metadata.dst_node_id))
