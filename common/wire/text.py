"""Text from the other side, made fit to be shown and logged."""

from __future__ import annotations

LONGEST = 300  # characters


def shown(text: str, limit: int = LONGEST) -> str:
    """`text` on one line, without anything that a terminal or a log would take for its own, and not too long."""
    line = "".join(c if c.isprintable() else " " for c in text[: limit + 1])
    return line if len(line) <= limit else f"{line[:limit]}..."
