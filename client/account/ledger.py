"""The durable privacy ledger: every release of a dataset, written before it leaves.

One SQLite file, `synchronous=EXTRA`: a charge outlasts a power cut (FULL could lose the last one, since it
does not sync the folder after the journal is deleted). Entries are append-only and each carries the hash of the
one before, so that an entry changed, or removed from among others, breaks the chain. The head, how many entries there
are and the last one's hash, is kept in a file of its own, written after each charge: a ledger that is behind its head
was cut off, rewritten or brought back from an old copy, and is refused. Who can write both files can still forge them;
keep the head on another disk, or write it down (`cloister budget --head`), to be safe from that too.

Beside the entries stand the plans, so that a restart goes on with the noise that was calibrated.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.account.entries import Entry
from common import files
from common.errors import LedgerError

_TABLES = """
CREATE TABLE IF NOT EXISTS entries (id INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS plans (run TEXT PRIMARY KEY, body TEXT NOT NULL);
CREATE TRIGGER IF NOT EXISTS entries_stay BEFORE DELETE ON entries
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS entries_keep BEFORE UPDATE ON entries
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""


_WAY_FORWARD = (
    "Do not go on with it: restore the newest copies of the ledger and its head. If there are none, nobody knows what "
    "was spent, and this dataset's budget must be taken as spent"
)


@dataclass(frozen=True)
class Head:
    """The state of a ledger: how many entries, and the last one's hash. Written `33:5f3c...`."""

    entries: int
    hash: str

    def __str__(self) -> str:
        return f"{self.entries}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Raises `LedgerError` if `text` is no head."""
        entries, colon, digest = text.strip().partition(":")
        if not (colon and entries.isdecimal() and len(entries) < 19 and len(digest) == (64 if int(entries) else 0)):
            raise LedgerError(f"{text.strip()[:80]!r} is not the head of a ledger; it looks like 33:5f3c...")
        return cls(int(entries), digest)


class Ledger:
    """One dataset's account. `Ledger.in_memory()` is for tests, `Ledger.reading()` for looking."""

    authority = ""

    def __init__(self, path: Path | None, *, head: Path | None = None, authority: str = "") -> None:
        """`head` is where the head is kept; by default beside the ledger. Entries are charged to `authority`: a digest
        of the key that vouches for the server, "" without TLS.

        Raises:
            LedgerError: another process has it, it cannot be opened, or it cannot be trusted.
        """
        self.authority = authority
        self._turn, self._head_turn = threading.Lock(), threading.Lock()
        path = path and path.resolve()  # one file, one lock, by whatever name
        self._path = path
        head = head or (path.with_suffix(".head") if path else None)
        self._head_path = head and head.resolve()
        with ExitStack() as opened:
            try:
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                    opened.enter_context(files.locked(path.with_suffix(".lock")))
                self._connect(opened, str(path or ":memory:"))
                self._db.execute("PRAGMA synchronous=EXTRA")
                self._db.executescript(_TABLES)
                self.verify()
                self._write_head()
            except BlockingIOError:
                raise LedgerError(
                    f"{path}: in use by another client; one process at a time may spend a budget. Stop the other one"
                ) from None
            except (OSError, sqlite3.Error) as error:
                raise LedgerError(f"{path}: cannot be opened: {error}") from error
            self._opened = opened.pop_all()

    @classmethod
    def reading(cls, path: Path, *, head: Path | None = None) -> Ledger:
        """An existing ledger, to look at; also while a client is spending from it. Nothing is written or verified."""
        ledger = cls.__new__(cls)
        ledger._turn, ledger._head_turn = threading.Lock(), threading.Lock()
        path = path.resolve()
        ledger._path, ledger._head_path = path, (head or path.with_suffix(".head")).resolve()
        with ExitStack() as opened:
            try:
                ledger._connect(opened, f"{path.as_uri()}?mode=rw", uri=True)  # rw does not make a file
                ledger.entries()
            except (sqlite3.Error, ValueError, TypeError) as error:
                raise LedgerError(f"{path}: cannot be read as a ledger: {error}") from error
            ledger._opened = opened.pop_all()
        return ledger

    @classmethod
    def copy_of(cls, path: Path, *, authority: str = "") -> Ledger:
        """A copy in memory, to try out what would be charged next. An empty one where there is no ledger yet."""
        ledger = cls(None, authority=authority)
        try:
            if path.exists():
                with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True)) as kept:
                    kept.backup(ledger._db)
        except sqlite3.Error as error:
            ledger.close()
            raise LedgerError(f"{path}: cannot be read as a ledger: {error}") from error
        return ledger

    def _connect(self, opened: ExitStack, name: str, *, uri: bool = False) -> None:
        # One connection for the thread that runs a task and the one that keeps the link, in turns.
        db = sqlite3.connect(name, check_same_thread=False, isolation_level=None, uri=uri)
        self._db = opened.enter_context(closing(db))

    @classmethod
    def in_memory(cls) -> Ledger:
        return cls(None)

    def close(self) -> None:
        with self._turn:
            self._opened.close()

    def entries(self) -> list[Entry]:
        """All of them, oldest first."""
        return [Entry(**json.loads(body)) for (body,) in self._read("SELECT body FROM entries ORDER BY id")]

    def count(self) -> int:
        """How many entries there are."""
        return int(self._read("SELECT COUNT(*) FROM entries")[0][0])

    def head(self) -> Head:
        """How many entries there are, and the last one's hash."""
        last = self._read("SELECT id, hash FROM entries ORDER BY id DESC LIMIT 1")
        return Head(*last[0]) if last else Head(0, "")

    def last_round(self) -> str:
        """When a round of training was last charged, as ISO 8601; "" if never."""
        found = self._read(
            "SELECT json_extract(body, '$.time') FROM entries WHERE json_extract(body, '$.part') = 'train' "
            "AND json_extract(body, '$.mechanism') IN ('gaussian', 'none') ORDER BY id DESC LIMIT 1"
        )
        return str(found[0][0]) if found else ""

    def rounds(self) -> int:
        """How many rounds of training were charged to this authority, whatever its runs and documents were called."""
        found = self._read(
            "SELECT COUNT(*) FROM entries WHERE json_extract(body, '$.part') = 'train' "
            "AND json_extract(body, '$.mechanism') IN ('gaussian', 'none') "
            "AND (? = '' OR COALESCE(json_extract(body, '$.authority'), '') IN ('', ?))",
            self.authority,
            self.authority,
        )
        return int(found[0][0])

    def charge(self, entry: Entry, *, after: int | None = None) -> None:
        """Writes the entry, durably, before it returns. Raises `LedgerError` if what it pays for may not be released.

        Times never go back: an entry made while the clock is behind has the time of the one before. `after` is how many
        entries there were when the account was found to cover this one; if there are others now, nothing is written.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._transaction():
            if after is not None and self._db.execute("SELECT COUNT(*) FROM entries").fetchone()[0] != after:
                raise LedgerError(f"{self._path}: another process writes to it; stop one of them. Nothing is released")
            last = self._db.execute("SELECT body, hash FROM entries ORDER BY id DESC LIMIT 1").fetchone()
            before, previous = (json.loads(last[0])["time"], last[1]) if last else ("", "")
            stamped = {**asdict(entry), "time": max(now, before), "authority": self.authority}
            body = json.dumps(stamped, sort_keys=True)
            self._db.execute("INSERT INTO entries (body, hash) VALUES (?, ?)", (body, _link(previous, body)))
        try:
            self._write_head()
        except OSError as error:
            raise LedgerError(
                f"{self._head_path}: the ledger's head cannot be written, so nothing is released: {error.strerror}"
            ) from error

    def verify(self, known: Head | None = None) -> None:
        """Checks the chain against the head that was kept, and against one that is `known` from elsewhere.

        Raises:
            LedgerError: the chain is broken, or behind; the message says what to do.
        """
        hashes = [""]
        kept = self._kept_head()  # first, since a running client may add entries meanwhile
        for number, (place, body, digest) in enumerate(
            self._read("SELECT id, body, hash FROM entries ORDER BY id"), start=1
        ):
            if place != number or digest != _link(hashes[-1], body):
                raise LedgerError(
                    f"{self._path}: entry {number} does not follow from the one before: it was changed, or an entry "
                    f"is missing. {_WAY_FORWARD}"
                )
            hashes.append(digest)
        if kept is None and self._head_path is not None and len(hashes) > 1:
            raise LedgerError(
                f"{self._head_path}: is missing, so nothing says whether the ledger's {len(hashes) - 1} entries are "
                f"all. {_WAY_FORWARD}"
            )
        for head, source in ((kept, f"{self._head_path}"), (known, "the head you gave")):
            if head is None:
                continue
            if head.entries >= len(hashes):
                raise LedgerError(
                    f"{self._path}: has {len(hashes) - 1} entries, but has had {head.entries}, says {source}: its end "
                    f"was cut off, or it is an old copy. {_WAY_FORWARD}"
                )
            if hashes[head.entries] != head.hash:
                raise LedgerError(
                    f"{self._path}: entry {head.entries} is not the one that {source} knows: the ledger was "
                    f"rewritten, or belongs to another dataset. {_WAY_FORWARD}"
                )

    def _kept_head(self) -> Head | None:
        if self._head_path is None:
            return None
        try:
            return Head.parse(self._head_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise LedgerError(f"{self._head_path}: the ledger's head cannot be read: {error}") from error

    def _write_head(self) -> None:
        if self._head_path is None:
            return
        self._head_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._head_turn:
            files.replace(self._head_path, f"{self.head()}\n".encode())

    def plan(self, run: str) -> dict[str, Any] | None:
        """The plan that was stored for a run."""
        rows = self._read("SELECT body FROM plans WHERE run = ?", run)
        return json.loads(rows[0][0]) if rows else None

    def store_plan(self, run: str, plan: dict[str, Any]) -> None:
        with self._transaction():
            self._db.execute("INSERT INTO plans (run, body) VALUES (?, ?)", (run, json.dumps(plan)))

    def _read(self, query: str, *values: str) -> list[Any]:
        try:
            with self._turn:
                return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise LedgerError(f"{self._path}: the ledger cannot be read: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            with self._turn:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:  # a full disk has rolled back by itself
                        self._db.execute("ROLLBACK")
                    raise
        except sqlite3.Error as error:
            raise LedgerError(f"the ledger cannot be written, so nothing is released: {error}") from error


def _link(previous: str, body: str) -> str:
    return hashlib.sha256(f"{previous}\n{body}".encode()).hexdigest()
