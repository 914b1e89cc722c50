"""One of Flower's own grids, as a run uses it: with names for its nodes, and answers as they come.

Flower knows a client by a number. That number is what a SuperLink authenticates, so all that counts for or against a
client (cohorts, strikes, whose reply is whose) stays with it. A name is what a client says of itself, and is for people
to read:

    the first answer with content says a name   it is shown in place of the number, for the whole run
    it says none, or none that can be shown     the number is shown, for the whole run
    digits alone                                the number is shown: that could be another node's number
    another node has that name                  the number is shown, and it is logged: of two, one says what it is not
    a later answer says another name            the first one is shown, and it is logged
    an error                                    says no name: a node that has only refused is shown by its number
    the document has `privacy.client`           numbers are shown: who has a name would be who has answered

Two names that differ in upper and lower case are one. So one name in a run folder is one node from the first round to
the last, and which node is in `nodes.json`: a client can call itself by another's name, if it is the first to do so,
but whoever registered the nodes' keys sees that the number is not the other's.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.text import is_name, shown
from common.wire import records

POLL_S = 0.25  # between looks for answers, or for who is there; Flower's own `send_and_receive` looks every 3 s

log = logging.getLogger("cloister.server")


class FlowerGrid(Grid):
    """Flower's grid, and the names of its nodes. `names`: may the nodes have names?"""

    def __init__(self, grid: Grid, *, names: bool) -> None:
        self._grid, self._has_names = grid, names
        self._names: dict[int, str] = {}  # by node; its number where it has no other
        self._owners: dict[str, int] = {}  # by name, in lower case
        self._present: list[int] = []
        self._looked = -math.inf

    def name_of(self, node: int) -> str:
        """What to call a node, in all that is written of the run."""
        return self._names.get(node, str(node))

    @property
    def nodes(self) -> dict[str, str]:
        """The numbers of the nodes that have a name, by name."""
        return {self._names[node]: str(node) for node in sorted(self._owners.values())}

    def _hear(self, node: int, said: str | None) -> None:
        """Gives a node its name, by the first answer that could say one."""
        if (known := self._names.get(node)) is not None:
            if said is not None and known not in (said, str(node)):
                log.warning("node %d is shown as %s, and now calls itself %r", node, known, shown(said, 64))
            return
        self._names[node] = str(node)
        if said is None:
            return
        if not is_name(said) or said.isdecimal():
            log.warning("node %d calls itself %r, which is no name; it is shown by its number", node, shown(said, 64))
        elif (owner := self._owners.setdefault(said.lower(), node)) != node:
            log.warning("node %d calls itself %s as node %d does; it is shown by its number", node, said, owner)
        else:
            self._names[node] = said

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Generator[Message]:
        """The replies as they come, for `timeout` seconds; what they said of names is taken out of them."""
        ends = None if timeout is None else time.monotonic() + timeout
        waiting = {i for i in self._grid.push_messages(list(messages)) if i}  # Flower's has no id where it sent none
        while waiting:
            for reply in list(self._grid.pull_messages(sorted(waiting))):
                waiting.discard(reply.metadata.reply_to_message_id)
                yield self._heard(reply)
            if not waiting or (ends is not None and time.monotonic() >= ends):
                return
            time.sleep(POLL_S)

    def _heard(self, reply: Message) -> Message:
        if reply.has_content():
            said = records.take_name(reply.content)
            if self._has_names:
                self._hear(reply.metadata.src_node_id, said)
        return reply

    def get_node_ids(self) -> list[int]:
        """Who is there, as it was at most `POLL_S` seconds ago: who waits for a quorum asks far more often."""
        if time.monotonic() - self._looked >= POLL_S:
            self._present, self._looked = list(self._grid.get_node_ids()), time.monotonic()
        return self._present

    # The rest is the grid's own.

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._heard(reply) for reply in self._grid.pull_messages(message_ids)]
