"""Our own log, and Flower's."""

from __future__ import annotations

import logging


def log_to(handler: logging.Handler) -> None:
    """Sends our log to `handler` alone: libraries put handlers of their own on the root when they are imported."""
    logger = logging.getLogger("cloister")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)


def quiet_flower() -> None:
    """Flower logs each step of each round at INFO; our own progress says it better."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
