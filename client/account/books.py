"""What an account is kept in, and the one place that writes to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Protocol

from client.account.entries import Entry, Mechanism, Part, deal, spent
from client.account.policy import Policy
from client.data import Dataset
from common.document.federation import Federation
from common.errors import BudgetExhausted
from common.privacy.releases import GaussianRelease

NOT_COVERED = "the data owner's privacy budget does not cover this run"  # whatever was spent, and on what


class Charges(Protocol):
    """What an account needs of a ledger; client/account/ledger.py says what each does."""

    authority: str

    def entries(self) -> list[Entry]: ...

    def count(self) -> int: ...

    def last_round(self) -> str: ...

    def rounds(self) -> int: ...

    def charge(self, entry: Entry, *, after: int | None = None) -> None: ...

    def plan(self, run: str) -> dict[str, Any] | None: ...

    def store_plan(self, run: str, plan: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Books:
    """One dataset in one federation: what its owner allows, and what was released of it by this federation and others.

    Entries are made and written here alone (client/account/account.py is the door that others use).
    """

    policy: Policy
    ledger: Charges
    federation: Federation
    dataset: Dataset

    @cached_property
    def _fingerprint(self) -> str:
        return self.federation.fingerprint

    @property
    def deal(self) -> tuple[str, str]:
        """What decides which part a row is in."""
        return deal(self.dataset.split, self.dataset.content)

    def entry(self, run: str, task: str, part: Part, mechanism: Mechanism, **figures: Any) -> Entry:
        """The entry for a release of a run; `figures` are those of its mechanism."""
        return Entry(
            part=part,
            split=self.dataset.split,
            run=run,
            task=task,
            attempt=1,
            mechanism=mechanism,
            federation=self._fingerprint,
            content=self.dataset.content,
            **figures,
        )

    def gaussian(self, run: str, task: str, part: Part, release: GaussianRelease) -> Entry:
        """The entry for a Gaussian release of a run."""
        return self.entry(run, task, part, "gaussian", **vars(release))

    def write(self, entry: Entry, *, after: int | None = None) -> None:
        """Writes an entry, durably, before what it pays for is released.

        Args:
            after: how many entries there were when the account was found to cover this one.

        Raises:
            LedgerError: it could not be written, or there are other entries now.
        """
        self.ledger.charge(entry, after=after)

    def check_covered(self, planned: Sequence[Entry]) -> None:
        """Raises `BudgetExhausted` if `planned` would pass what the owner allows, in all or to the authority behind
        this federation, whatever its documents and runs are called: their names are the server's."""
        policy, entries = self.policy, self.ledger.entries()
        limits = [("epsilon", policy.epsilon, policy.delta, entries)]
        if policy.federation_epsilon is not None:
            # A count that another authority's federation has paid for is used by this one too.
            own = [e for e in entries if e.counts_for(self.ledger.authority) or e.mechanism == "geometric"]
            delta = policy.federation_delta or policy.delta
            limits.append(("federation_epsilon", policy.federation_epsilon, delta, own))
        for rule, limit, delta, before in limits:
            total = spent(before, delta, more=planned)
            if total > limit:
                raise BudgetExhausted(
                    f"policy.{rule}: {limit:g} at delta {delta:g}, of which {spent(before, delta):.2f} is spent; with "
                    f"this run it would be {total:.2f}",
                    public=NOT_COVERED,
                )

    def check_round(self) -> None:
        """Raises `Refusal` if it is too early for a round, or there were as many as the policy allows."""
        if self.policy.min_seconds_between_rounds:
            self.policy.check_time(self.ledger.last_round(), datetime.now(UTC))
        if self.policy.max_rounds is not None:  # counting reads the whole ledger
            self.policy.check_rounds(self.ledger.rounds() + 1)

    def pause(self) -> float:
        """Seconds until the policy allows the next round."""
        return self.policy.pause(self.ledger.last_round(), datetime.now(UTC))


def write_refusal(ledger: Charges, federation: Federation) -> None:
    """Notes that a document did not fit the table, which its sender hears: a limit on bits and not on epsilon."""
    ledger.charge(
        Entry(
            part="train",
            split="",
            run="",
            task="",
            attempt=1,
            mechanism="refusal",
            federation=federation.fingerprint,
            content="",
        )
    )
