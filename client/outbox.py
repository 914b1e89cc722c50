"""Finished replies that the server has not acknowledged, so that a reply that must be sent again is the same bytes and
costs nothing.

One file a reply, in a folder for its federation and run: another that asks for the same task finds none. Written
without waiting for the disk: a power cut may lose a reply, which then costs a charge of its own, and a torn one is
known by its hash. No charge rests on these files.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from common import files
from common.errors import LedgerError

_DIGEST = 32  # bytes: of the question and of the payload, before it


class Outbox:
    """The replies of one run. What other runs left in the folder is deleted: no server of theirs is served now."""

    def __init__(self, folder: Path, *, run: str) -> None:
        """Raises `LedgerError` if the folder cannot be used."""
        self._place = folder / _name(run)
        try:
            for other in folder.iterdir() if folder.exists() else ():
                if other != self._place:
                    shutil.rmtree(other)
            self._place.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise LedgerError(f"{folder}: unsent replies cannot be kept: {error.strerror}") from error

    def keep(self, task: str, question: bytes, payload: bytes) -> None:
        """Stores a reply to what was asked. Raises `LedgerError` if there is no room."""
        path = self._place / _name(task)
        try:
            files.replace(path, _digest(question) + _digest(payload) + payload, durable=False)
        except OSError as error:
            raise LedgerError(f"{path}: a reply cannot be kept, so it is not sent: {error.strerror}") from error

    def find(self, task: str, question: bytes) -> bytes | None:
        """A finished reply that was not acknowledged, if the same was asked: a server that went back to an earlier
        round may ask another model under the same name."""
        try:
            data = (self._place / _name(task)).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LedgerError(f"{self._place}: an unsent reply cannot be read: {error.strerror}") from error
        payload = data[2 * _DIGEST :]
        return payload if data[: 2 * _DIGEST] == _digest(question) + _digest(payload) else None

    def drop(self, task: str) -> None:
        """The server has the reply; it need not be kept."""
        (self._place / _name(task)).unlink(missing_ok=True)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
