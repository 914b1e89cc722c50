"""What a hundred open pages cost a round: one run of a server and two clients, with pages and without in turn.

The run is real: `cloister serve --dashboard` and two `cloister join`, over TLS on loopback; a process beside them holds
the pages' connections and reads what they are sent, as fast as it comes. Turns of some seconds alternate; each begins
half a second after its pages were opened. A round is the time between two of its events. The machine's other work
is in both kinds of turn alike if they are short and many. On a busy one look at the CPU of the dashboard's thread,
which is less disturbed: a round waits for that thread (for Python's lock) hardly longer than it works. The readers
share the machine's cores with the run, which pages elsewhere would not.

    OMP_NUM_THREADS=1 python -m simulations.benchmarks.dashboard [--pages 100] [--turns 20] [--seconds 3] [--clean]

`--clean` compares a server without a dashboard with one that has it and no page, two runs in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from simulations.benchmarks.wire_latency import write_files
from simulations.benchmarks.wire_processes import (
    PEOPLE,
    ROOT,
    SMALL,
    Children,
    certificates,
    events,
    say,
    table,
    wait_for,
)

ROUNDS = 1_000_000  # more than there is time for
SETTLE_S = 0.5
WARM_UP_S = 4.0
Turn = tuple[float, float]  # from, to; seconds since 1970


class Running:
    """A run that goes on until its children end."""

    def __init__(self, children: Children, folder: Path, *, dashboard: bool) -> None:
        certificates(folder, PEOPLE)
        write_files(folder, SMALL, server="127.0.0.1:1", rounds=ROUNDS)
        command = ["serve", "federation.yaml", "--address", "127.0.0.1:0", "--certificates", "certs", "--out", "run"]
        command += ["--dashboard", "127.0.0.1:0"] if dashboard else []
        self.run = folder / "run"
        self.server = children.start(sys.executable, "-m", "cloister", *command, cwd=folder, PYTHONPATH=ROOT)
        serving = wait_for(lambda: next((e for e in events(self.run) if e["event"] == "serving"), None), self.server)
        write_files(folder, SMALL, server=str(serving["address"]), rounds=ROUNDS)
        for person in PEOPLE:
            children.start(sys.executable, "-m", "cloister", "join", f"{person}.yaml", cwd=folder, PYTHONPATH=ROOT)
        wait_for(lambda: any(e["event"] == "round" for e in events(self.run)) or None, self.server)
        time.sleep(WARM_UP_S)
        logs = "".join(path.read_text() for path in (folder / "logs").iterdir())
        self.port = int(logs.partition("dashboard on http://127.0.0.1:")[2].partition("/")[0]) if dashboard else 0

    def rounds(self, turns: list[Turn]) -> list[list[float]]:
        """Seconds of the rounds that lie in each turn, from one's end to the next one's."""
        ends = [float(e["time"]) for e in events(self.run) if e["event"] == "round"]
        return [[b - a for a, b in pairwise(ends) if start <= a and b <= end] for start, end in turns]


def threads(pid: int) -> dict[str, int]:
    """Nanoseconds of CPU that each thread of a process has used."""
    return {task.name: int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()}


def turn(seconds: float) -> Turn:
    start = time.time()
    time.sleep(seconds)
    return start, time.time()


def compare_pages(pages: int, turns: int, seconds: float) -> None:
    """Rounds without pages and with them, in one run."""
    with tempfile.TemporaryDirectory() as name, Children() as children:
        running = Running(children, Path(name), dashboard=True)
        readers = children.role("dashboard", "read", running.port)
        spans: dict[int, list[Turn]] = {0: [], pages: []}
        busy: dict[int, Counter[str]] = {0: Counter(), pages: Counter()}
        received = 0
        for number in range(2 * turns):
            open_now = (0, pages)[(number + number // 2) % 2]  # 0 P P 0 0 P P 0: a drift is in both alike
            readers.ask(pages=open_now)
            time.sleep(SETTLE_S)
            before = threads(running.server.pid)
            spans[open_now].append(turn(seconds))
            busy[open_now].update({of: used - before.get(of, 0) for of, used in threads(running.server.pid).items()})
            received += int(readers.ask()["received"])
        found = {count: running.rounds(of) for count, of in spans.items()}
    # Threads have no names to the system: the dashboard's is the one to which pages matter most.
    ours = max(busy[pages], key=lambda thread: busy[pages][thread] - busy[0][thread])
    each = {count: busy[count][ours] / 1e6 / turns / seconds for count in found}
    rows = [(*_row(f"{count} pages", of), f"{each[count]:.1f} ms a second") for count, of in found.items()]
    table(f"A round of two clients, MLP 10-50-2, and {pages} open pages", (*HEAD, "dashboard's CPU"), rows)
    ratios = quantiles([median(b) / median(a) for a, b in zip(found[0], found[pages], strict=True)], n=4)
    print(f"\n  Ratio of medians {_median(found[pages]) / _median(found[0]):.3f}; of neighbouring turns, the quartiles")
    print(f"  {_all(ratios)}; of rounds in the same time {_count(found[0]) / _count(found[pages]):.3f}.")
    print(f"  Each page was sent {received / pages / turns / seconds / 1e3:.1f} kB a second.")


def compare_servers(turns: int, seconds: float) -> None:
    """Rounds of a server without a dashboard, and of one with it that nobody looks at."""
    found: dict[bool, list[list[float]]] = {False: [], True: []}
    for number in range(2 * turns):
        has = bool((number + number // 2) % 2)
        with tempfile.TemporaryDirectory() as name, Children() as children:
            running = Running(children, Path(name), dashboard=has)
            found[has] += running.rounds([turn(seconds)])
    rows = [_row("with --dashboard" if has else "without", found[has]) for has in (False, True)]
    table("A round of two clients, MLP 10-50-2, nobody looking", HEAD, rows)
    print(f"\n  Ratio of medians {_median(found[True]) / _median(found[False]):.3f}.")


HEAD = ("", "turns", "rounds", "median", "quartiles of the turns' medians")


def _row(name: str, turns: list[list[float]]) -> tuple[str, ...]:
    parts = _all([1e3 * part for part in quantiles([median(one) for one in turns], n=4)], ".1f")
    return name, str(len(turns)), str(_count(turns)), f"{1e3 * _median(turns):.2f} ms", parts


def _count(turns: list[list[float]]) -> int:
    return sum(map(len, turns))


def _median(turns: list[list[float]]) -> float:
    return median(seconds for one in turns for seconds in one)


def _all(values: list[float], form: str = ".3f") -> str:
    return " ".join(format(value, form) for value in values)


# The process with the pages


async def read(port: int) -> None:
    """Opens as many pages as it is told to, one JSON object a line; answers how much they were sent since."""
    pages: list[asyncio.Task[None]] = []
    received = 0

    async def page() -> None:
        nonlocal received
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n")
            while data := await reader.read(1 << 16):
                received += len(data)
        finally:
            writer.close()

    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    say(ready=True)
    while line := await lines.readline():
        told: dict[str, Any] = json.loads(line)
        if "pages" in told:
            for one in pages:
                one.cancel()
            await asyncio.gather(*pages, return_exceptions=True)
            pages, received = [asyncio.create_task(page()) for _ in range(told["pages"])], 0
        if any(one.done() for one in pages):
            raise RuntimeError("the server has closed a page")
        say(received=received)


def main() -> None:
    if sys.argv[1:2] == ["read"]:
        return asyncio.run(read(int(sys.argv[2])))
    parser = argparse.ArgumentParser()
    parser.add_argument("--pages", type=int, default=100)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--clean", action="store_true")
    told = parser.parse_args()
    if told.clean:
        compare_servers(told.turns, told.seconds)
    else:
        compare_pages(told.pages, told.turns, told.seconds)


if __name__ == "__main__":
    main()
