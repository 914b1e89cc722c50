"""One server under many light clients: its memory, and the time of a round."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

from simulations.benchmarks.wire_processes import (
    LARGE,
    MIDDLE,
    Children,
    Role,
    certificates,
    cpu_seconds,
    forget_highest,
    megabytes,
    size,
    state,
    table,
)

ROUNDS = 7
CONNECT_S = 120.0
CROWDS = 2  # processes of clients
# Sessions, and the rounds that are held once they idle: so many clients, and a model.
STEPS: list[tuple[int, list[tuple[int, tuple[int, ...]]]]] = [
    (1000, [(1000, MIDDLE), (100, MIDDLE), (100, LARGE)]),
    (5000, [(5000, MIDDLE)]),
]


def main() -> None:
    memory: list[tuple[str, ...]] = []
    rounds: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        certs = certificates(Path(folder), [f"c{i}" for i in range(max(clients for clients, _ in STEPS))])
        for clients, held in STEPS:
            with Children() as children:
                server = children.role("wire_server", certs)
                told = server.greeting["port"], certs, server.greeting["fingerprint"]
                crowds = [children.role("wire_clients", *told) for _ in range(CROWDS)]
                memory.append(_connect(server, crowds, clients))
                rounds += [_rounds(server, crowds, *which) for which in held]
    head: tuple[str, ...] = ("", "no session", "idle", "a session", "connected", "within", "server CPU")
    table("Memory of the server process (VmRSS)", head, memory)
    head = ("", "median", "slowest", "first", "with the mean", "server CPU", "clients' CPU", "VmHWM", "answered")
    table(f"A round, {ROUNDS} in a row after a first; then as many with admission and the mean", head, rounds)


def _connect(server: Role, crowds: list[Role], clients: int) -> tuple[str, ...]:
    bare, cpu = megabytes(server.pid), cpu_seconds(server.pid)
    share = clients // len(crowds)
    for i, crowd in enumerate(crowds):
        crowd.tell(first=i * share, count=share, seconds=CONNECT_S)
    seconds = max(crowd.answer()["seconds"] for crowd in crowds)
    ready = server.ask(do="wait", ready=clients, seconds=30.0)["ready"]
    idle = megabytes(server.pid)
    return (
        f"{clients:,} sessions",
        f"{bare:.0f} MB",
        f"{idle:.0f} MB",
        f"{1e3 * (idle - bare) / clients:.0f} kB",
        f"{ready:,}",
        f"{seconds:.1f} s",
        f"{cpu_seconds(server.pid) - cpu:.1f} s",
    )


def _rounds(server: Role, crowds: list[Role], clients: int, widths: tuple[int, ...]) -> tuple[str, ...]:
    kilobytes = size(state(widths)) / 1e3
    which = {"do": "round", "clients": clients, "widths": widths}
    first = server.ask(**which, mean=False)
    forget_highest(server.pid)
    cpu = sum(cpu_seconds(crowd.pid) for crowd in crowds)
    told = [server.ask(**which, mean=False) for _ in range(ROUNDS)]
    theirs = (sum(cpu_seconds(crowd.pid) for crowd in crowds) - cpu) / ROUNDS
    whole = [server.ask(**which, mean=True) for _ in range(ROUNDS)]
    seconds = [t["seconds"] for t in told]
    return (
        f"{clients:,} clients x {kilobytes:.0f} kB",
        f"{median(seconds):.3f} s",
        f"{max(seconds):.3f} s",
        f"{first['seconds']:.3f} s",
        f"{median(t['seconds'] for t in whole):.3f} s",
        f"{median(t['cpu'] for t in told):.3f} s",
        f"{theirs:.3f} s",
        f"{megabytes(server.pid, 'VmHWM'):.0f} MB",
        f"{min(t['answered'] for t in told + whole):,}",
    )


if __name__ == "__main__":
    main()
