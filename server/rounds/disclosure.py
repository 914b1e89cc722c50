"""What may be told of a run: in events, results, statements and to whoever asks how it goes.

Under `privacy.client` the server adds the noise, and what leaves it must not tell what a client's own reply was. That a
client is connected, or refuses, is public; whether its reply counted is not. Where rounds draw whom they ask
(`strategy.fraction` below 1), who was asked is a secret that the guarantee rests on (amplification by sampling), and
with it every figure of a client that grows when it is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from common.document.federation import Federation
from common.privacy.statement import Statement
from common.wire.records import BUDGET_EXHAUSTED, LATE, LOST, REFUSED
from server.rounds.admission import Rejection
from server.rounds.events import Rejected

SAYS_NO = (REFUSED, BUDGET_EXHAUSTED)
KINDS = {REFUSED: "refused", BUDGET_EXHAUSTED: "budget_exhausted", LOST: "lost", LATE: "late"}
NOT_TOLD = "its reason is not told, since it could tell when it was asked"


@dataclass(frozen=True)
class Disclosure:
    """`hides_replies`: may nobody learn whose reply counted? `hides_cohorts`: may nobody learn who was asked?"""

    hides_replies: bool
    hides_cohorts: bool

    @classmethod
    def of(cls, federation: Federation) -> Disclosure:
        hides = federation.privacy.client is not None
        return cls(hides, hides and federation.strategy.fraction < 1)

    def rejections(self, found: Iterable[Rejection]) -> list[Rejection]:
        """Those that may be told."""
        return [r for r in found if not self.hides_replies or r.code in SAYS_NO]

    def named(self, rejection: Rejection, name_of: Callable[[int], str]) -> Rejected:
        """A rejection as an event tells it. A reason may tell what was spent, or when the last round was, and so when
        the client was asked."""
        reason = NOT_TOLD if self.hides_cohorts else rejection.reason
        return Rejected(name_of(rejection.node_id), KINDS.get(rejection.code, "rejected"), reason)

    def took_part(self, present: Collection[int], counted: Collection[int]) -> Collection[int]:
        """Of the nodes that were there, those that may be said to have taken part in a round, or to have been asked."""
        return present if self.hides_replies else counted

    def times(self, found: Mapping[str, float]) -> Mapping[str, float]:
        """What a round's seconds went to: that tells of replies."""
        return {} if self.hides_replies else found

    def statements(self, found: Mapping[int, Statement]) -> Mapping[int, Statement]:
        """What clients say they have released, where that may be kept: it grows when a client is asked."""
        return {} if self.hides_cohorts else found

    def activity(self, state: str, seen: float) -> tuple[str, float]:
        """What a connected client is doing, and how many seconds ago it was heard."""
        return ("connected", 0.0) if self.hides_cohorts and state in ("idle", "working") else (state, seen)
