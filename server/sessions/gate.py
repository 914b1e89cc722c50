"""Who may come in: by certificate, revocation list, number and pace.

What a stranger did wrong stands in the log; the stranger is told only that it is not accepted.

    no certificate of the federation's authority, or not in time     TLS ends the connection; gRPC's log says why
    a revoked certificate                                            not accepted; if it is connected, it is sent away
    a certificate that is not a client's, or has no usable name      not accepted
    a name that is connected with another key                        not accepted, until that session ends
    more than `attempts` tries, and one more each `attempt_every_s`  told to wait
    more sessions than `sessions`                                    told to wait
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeAlias

import grpc

from common.certificates import identity
from common.certificates.files import CLIENT, EXPIRES_SOON_DAYS
from common.certificates.identity import Peer, ServerIdentity
from common.errors import CertificateError

log = logging.getLogger("cloister.server")

Stream: TypeAlias = grpc.aio.ServicerContext

NOT_ACCEPTED = "not accepted"


@dataclass(frozen=True)
class Limits:
    """What one server takes on. Sizes are in bytes, times in seconds."""

    sessions: int = 10_000
    attempts: int = 10  # of one name to connect, in a row
    attempt_every_s: float = 2.0  # then one more
    hello_s: float = 10.0  # to say who one is
    stall_s: float = 30.0  # for a reply that has begun to go on, besides a second for each 16 KiB
    replies: int = 64 << 20  # of replies that are being received, or wait to be added up, of all clients together


USUAL = Limits()


class TurnedAway(Exception):
    """Carries what the peer is told, and gRPC's code for it."""

    def __init__(self, code: grpc.StatusCode, told: str) -> None:
        self.code = code
        super().__init__(told)


class Gate:
    """Decides who a peer is and whether it may come in. Everything is called on one asyncio loop."""

    def __init__(
        self, identity: ServerIdentity | None, limits: Limits, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Without an identity the server speaks plain text on loopback, and a client is whom it says it is."""
        self._identity, self._limits, self._clock = identity, limits, clock
        self._tries: dict[str, tuple[float, float]] = {}  # name -> how many tries are left, and when that was so
        self._warned: set[str] = set()
        self._material = identity and identity.material

    def peer(self, stream: Stream, said: str = "") -> Peer:
        """Who is there: its certificate's name, or on plain text what it said. Raises `TurnedAway`."""
        if self._identity is None:
            if not re.fullmatch(CLIENT, said):
                raise TurnedAway(grpc.StatusCode.UNAUTHENTICATED, "has neither a certificate nor a fitting name")
            return Peer(name=said, operator=True, serial=0, key=b"", expires=datetime.max.replace(tzinfo=UTC))
        shown: Any = stream.auth_context().get("x509_pem_cert")
        try:
            if not shown:
                raise CertificateError("it showed no certificate")
            peer = identity.peer(shown[0])
            if self.is_revoked(peer):
                raise CertificateError(f"the certificate of {peer.name} is revoked")
        except CertificateError as error:
            log.warning("%s was turned away: %s", stream.peer(), error)
            raise TurnedAway(grpc.StatusCode.UNAUTHENTICATED, NOT_ACCEPTED) from error
        self._warn_of_expiry(peer)
        return peer

    def is_revoked(self, peer: Peer) -> bool:
        """Is this certificate on the revocation list, as it is now?"""
        return self._identity is not None and self._identity.is_revoked(peer.serial)

    def check_session(self, peer: Peer, older: Peer | None, sessions: int) -> None:
        """May this peer begin a session, where `older` has one of the same name, if any? Raises `TurnedAway`."""
        if not self._may_try(peer.name):
            log.warning("%s was turned away: too many attempts", peer.name)
            raise TurnedAway(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many attempts; wait before the next")
        if older is not None and older.key != peer.key:
            log.warning("%s was turned away: a session of that name with another key is there", peer.name)
            raise TurnedAway(grpc.StatusCode.ALREADY_EXISTS, "a session of this name is there, with another key")
        if older is None and sessions >= self._limits.sessions:
            log.warning("%s was turned away: %d sessions are as many as there may be", peer.name, sessions)
            raise TurnedAway(grpc.StatusCode.RESOURCE_EXHAUSTED, "the server is full; try again later")

    def refresh(self) -> bool:
        """Rereads certificates and revocation list if their files changed. Did they?"""
        return self._identity is not None and self._identity.refresh()

    def is_renewed(self) -> bool:
        """Are our certificate, key or authority others than when this was asked last?"""
        material = self._identity and self._identity.material
        renewed, self._material = material != self._material, material
        return renewed

    def _may_try(self, name: str) -> bool:
        """A bucket of tries for each name, which fills again as time passes."""
        now, most = self._clock(), float(self._limits.attempts)
        left, then = self._tries.get(name, (most, now))
        left = min(left + (now - then) / self._limits.attempt_every_s, most)
        self._tries[name] = (max(left - 1, 0.0) if left >= 1 else left, now)
        return left >= 1

    def _warn_of_expiry(self, peer: Peer) -> None:
        days = (peer.expires - datetime.now(UTC)).days
        if days < EXPIRES_SOON_DAYS and peer.name not in self._warned:
            self._warned.add(peer.name)
            log.warning("the certificate of %s expires in %d days", peer.name, days)
