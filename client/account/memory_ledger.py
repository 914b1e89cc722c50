"""A ledger that ends with its process, for simulated owners: entries and plans in lists, nothing written."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Protocol

from client.account.entries import Entry
from common.errors import LedgerError


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


class MemoryLedger:
    """One simulated dataset's account."""

    authority = ""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._plans: dict[str, dict[str, Any]] = {}

    def entries(self) -> list[Entry]:
        return [*self._entries]

    def count(self) -> int:
        return len(self._entries)

    def last_round(self) -> str:
        return next((entry.time for entry in reversed(self._entries) if _is_round(entry)), "")

    def rounds(self) -> int:
        return sum(map(_is_round, self._entries))

    def charge(self, entry: Entry, *, after: int | None = None) -> None:
        if after is not None and after != len(self._entries):
            raise LedgerError("somebody else has charged this account meanwhile. Nothing is released")
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        before = self._entries[-1].time if self._entries else ""
        self._entries.append(replace(entry, time=max(now, before), authority=self.authority))

    def plan(self, run: str) -> dict[str, Any] | None:
        return {**self._plans[run]} if run in self._plans else None

    def store_plan(self, run: str, plan: dict[str, Any]) -> None:
        self._plans[run] = {**plan}

    def close(self) -> None:
        """There is nothing to close."""


def _is_round(entry: Entry) -> bool:
    return entry.part == "train" and entry.mechanism in ("gaussian", "none")
