"""Ctrl-C, which a terminal sends to every process of a command."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def without_interrupts() -> Iterator[None]:
    """A process that is started here never hears of Ctrl-C, not even while it imports: a signal that is held back stays
    so. Whoever starts it hears of one that came meanwhile once this ends, and not in the middle."""
    resource_tracker.ensure_running()  # whose own start would let signals through again
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    came: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()  # the only one that handles signals
    # Another thread may be given it all the same.
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number)) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        if came:
            signal.raise_signal(signal.SIGINT)
