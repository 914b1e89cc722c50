"""What our own grids have in common."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.wire.identity import identify_process
from server.rounds.admission import Partial, Rejection
from server.rounds.aggregation import Aggregator


class RunGrid(Grid):
    """A Flower Grid that belongs to one run from the start, in a process that speaks as its server."""

    transfer_s = 0.0  # for the last round's reply that took longest to arrive, once it had begun

    def __init__(self, run: str) -> None:
        self._run_id = identify_process(run)

    def set_run(self, run: Any) -> None:
        """The grid has its run already."""

    @property
    def run(self) -> Any:
        return self._run_id

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def refusals(self) -> list[Rejection]:
        """Clients that refused the federation as a whole when they were to join it, and have not come back since."""
        return []

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Generator[Message]:
        """The replies as they come, none of which is kept here; a caller that has enough leaves the rest."""
        yield from self.send_and_receive(messages, timeout=timeout)

    def answers(
        self,
        messages: Iterable[Message],
        *,
        aggregator: Callable[[], Aggregator],
        needed: int,
        compare: bool,
        timeout: float | None = None,
    ) -> Generator[Message | Partial]:
        """The replies to a round of training as they come.

        A grid that has many clients at hand may put their updates together in aggregators of its own, made by
        `aggregator`, and answer for all of them with one `Partial`: of those that pass what admission checks, their
        weights beside each other's if `compare`, and of no more than `needed`.
        """
        yield from self.stream(messages, timeout=timeout)
