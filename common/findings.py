"""What an examination finds, each a line with what to do about it: `cloister doctor`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum

from common.errors import CloisterError, ConfigError


class State(StrEnum):
    """What a finding means for a run."""

    OK = "ok"
    WARNING = "warning"  # it can run, and somebody should look first
    WRONG = "wrong"  # it cannot


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `what` is it in a word or two, `said` what was found, `remedy` what to do."""

    what: str
    state: State
    said: str
    remedy: str = ""

    def describe(self) -> dict[str, str]:
        """As plain values."""
        return asdict(self)


def ok(what: str, said: str) -> Finding:
    return Finding(what, State.OK, said)


def warning(what: str, said: str, remedy: str = "") -> Finding:
    return Finding(what, State.WARNING, said, remedy)


def wrong(what: str, said: str | CloisterError, remedy: str = "") -> Finding:
    return Finding(what, State.WRONG, str(said), remedy)


def mistakes(what: str, error: CloisterError, remedy: str = "") -> list[Finding]:
    """An error as findings: one for each mistake in a document."""
    problems = error.problems if isinstance(error, ConfigError) else (str(error),)
    return [wrong(what, problem, remedy) for problem in problems]


def is_ready(findings: Iterable[Finding]) -> bool:
    """May it begin? Not if anything is wrong."""
    return all(finding.state != State.WRONG for finding in findings)
