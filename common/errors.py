"""Every error a user can cause or meet, as one tree.

    CloisterError                one clear line on the command line, exit code 2
    ├── ConfigError              a document has mistakes; carries all of them
    ├── DataError                a table does not fit its schema, or cannot be read
    ├── PrivacyError             a privacy parameter that cannot be accounted for
    ├── Refusal                  the data owner's side says no, with a reason
    │   └── BudgetExhausted      ... because the privacy budget would be exceeded
    ├── LedgerError              the privacy ledger cannot be trusted or written
    ├── DeviceError              the device that was asked for is not there
    ├── OutOfMemory              a model is too large for the memory of this machine
    ├── WorkerLost               a process that trained simulated clients has ended
    ├── CertificateError         missing, unreadable, expired or foreign TLS material
    ├── ConnectionFailed         a peer that is not there, or a link that broke
    ├── ProtocolError            a peer said something the session protocol does not allow
    ├── RunFolderError           a run folder that exists already, or is incomplete
    ├── ModelError               a file that is no model of ours, or a damaged one
    ├── OutputError              a file that is there already, or cannot be written
    └── RunFailed                a run that started and could not go on; exit code 1

Only these become one line; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class CloisterError(Exception):
    """Base of all errors that are part of the interface."""

    exit_code = 2


class ConfigError(CloisterError):
    """A document has mistakes. `problems` holds one line for each, in the order of the file."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class DataError(CloisterError):
    """A table cannot be read, or does not fit its schema. The message may quote cells: show it to the owner only."""


class PrivacyError(CloisterError):
    """A privacy parameter that cannot be accounted for."""


class Refusal(CloisterError):
    """The data owner's side says no. `public` is what the other side hears: it never depends on rows, nor on what other
    federations have spent. The error's own text is the owner's."""

    def __init__(self, message: str, *, public: str | None = None) -> None:
        super().__init__(message)
        self.public = message if public is None else public


class BudgetExhausted(Refusal):
    """The next release would exceed the budget."""


class LedgerError(CloisterError):
    """The privacy ledger cannot be trusted or written."""


class DeviceError(CloisterError):
    """The device that was asked for is not there."""


class OutOfMemory(CloisterError):
    """A model is too large for the memory of this machine. `public` is what the other side may hear, if anything: how
    much a private step takes depends on how many rows it draws."""

    def __init__(self, message: str, *, public: str | None = None) -> None:
        super().__init__(message)
        self.public = public


class WorkerLost(CloisterError):
    """A process that trained simulated clients has ended."""


class CertificateError(CloisterError):
    """Missing, unreadable, expired or foreign TLS material."""


class ConnectionFailed(CloisterError):
    """A peer that is not there, or a link that broke."""


class ProtocolError(CloisterError):
    """A peer said something the session protocol does not allow."""


class RunFolderError(CloisterError):
    """A run folder that exists already, or is incomplete."""


class ModelError(CloisterError):
    """A file that is no model of ours, or a damaged one."""


class OutputError(CloisterError):
    """A file that is to be written is there already, or cannot be written."""


class RunFailed(CloisterError):
    """A run that started and could not go on. `folder` is what it has left, if anything."""

    exit_code = 1
    folder: Path | None = None
