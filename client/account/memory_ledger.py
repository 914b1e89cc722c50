"""A ledger that ends with its process, for simulated owners: entries and plans in lists, nothing written."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from client.account.entries import Entry
from common.errors import LedgerError


class MemoryLedger:
    """One simulated dataset's account: a `Charges` (client/account/books.py)."""

    authority = ""

    def __init__(self) -> None:
        self._entries: list[tuple[Entry, float]] = []  # each with its time, as it is; as an entry has it when asked for
        self._plans: dict[str, dict[str, Any]] = {}

    def entries(self) -> list[Entry]:
        return [replace(entry, time=_iso(when), authority=self.authority) for entry, when in self._entries]

    def count(self) -> int:
        return len(self._entries)

    def last_round(self) -> str:
        return next((_iso(when) for entry, when in reversed(self._entries) if _is_round(entry)), "")

    def rounds(self) -> int:
        return sum(_is_round(entry) for entry, _ in self._entries)

    def charge(self, entry: Entry, *, after: int | None = None) -> None:
        if after is not None and after != len(self._entries):
            raise LedgerError("somebody else has charged this account meanwhile. Nothing is released")
        before = self._entries[-1][1] if self._entries else 0.0
        self._entries.append((entry, max(time.time(), before)))

    def plan(self, run: str) -> dict[str, Any] | None:
        return {**self._plans[run]} if run in self._plans else None

    def store_plan(self, run: str, plan: dict[str, Any]) -> None:
        self._plans[run] = {**plan}

    def close(self) -> None:
        """There is nothing to close."""


def _iso(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds")


def _is_round(entry: Entry) -> bool:
    return entry.part == "train" and entry.mechanism in ("gaussian", "none")
