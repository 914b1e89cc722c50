"""A run's events, boiled down to how it goes now: for `cloister status`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from common.certificates.identity import Peer
from common.document.federation import Federation
from common.wire import session_pb2 as pb
from server.rounds.disclosure import Disclosure
from server.rounds.run import Event

VERSION = version("cloister")


class Watch:
    """Give it every event of a run; `status` is called on the sessions' loop."""

    def __init__(self, federation: Federation, run: str) -> None:
        self._federation, self._run = federation, run
        self._disclosure = Disclosure.of(federation)
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._state, self._round, self._rounds, self._problem = "starting", 0, federation.training.rounds, ""
        self._strikes: dict[str, int] = {}
        self._reasons: dict[str, str] = {}
        # `Sessions.describe`, once there are sessions.
        self.clients: Callable[[], dict[str, tuple[str, float, str]]] = dict

    def __call__(self, event: Event) -> None:
        with self._lock:
            kind = event["event"]
            if kind in ("start", "resumed"):
                self._state, self._round = "running", event.get("round", 0)
            elif kind == "waiting":
                self._state = f"waiting for clients: {event['clients']} of {event['min_clients']}"
            elif kind == "end":
                self._state = str(event["status"]).replace("_", " ")
            elif kind == "round":
                self._note_round(event)

    def _note_round(self, event: dict[str, Any]) -> None:
        self._state, self._problem = "running", event.get("failed", "")
        if not self._problem:
            self._round = event["round"]
        struck = {r["client"]: r["reason"] for r in event["rejected"] if r["kind"] in ("rejected", "late")}
        for client, reason in struck.items():
            self._strikes[client] = self._strikes.get(client, 0) + 1
            self._reasons[client] = reason
        self._reasons |= {r["client"]: r["reason"] for r in event["rejected"] if r["client"] not in struck}

    def status(self, peer: Peer) -> pb.StatusReply:
        """How the run goes. An operator sees all clients, a client itself: who else takes part is not its to know."""
        with self._lock:
            reply = pb.StatusReply(
                federation=self._federation.name,
                fingerprint=self._federation.fingerprint,
                run=self._run,
                round=self._round,
                rounds=self._rounds,
                state=self._state,
                seconds=time.monotonic() - self._started,
                version=VERSION,
                problem=self._problem,
            )
            if not peer.operator and self._problem:
                reply.problem = "the last round failed"  # why, may be another client's reason
            clients = self.clients()
            for name in sorted(clients) if peer.operator else clients.keys() & {peer.name}:
                state, seen, reason = clients[name]
                state, seen = self._disclosure.activity(state, seen)
                reply.clients.add(
                    name=name,
                    state=state,
                    last_seen=seen,
                    strikes=self._strikes.get(name, 0),
                    reason=reason or self._reasons.get(name, ""),
                )
        return reply
