"""Faults within a process that a test starts with this folder on its PYTHONPATH. The environment says which:

FAULT_AT_CHECKPOINT  WHEN:NUMBER: dies as by kill -9 while it saves its checkpoint NUMBER. WHEN is `torn` (a part of
                     it is written), `before` (it has not got its name yet) or `after` (it has, and nobody knows)
FAULT_CLOCK          a file with the seconds by which Python's clocks of the day are off, read at each look
WITHOUT_POSIX        Python without what it has on POSIX systems only, as on Windows
"""

from __future__ import annotations

import asyncio
import datetime
import os
import pathlib
import signal
import sys
import time
from typing import Any


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at_checkpoint(when: str, number: int) -> None:
    replace = pathlib.Path.replace

    def replaced(self: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        path = pathlib.Path(target)
        wanted = path.parent.name == "checkpoint" and int(path.name.partition("-")[0]) == number
        if wanted and when == "torn":
            os.truncate(self, self.stat().st_size // 2)
        if wanted and when != "after":
            _die()
        result = replace(self, target)
        if wanted:
            _die()
        return result

    pathlib.Path.replace = replaced  # type: ignore[method-assign]


def _shift_the_clock(file: pathlib.Path) -> None:
    real, day = time.time, datetime.datetime

    def shifted() -> float:
        try:
            return real() + float(file.read_text())
        except (OSError, ValueError):
            return real()

    class Shifted(day):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return day.fromtimestamp(shifted(), tz)

    time.time = shifted
    datetime.datetime = Shifted  # type: ignore[misc]


# What a client's own code and the libraries that it loads could want. The C library's own names stay: it is POSIX.
ONLY_POSIX = ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty")


def _forget_posix() -> None:
    sys.modules.update(dict.fromkeys(ONLY_POSIX))  # type: ignore[arg-type]  # None: an import of it fails
    for name in ("getuid", "geteuid", "getgid", "fork", "mkfifo", "chown", "fchmod", "getpgid", "setsid"):
        delattr(os, name)

    def none(*_: object) -> None:
        raise NotImplementedError

    for name in ("add_signal_handler", "remove_signal_handler", "add_reader"):
        setattr(asyncio.SelectorEventLoop, name, none)


if fault := os.environ.get("FAULT_AT_CHECKPOINT"):
    _when, _, _number = fault.partition(":")
    _die_at_checkpoint(_when, int(_number))
if clock := os.environ.get("FAULT_CLOCK"):
    _shift_the_clock(pathlib.Path(clock))
if os.environ.get("WITHOUT_POSIX"):
    _forget_posix()
