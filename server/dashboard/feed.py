"""From a run's events to what open pages are sent: server-sent events (WHATWG HTML, section 9.2).

The run's thread only appends to a deque. Twice a second the dashboard's own loop takes what has arrived, and encodes it
once for all pages. A page that has all but the newest is sent what is new; any other, such as a new one or one that
reads slowly, the whole state as it is now. So no page has more than one frame waiting.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from server.dashboard.view import Clients, View
from server.rounds.events import Event

EVERY_S = 0.5  # between frames, at least
LOOK_S = 1.0  # between looks at who is there, while someone watches
GLANCE_S = 5.0  # ... while nobody does
KEEP_ALIVE_S = 15.0
RETRY_MS = 1_000  # until a page that lost its connection asks again

log = logging.getLogger("cloister.server")


class Feed:
    """Give it every event of a run, from any thread. All else is called on the dashboard's loop."""

    def __init__(self, view: View, *, keep_alive_s: float = KEEP_ALIVE_S) -> None:
        self._view, self._keep_alive_s = view, keep_alive_s
        self._arrived: deque[tuple[float, Event]] = deque()
        self._version = 0
        self._whole: bytes | None = None  # of this version, once a page needs it
        self._news: bytes | None = None  # what this version adds to the one before
        self._changed = asyncio.Event()
        self._closed = False
        self._looked = 0.0
        self.pages = 0

    def __call__(self, event: Event) -> None:
        self._arrived.append((time.monotonic(), event))

    async def run(self, clients: Callable[[], Awaitable[Clients]]) -> None:
        """Follows the run until it is cancelled. `clients` tells who is there."""
        while not self._closed:
            started = time.monotonic()
            if started - self._looked >= (LOOK_S if self.pages else GLANCE_S):
                self._looked = started
                try:
                    self._view.look(await clients(), time.time())
                except TimeoutError:
                    log.debug("the dashboard was not told who is there")
            self.publish()
            await asyncio.sleep(EVERY_S)

    def publish(self) -> None:
        """Takes the events that have arrived, and offers pages what is new."""
        while self._arrived:
            at, event = self._arrived.popleft()
            self._view.take(event, at)
        news = self._view.news()
        if not news:
            return
        self._version += 1
        self._whole, self._news = None, _frame("news", news) if self.pages else None
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def close(self) -> None:
        """Offers the last news, after which pages are sent no more."""
        self._closed = True
        self.publish()
        self._changed.set()

    @contextmanager
    def page(self) -> Iterator[None]:
        """While a page is open."""
        self.pages += 1
        try:
            yield
        finally:
            self.pages -= 1

    async def frames(self) -> AsyncIterator[bytes]:
        """What one page is sent, from its first word to the end of the dashboard."""
        yield b"retry: %d\n" % RETRY_MS + _frame("now", time.time())
        seen = -1
        while True:
            if self._version > seen:
                frame = self._next(seen)
                seen = self._version
                yield frame
            elif self._closed:
                return
            elif not await self._has_changed():
                # A comment for whatever is between, and the time for the page, which cannot see comments.
                yield b": still here\n" + _frame("now", time.time())

    def _next(self, seen: int) -> bytes:
        if seen == self._version - 1 and self._news is not None:
            return self._news
        if self._whole is None:
            self._whole = _frame("whole", self._view.whole())
        return self._whole

    async def _has_changed(self) -> bool:
        try:
            async with asyncio.timeout(self._keep_alive_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True


def _frame(kind: str, value: Any) -> bytes:
    """One event. JSON in ASCII has no line ends of its own."""
    return f"event: {kind}\ndata: {json.dumps(value, separators=(',', ':'), allow_nan=False)}\n\n".encode()
