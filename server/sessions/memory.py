"""Room in memory for replies on their way. A reply for which there is no room waits."""

from __future__ import annotations

import asyncio
from collections import deque


class Room:
    """So many bytes. First come, first served; everything is called on one asyncio loop."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, wanted: int) -> int:
        """Waits for room, and returns how much was taken: what is larger than all of it takes all of it."""
        wanted = min(wanted, self._size)
        if not self._waiting and wanted <= self._free:
            self._free -= wanted
            return wanted
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((wanted, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was given room in the moment it was cancelled
                self._free += wanted
            self._admit()
            raise
        return wanted

    def give_back(self, taken: int) -> None:
        """Frees what `take` returned."""
        self._free += taken
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            wanted, turn = self._waiting[0]
            if not turn.done():  # else it has stopped waiting
                if wanted > self._free:
                    return
                self._free -= wanted
                turn.set_result(None)
            self._waiting.popleft()
