"""Text from the other side, made fit to be shown and logged."""

from __future__ import annotations

import re

LONGEST = 300  # characters
# Of a client, a dataset or a federation: it names files and accounts.
PLAIN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
# Names that the other side gives: of a run, a client, a task. They are shown, logged and kept.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,255}")


def is_name(text: str) -> bool:
    """Is it a name that another side may give?"""
    return NAME.fullmatch(text) is not None


def shown_lines(text: str, limit: int = 4000) -> str:
    """`shown`, for text of several lines: each is made fit by itself."""
    return "\n".join(shown(line, limit) for line in text.split("\n"))


def shown(text: str, limit: int = LONGEST) -> str:
    """`text` on one line, without anything that a terminal or a log would take for its own, and not too long."""
    line = "".join(c if c.isprintable() else " " for c in text[: limit + 1])
    return line if len(line) <= limit else f"{line[:limit]}..."


def duration(seconds: float) -> str:
    """A time for a person: 3.2 s, 4 min 10 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def in_bytes(number: float) -> str:
    """So many bytes for a person: 42.6 kB, 1.3 GB."""
    for factor, prefix in ((1e9, "G"), (1e6, "M")):
        if number >= factor:
            return f"{number / factor:,.1f} {prefix}B"
    return f"{number / 1000:,.1f} kB"
