"""InlineGrid: ClientApps called one after another in this process. The plain oracle for every faster grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable

from flwr.app import Context, Message, RecordDict

from server.rounds.run_grid import RunGrid


class InlineGrid(RunGrid):
    """Flower's Grid over one ClientApp and a context for each node."""

    def __init__(self, app: Callable[[Message, Context], Message], nodes: Iterable[int], *, run: str) -> None:
        super().__init__(run)
        self._app = app
        self._contexts: dict[int, Context | None] = dict.fromkeys(nodes)
        self._replies: dict[str, Message] = {}
        self._sent = 0

    def get_node_ids(self) -> list[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            self._sent += 1
            ids.append(str(self._sent))
            self._replies[ids[-1]] = self._app(message, self._context(message.metadata.dst_node_id))
        return ids

    def _context(self, node: int) -> Context:
        """A node's, made when it is first called: there may be many nodes."""
        context = self._contexts[node]
        if context is None:
            context = Context(run_id=self._run_id, node_id=node, node_config={}, state=RecordDict(), run_config={})
            self._contexts[node] = context
        return context

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Answers in the order of the messages; those not begun within `timeout` seconds are not asked."""
        return list(self.stream(messages, timeout=timeout))

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Generator[Message]:
        deadline = None if timeout is None else time.monotonic() + timeout
        for message in messages:
            if deadline is not None and time.monotonic() > deadline:
                break
            yield from self.pull_messages(self.push_messages([message]))
