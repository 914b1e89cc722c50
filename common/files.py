"""A file in place of another, whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from common.errors import OutputError

MODE = 0o666  # less what the process' umask takes away
OWN = 0o600  # of what nobody else is to read

POSIX = os.name == "posix"
READ_ELSEWHERE_S = 2.0  # for whoever reads a file that is to be replaced, where that stands in the way


def replace(path: Path, data: bytes, *, durable: bool = True, mode: int = MODE) -> None:
    """Replaces a file by one that holds `data`. As `replacing`."""
    with replacing(path, durable=durable, mode=mode) as file:
        file.write(data)


def write_out(path: Path, data: bytes, *, mode: int = MODE) -> None:
    """Replaces a file that somebody asked for. As `replacing`. Raises `OutputError`."""
    try:
        replace(path, data, mode=mode)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


@contextmanager
def replacing(path: Path, *, durable: bool = True, exclusive: bool = False, mode: int = MODE) -> Iterator[BinaryIO]:
    """A new file, to be written, that takes the place of the one at `path` when the context ends well: whoever reads
    finds the old one or the new one, never a part. After an error the old one stays, and nothing is left over.

    Args:
        durable: once the context has ended, also after a power cut: file and folder are synced.
        exclusive: one writer at a time; the draft, `path` with .new behind, is what tells the others.

    Raises:
        FileExistsError: it is `exclusive`, and the draft is there.
        OSError: it cannot be written.
    """
    draft = path.with_name(f"{path.name}.new")
    flags = os.O_WRONLY | os.O_CREAT | (os.O_EXCL if exclusive else os.O_TRUNC)
    opened = os.open(draft, flags, mode)
    try:
        with os.fdopen(opened, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        _take_place(draft, path)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)  # a part of it would take up what room there is
        raise
    if durable:
        _sync(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time, as long as the context lasts, also if it is killed: the system ends its lock. Where the
    system has no locks for files, the file itself is one, and names its process.

    Raises:
        BlockingIOError: another process has it, or this one has it already.
        OSError: the file cannot be made.
    """
    lock = FileLock(path, blocking=False, thread_local=False)  # a ledger is closed by another thread than opened it
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(f"{path}: another process has this lock") from error
    try:
        yield
    finally:
        lock.release()


def _take_place(draft: Path, path: Path) -> None:
    """Renames a draft. Windows lets nobody replace a file while another process has it open, so there it is tried again
    for a while."""
    began = time.monotonic()
    while True:
        try:
            draft.replace(path)
            return
        except PermissionError:
            if POSIX or time.monotonic() - began > READ_ELSEWHERE_S:
                raise
            time.sleep(0.02)


def _sync(folder: Path) -> None:
    """Makes a rename outlast a power cut."""
    if POSIX:  # elsewhere a folder cannot be opened
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
