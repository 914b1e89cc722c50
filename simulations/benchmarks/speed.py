"""`make bench`: how fast simulations are, beside Flower's own on Ray, a plain loop and Opacus, in turn, in one run.

python -m simulations.benchmarks.speed [--turns 2] [--seconds 25] [--only W2,W3b] [--out docs]

Writes performance.md and performance.svg to `--out`. Each engine works in a process of its own, with one torch thread a
process; the workloads are those of speed_workloads.py. Medians are over the rounds of all turns; of ours over the last
half of each turn's, when worker processes are at work. Memory is the proportional set size of an engine's processes
together, looked at every two seconds: looking holds them up.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from client.training.kernel import ExactMLP, Room
from simulations.benchmarks.speed_workloads import CLIENTS, WORKLOADS, Workload, write_tables
from simulations.noise import SimulationNoise

VECTOR, FLOWER = "vector", "flower"
NAMES = {
    "vector": "**Cloister, vector**, a process a core",
    "vector, one process": "Cloister, vector, one process",
    "inline": "Cloister, inline, one process",
    "loop": "a plain PyTorch loop, one process",
    "opacus hooks": "Opacus with hooks, in a loop, one process",
    "opacus ghost": "Opacus with ghost clipping, in a loop, one process",
    "flower": "Flower's simulation on Ray, all cores",
}
SHOWN = ("W1", "W2", "W3a", "W3b")
GOALS = {"W1": (4, 5), "W2": (80, 200), "W3a": (5, 8), "W3b": (40, 100)}  # times Flower: what must be, what is aimed at
FLOWER_ROUNDS = {"W1": 8, "W2": 12, "W3a": 7, "W3b": 12}
COHORTS = (10, 30, 100, 300, 1000)
TOTALS = (100, 1000, 10_000, 100_000)
LOOK_S = 2.0


@dataclass
class Found:
    """What one engine did on one workload, in all turns."""

    rates: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    peak: float = 0.0  # MiB

    @property
    def rate(self) -> float:
        return median(self.rates)


def engines_for(work: Workload) -> list[str]:
    loops = ["opacus hooks", "opacus ghost"] if work.private else ["loop"]
    return ["vector", "flower", "vector, one process", "inline", *loops]


def measure(engine: str, work: Workload, folder: Path, seconds: float, found: Found, *more: str) -> None:
    """One process of an engine."""
    module = "speed_flower" if engine == FLOWER else "speed_engines"
    arguments = [engine, work.name, str(folder), str(seconds), *more]
    if engine == FLOWER:
        arguments = [work.name, str(FLOWER_ROUNDS[work.name]), str(folder)]
    command = [sys.executable, "-m", f"simulations.benchmarks.{module}", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=log)
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LOOK_S)
            found.peak = max(found.peak, memory_of(process.pid))
        for file in (out, log):
            file.seek(0)
        if process.returncode:
            raise RuntimeError(f"{engine} on {work.name} failed:\n{log.read()[-3000:]}")
        told = json.loads(out.read().splitlines()[-1])
    rates = told["rates"]
    found.rates += rates[len(rates) // 2 :] if engine.startswith(VECTOR) else rates
    if told["first"] is not None:
        found.firsts.append(told["first"])


def memory_of(pid: int) -> float:
    """MiB of a process and all that it started; what they share is counted once."""
    total = 0.0
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) / 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(memory_of(int(child)) for child in (task / "children").read_text().split())
    return total


def compare(works: Sequence[Workload], folder: Path, turns: int, seconds: float) -> dict[str, dict[str, Found]]:
    found = {work.name: {engine: Found() for engine in engines_for(work)} for work in works}
    for turn in range(turns):
        for work in works:
            for engine in engines_for(work) if turn == 0 else [VECTOR, FLOWER]:
                here = found[work.name][engine]
                measure(engine, work, folder, seconds if engine == VECTOR else seconds / 2, here)
                say(f"turn {turn + 1}, {work.name}, {engine}: {here.rate:,.1f} client updates a second")
    return found


def growth(folder: Path, seconds: float) -> dict[str, list[tuple[int, float]]]:
    """Milliseconds of a round of W2, one process, by the cohort's size and by how many clients there are."""
    lines: dict[str, list[tuple[int, float]]] = {"cohort": [], "clients": []}
    for kind, sizes in (("cohort", COHORTS), ("clients", TOTALS)):
        for size in sizes:
            found, cohort = Found(), size if kind == "cohort" else 100
            clients = size if kind == "clients" else CLIENTS
            more = ["--cohort", str(cohort), "--clients", str(clients)]
            measure("vector, one process", WORKLOADS["W2"], folder, seconds, found, *more)
            lines[kind].append((size, 1e3 * cohort / found.rate))
            say(f"{kind} {size}: {lines[kind][-1][1]:.1f} ms a round")
    return lines


def parts_of(work: Workload) -> dict[str, float]:
    """Milliseconds of a client's round: its noise, and its clipped sums in exact arithmetic, at the chunk of 10 or 100
    that suits the model."""
    chunk = 10 if work.sizes[0] > 100 else 100
    count = sum((a + 1) * b for a, b in pairwise(work.sizes))
    source, numbers = SimulationNoise(0), torch.empty(chunk, count)
    layers = [(torch.randn(chunk, b, a) / a**0.5, torch.zeros(chunk, b)) for a, b in pairwise(work.sizes)]
    x = torch.randn(chunk, work.batch, work.sizes[0])
    y = torch.randint(0, work.sizes[-1], (chunk, work.batch))
    onto = [torch.zeros(chunk, w.shape[1], w.shape[2] + 1, dtype=torch.float64) for w, _ in layers]
    room = Room()

    def noise() -> None:
        for row in numbers:
            source.fill_with_normals(row, 1e9)

    def sums() -> None:
        ExactMLP(layers, activation="relu", loss="cross_entropy", room=room).add_clipped_sum(onto, x, y, clip=1.0)

    found = {}
    for name, run in (("noise", noise), ("clipped sums", sums)):
        times = []
        for _ in range(15):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        found[name] = 1e3 * median(times) / chunk * work.steps
    return found


def say(text: str) -> None:
    print(text, flush=True)


# The page


def page(found: dict[str, dict[str, Found]], grown: dict[str, list[tuple[int, float]]], folder: Path) -> Iterator[str]:
    cores = len(os.sched_getaffinity(0))
    yield "# Performance"
    yield ""
    yield "Written by `make bench`; nothing here is edited by hand."
    yield ""
    yield (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {processor()}, {cores} cores, {memory():.0f} GiB; Python "
        f"{platform.python_version()}, torch {torch.__version__}, flwr {version('flwr')}, ray {version('ray')}, opacus "
        f"{version('opacus')}. Not measured on a GPU."
    )
    yield ""
    yield (
        "Client updates a second, medians over at least five rounds; all in one run, in turn, on a machine that may "
        "have had other work. One torch thread a process."
    )
    yield ""
    yield "| workload | model | a client | a round |"
    yield "|---|---|---|---|"
    for name in found:
        work = WORKLOADS[name]
        batches = "expected batches" if work.private else "batches"
        trained = ", DP-SGD in exact arithmetic" if work.private else ""
        yield (
            f"| {name} | MLP {'-'.join(map(str, work.sizes))}, {work.optimizer}{trained} | {work.rows} rows, {batches} "
            f"of {work.batch}, one epoch | {work.cohort} of {CLIENTS} clients |"
        )
    yield ""
    yield from _rates(found)
    yield ""
    yield from _firsts(found)
    yield ""
    yield from _privacy(folder)
    if grown:
        yield ""
        yield from _growth(grown)
    yield ""
    yield "## What this does not say"
    yield ""
    yield "- Loops and Opacus stand without messages, aggregation and accounting, which ours and Flower's have."
    yield (
        "- Our private rows are in exact arithmetic (whole numbers in float64), the others' in float32. A simulation's "
        "normals are rounded from float32 (simulations/noise.py); a real client's are exact and cost about six times "
        "as much."
    )
    yield (
        "- pfl-research 0.6 is not in the table: it wants dp-accounting below 0.6, which our tests cannot be run with, "
        "so the two do not install beside each other."
    )
    yield "- Nothing here is on a GPU, and no model is larger than 200,000 parameters."


def _rates(found: dict[str, dict[str, Found]]) -> Iterator[str]:
    yield "| engine | " + " | ".join(found) + " |"
    yield "|---|" + "---|" * len(found)
    for engine, name in NAMES.items():
        cells = [f"{of[engine].rate:,.0f}" if engine in of and of[engine].rates else "" for of in found.values()]
        if any(cells):
            yield f"| {name} | " + " | ".join(cells) + " |"
    times = {name: of[VECTOR].rate / of[FLOWER].rate for name, of in found.items() if of[FLOWER].rates}
    yield "| times Flower | " + " | ".join(f"**{times[name]:.1f}**" if name in times else "" for name in found) + " |"
    yield "| goal (least) | " + " | ".join(f"{GOALS[name][1]} ({GOALS[name][0]})" for name in found) + " |"
    yield ""
    reached = [name for name in times if times[name] >= GOALS[name][1]]
    least = [name for name in times if GOALS[name][0] <= times[name] < GOALS[name][1]]
    missed = [name for name in times if times[name] < GOALS[name][0]]
    said = [("reached", reached), ("above the least, below the goal", least), ("below the least", missed)]
    yield "Goals: " + "; ".join(f"{what}: {', '.join(names)}" for what, names in said if names) + "."


def _firsts(found: dict[str, dict[str, Found]]) -> Iterator[str]:
    yield "Seconds from the start of training to the end of the first round, and the most memory of all processes:"
    yield ""
    yield "| engine | " + " | ".join(found) + " |"
    yield "|---|" + "---|" * len(found)
    for engine in (VECTOR, "vector, one process", "inline", "loop", "opacus hooks", "opacus ghost", FLOWER):
        cells = []
        for of in found.values():
            here = of.get(engine)
            first = f"{median(here.firsts):.1f} s, " if here and here.firsts else ""
            cells.append(f"{first}{here.peak:,.0f} MiB" if here and here.rates else "")
        if any(cells):
            yield f"| {NAMES[engine]} | " + " | ".join(cells) + " |"


def _privacy(folder: Path) -> Iterator[str]:
    yield "## What privacy costs"
    yield ""
    yield "The same models, rows and batches of 32, one process:"
    yield ""
    yield "| | without privacy | with | times | of a private client's time: clipped sums | noise | the rest |"
    yield "|---|---|---|---|---|---|---|"
    for plain, private in (("W1b", "W3a"), ("W2", "W3b")):
        rates = []
        for name in (plain, private):
            here = Found()
            measure("vector, one process", WORKLOADS[name], folder, 10.0, here)
            rates.append(here.rate)
        whole, parts = 1e3 / rates[1], parts_of(WORKLOADS[private])
        shares = {name: part / whole for name, part in parts.items()}
        rest = max(1 - sum(shares.values()), 0.0)
        yield (
            f"| {'-'.join(map(str, WORKLOADS[plain].sizes))} | {rates[0]:,.0f} a second | {rates[1]:,.0f} | "
            f"{rates[0] / rates[1]:.1f} | {shares['clipped sums']:.0%} | {shares['noise']:.0%} | {rest:.0%} |"
        )
    yield ""
    yield (
        "Clipped sums are forward and backward passes in float64 with every number put on a lattice; without privacy "
        "they are in float32. Noise is a number a parameter and step. The rest is what both have, and accounting."
    )


def _growth(grown: dict[str, list[tuple[int, float]]]) -> Iterator[str]:
    yield "## Growth"
    yield ""
    yield "Milliseconds of a round of W2, one process ([plot](performance.svg)):"
    yield ""
    for kind, words in (("cohort", f"clients in a round, of {CLIENTS}"), ("clients", "clients in all, 100 in a round")):
        yield f"| {words} | " + " | ".join(f"{size:,}" for size, _ in grown[kind]) + " |"
        yield "|---|" + "---|" * len(grown[kind])
        yield "| ms | " + " | ".join(f"{ms:.1f}" for _, ms in grown[kind]) + " |"
        yield ""


def plot(grown: dict[str, list[tuple[int, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "cloister"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    words = {"cohort": "clients in a round", "clients": "clients in all, 100 in a round"}
    for axis, (kind, points) in zip(axes, grown.items(), strict=True):
        axis.plot([size for size, _ in points], [ms for _, ms in points], "o-", color="#1f5f8b")
        axis.set_xlabel(words[kind])
        axis.set_ylim(bottom=0)
        if kind == "clients":
            axis.set_xscale("log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms a round")
    figure.savefig(path, metadata={"Date": None})


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=25.0, help="of one of our engines on one workload")
    parser.add_argument("--only", default=",".join(SHOWN), help="workloads")
    parser.add_argument("--no-growth", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    works = [WORKLOADS[name] for name in given.only.split(",")]
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        write_tables(folder)
        found = compare(works, folder, given.turns, given.seconds)
        grown = {} if given.no_growth else growth(folder, given.seconds / 4)
        text = "\n".join(page(found, grown, folder)) + "\n"
    (given.out / "performance.md").write_text(text)
    if grown:
        plot(grown, given.out / "performance.svg")
    print(text)


if __name__ == "__main__":
    main()
