"""Bytes on the wire beside the bare tensors: a proxy on loopback between real clients and their server counts them."""

from __future__ import annotations

import asyncio
import bisect
import sys
import tempfile
import threading
import time
from pathlib import Path

from simulations.benchmarks.wire_latency import serve, write_files
from simulations.benchmarks.wire_processes import (
    LARGE,
    PEOPLE,
    ROOT,
    SMALL,
    Children,
    certificates,
    events,
    size,
    state,
    table,
    wait_for,
)

ROUNDS = 12
DOWN, UP = "server to client", "client to server"


class CountingProxy:
    """Passes bytes on, and notes when how many went in which direction."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[float, int]]] = {DOWN: [], UP: []}
        self.target = ""
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        opening = asyncio.start_server(self._connected, "127.0.0.1", 0)
        server = asyncio.run_coroutine_threadsafe(opening, self._loop).result()
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(self._pass(reader, far_writer, UP), self._pass(far_reader, writer, DOWN))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        try:
            while data := await reader.read(1 << 16):
                self.seen[way].append((time.time(), len(data)))
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    def between(self, way: str, start: float, end: float) -> int:
        seen = self.seen[way]
        first, last = (bisect.bisect(seen, (t, 0)) for t in (start, end))
        return sum(count for _, count in seen[first:last])


def main() -> None:
    rows: list[tuple[str, ...]] = []
    for widths, rounds, steps in ((SMALL, 60, 7), (LARGE, ROUNDS, 1)):
        bare = size(state(widths))
        for way, counted in _measure(widths, rounds, steps).items():
            per_cent = 100 * (counted / bare - 1)
            name = f"{'-'.join(map(str, widths))}, {way}"
            rows.append((name, f"{bare:,}", f"{counted:,.0f}", f"{counted - bare:,.0f}", f"{per_cent:+.2f} %"))
    head = ("TLS, without TCP and IP headers", "tensors", "on the wire", "more", "per cent")
    table("Bytes a round and client, mean", head, rows)


def _measure(widths: tuple[int, ...], rounds: int, steps: int) -> dict[str, float]:
    """Mean bytes a round and client, the first two rounds left out."""
    proxy = CountingProxy()
    with tempfile.TemporaryDirectory() as name, Children() as children:
        folder = Path(name)
        certificates(folder, PEOPLE)
        training = {"rounds": rounds, "local_epochs": None, "local_steps": steps}
        server, proxy.target = serve(children, folder, write_files(folder, widths, server=proxy.address, **training))
        for person in PEOPLE:
            command = (sys.executable, "-m", "cloister", "join", f"{person}.yaml")
            children.start(*command, cwd=folder, PYTHONPATH=ROOT)
        run = folder / "run"
        wait_for(lambda: next((e for e in events(run) if e["event"] == "end"), None), server, seconds=120)
        ends = [e["time"] for e in events(run) if e["event"] == "round"][1:]
        return {way: proxy.between(way, ends[0], ends[-1]) / (len(ends) - 1) / len(PEOPLE) for way in (DOWN, UP)}


if __name__ == "__main__":
    main()
