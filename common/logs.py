"""Our own log, for people or for programs, and Flower's."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

from common.text import shown_lines


def log_to(handler: logging.Handler) -> None:
    """Sends our log to `handler` alone: libraries put handlers of their own on the root when they are imported."""
    logger = logging.getLogger("cloister")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)


def text_handler() -> logging.Handler:
    """Lines for a person, on stderr. What others said in them cannot move the cursor or change a colour."""
    handler = logging.StreamHandler()
    handler.setFormatter(_ShownFormatter())
    return handler


def json_handler() -> logging.Handler:
    """One JSON object a line, on stderr: time, level, logger, message, and what a record carries besides."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JSONFormatter())
    return handler


def quiet_flower() -> None:
    """Flower logs each step of each round at INFO; our own progress says it better."""
    logging.getLogger("flwr").setLevel(logging.WARNING)


_USUAL = {*vars(logging.makeLogRecord({})), "message", "taskName"}


class _ShownFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown_lines(super().format(record))


class _JSONFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        # Some libraries put marks of their own on every record of the process, as Ray does.
        line |= {k: v for k, v in vars(record).items() if k not in _USUAL and not k.startswith("_")}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
