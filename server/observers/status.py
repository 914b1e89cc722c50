"""A run's events, boiled down to how it goes now: for `cloister status`."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version

from common.certificates.identity import Peer
from common.document.federation import Federation
from common.wire import session_pb2 as pb
from server.rounds.disclosure import Disclosure
from server.rounds.events import Event, Standing, after

VERSION = version("cloister")


class Watch:
    """Give it every event of a run; `status` is called on the sessions' loop."""

    def __init__(self, federation: Federation, run: str) -> None:
        self._federation, self._run = federation, run
        self._disclosure = Disclosure.of(federation)
        self._started = time.monotonic()
        self._standing = Standing(rounds=federation.training.rounds)
        # `Sessions.describe`, once there are sessions.
        self.clients: Callable[[], dict[str, tuple[str, float, str]]] = dict

    def __call__(self, event: Event) -> None:
        self._standing = after(self._standing, event)

    def status(self, peer: Peer) -> pb.StatusReply:
        """How the run goes. An operator sees all clients, a client itself: who else takes part is not its to know."""
        standing = self._standing  # one value, replaced whole by the run's thread
        reply = pb.StatusReply(
            federation=self._federation.name,
            fingerprint=self._federation.fingerprint,
            run=self._run,
            round=standing.round,
            rounds=standing.rounds,
            state=_shown(standing),
            seconds=time.monotonic() - self._started,
            version=VERSION,
            problem=standing.problem,
        )
        if not peer.operator and standing.problem:
            reply.problem = "the last round failed"  # why, may be another client's reason
        clients = self.clients()
        for name in sorted(clients) if peer.operator else clients.keys() & {peer.name}:
            state, seen, reason = clients[name]
            state, seen = self._disclosure.activity(state, seen)
            reply.clients.add(
                name=name,
                state=state,
                last_seen=seen,
                strikes=standing.strikes.get(name, 0),
                reason=reason or standing.reasons.get(name, ""),
            )
        return reply


def _shown(standing: Standing) -> str:
    waiting = standing.waiting
    return standing.state if waiting is None else f"{standing.state}: {waiting.clients} of {waiting.min_clients}"
