"""Chaos: a private federation of real processes in which, by a schedule drawn from a seed, something breaks all the
time. `python -m tests.integration.chaos --rounds N --seconds S --seed K` runs it for longer than the tests do.

A supervisor restarts what died, as systemd would: clients as they were, the server with --resume. The clock of faults
is the run's own: each comes so many rounds after the one before, so that a slow machine has as many as a quick one.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from common.privacy.plan import ATTEMPTS
from tests.integration.federation import NAMES, Federation, Process, until
from tests.integration.proxy import Proxy

EPSILON = 4.0
FAULTS = {  # and how likely each is, beside the others
    "kill client": 3,
    "kill server": 3,
    "kill both": 1,
    "terminate client": 1,
    "terminate server": 1,
    "cut": 4,
    "cut within a reply": 4,
    "delay": 3,
    "black hole": 3,
}


@dataclass
class Outcome:
    """What came of it. `problems` is empty if every promise was kept."""

    status: str = ""
    rounds: int = 0
    failed: int = 0
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    restarts: Counter[str] = field(default_factory=Counter)
    again: dict[str, int] = field(default_factory=dict)  # rounds that were charged twice, by client
    epsilon: dict[str, float] = field(default_factory=dict)
    memory_mb: list[float] = field(default_factory=list)  # of a server when a fault comes, the last of its life only
    problems: list[str] = field(default_factory=list)


def run(folder: Path, *, rounds: int, faults: int, seed: int, seconds: float = 3600.0) -> Outcome:
    """Runs `rounds` rounds with `faults` faults among them; after `seconds` no more faults come."""
    with ExitStack() as opened:
        return _Chaos(folder, opened, rounds=rounds, faults=faults, seed=seed, seconds=seconds).run()


class _Chaos:
    def __init__(self, folder: Path, opened: ExitStack, *, rounds: int, faults: int, seed: int, seconds: float) -> None:
        self.rounds, self.faults, self.seconds = rounds, faults, seconds
        self.rng = random.Random(seed)
        self.outcome = Outcome()
        self.fed = Federation(
            folder,
            opened,
            training={"rounds": rounds, "local_steps": 1, "batch_size": 8, "learning_rate": 0.1},
            strategy={"name": "fedavg", "min_clients": 1, "round_timeout": 5, "max_failed_rounds": rounds},
            privacy={
                "row": {"epsilon": EPSILON, "delta": 1e-3, "clip": 1.0},
                "evaluation": {"every": max(rounds // 4, 1), "noise": 4.0},
            },
        )
        self.server = self.fed.serve()
        self.links = {name: opened.enter_context(Proxy(self.fed.address)) for name in NAMES}
        for link in self.links.values():
            link.hold()
        self.clients = {name: self._join(name) for name in NAMES}
        until(lambda: all(link.accepted for link in self.links.values()), "not all clients came")
        for link in self.links.values():
            link.release()
        self.seen = ""  # what processes that are gone have printed
        self.pids = [p.pid for p in (self.server, *self.clients.values())]

    def _join(self, name: str) -> Process:
        policy = {"epsilon": 2 * EPSILON, "delta": 1e-3}
        return self.fed.start(
            "join", self.fed.client_file(name, server=self.links[name].address, policy=policy), "--wait", "600"
        )

    def run(self) -> Outcome:
        out, started = self.outcome, time.monotonic()
        every = self.rounds / (self.faults + 1)
        for number in range(1, self.faults + 1):
            if not self._until_round(int(number * every)) or time.monotonic() - started > self.seconds:
                break
            fault = self.rng.choices(list(FAULTS), list(FAULTS.values()))[0]
            out.faults[fault] += 1
            self._break(fault, self.rng.choice(NAMES))
        self._until_round(self.rounds)
        self._last_words()
        out.seconds = time.monotonic() - started
        self._judge()
        return out

    def _until_round(self, number: int) -> bool:
        """Waits for a round, complete or failed, and meanwhile restarts what died. False once the run is over."""
        deadline = time.monotonic() + 120
        path, before = self.fed.run / "events.jsonl", -1
        while time.monotonic() < deadline:
            self._supervise()
            if self.server.poll() == 0:
                return False
            if (size := path.stat().st_size) != before:
                before, deadline = size, time.monotonic() + 120
                if max((e["round"] for e in self.fed.events() if e["event"] == "round"), default=0) >= number:
                    return True
            time.sleep(0.02)
        told = "\n".join(f"{name}:\n{p.text[-1500:]}" for name, p in (("server", self.server), *self.clients.items()))
        raise AssertionError(f"round {number} did not come, and nothing has happened for 120 s\n{told}")

    def _supervise(self) -> None:
        if self.server.poll() not in (None, 0):
            self._note("server", self.server, (-signal.SIGKILL, 143))
            self.server = self.fed.resume()
            self.pids.append(self.server.pid)
        for name, client in self.clients.items():
            if client.poll() not in (None, 0):
                self._note(name, client, (-signal.SIGKILL, 130))
                self.clients[name] = self._join(name)
                self.pids.append(self.clients[name].pid)

    def _note(self, name: str, process: Process, codes: tuple[int, ...]) -> None:
        text = process.output(process.returncode)
        self.seen += text
        self.outcome.restarts["server" if name == "server" else "client"] += 1
        if process.returncode not in codes:
            self.outcome.problems.append(f"{name} ended by itself, with code {process.returncode}: {text[-1500:]}")

    def _break(self, fault: str, name: str) -> None:
        link, client = self.links[name], self.clients[name]
        if self.server.poll() is None:
            self.outcome.memory_mb.append(self.server.memory_mb)
        time.sleep(self.rng.uniform(0, 0.05))  # anywhere in a round
        if "server" in fault or fault == "kill both":
            self.server.send_signal(signal.SIGTERM if "terminate" in fault else signal.SIGKILL)
            self._gone(self.server)
        if "client" in fault or fault == "kill both":
            client.send_signal(signal.SIGTERM if "terminate" in fault else signal.SIGKILL)
            self._gone(client)
        if fault == "cut":
            link.cut()
        elif fault == "cut within a reply":
            link.cut_after(self.rng.randrange(1, 1500))
        elif fault == "delay":
            for each in self.links.values():
                each.delay_s = 0.0
            link.delay_s = self.rng.uniform(0.005, 0.05)
        elif fault == "black hole":
            link.hold()
            time.sleep(self.rng.uniform(0.2, 1.5))
            link.release()

    def _gone(self, process: Process) -> None:
        started = time.monotonic()
        process.wait(60)
        if (took := time.monotonic() - started) > 10:
            self.outcome.problems.append(f"it took {took:.1f} s to end a process")

    def _last_words(self) -> None:
        """Waits until all have ended by themselves, as they must once the run is over."""
        for name, process in (("server", self.server), *self.clients.items()):
            try:
                process.wait(90)
            except Exception:
                self.outcome.problems.append(f"{name} did not end with the run: {process.text[-1500:]}")
                continue
            self.seen += process.text
            if process.returncode != 0:
                self.outcome.problems.append(f"{name} ended with {process.returncode}: {process.text[-1500:]}")

    def _judge(self) -> None:
        out, fed, problems = self.outcome, self.fed, self.outcome.problems
        result = fed.result()
        out.status, out.rounds = result["status"], result["rounds"]
        rounds = [e for e in fed.events() if e["event"] == "round"]
        failed = {e["round"] for e in rounds if "failed" in e}
        out.failed = len(failed)
        expected = [n for n in range(1, self.rounds + 1) if n not in failed]
        if fed.complete != expected:
            problems.append(f"rounds are missing or told twice: {Counter(fed.complete) - Counter(expected)}")
        if "Traceback" in self.seen:
            problems.append(self.seen[self.seen.index("Traceback") :][:2000])
        charges = {name: fed.charges(name) for name in NAMES}  # which verifies the ledgers
        for event in rounds:
            counted = sum(event["round"] in charges[name] for name in NAMES)
            if "failed" not in event and counted < event["clients"]:
                problems.append(f"round {event['round']}: {event['clients']} replies, {counted} charges")
        for name in NAMES:
            out.again[name] = sum(n - 1 for n in charges[name].values())
            if len(charges[name]) > self.rounds or out.again[name] > ATTEMPTS:
                problems.append(f"{name} was charged for more than was planned")
            told = json.loads(fed.start("budget", f"{name}.yaml", "--verify", "--json").output())
            (run,) = told["runs"]
            out.epsilon[name] = run["epsilon"]
            if run["epsilon"] > EPSILON:
                problems.append(f"{name} may have cost {run['epsilon']}")
        for pid in self.pids:
            if Path(f"/proc/{pid}").exists():
                problems.append(f"process {pid} is still there")
        if len(out.memory_mb) > 3 and max(out.memory_mb) > 1.5 * min(out.memory_mb) + 20:
            problems.append(f"the server's memory grew: {out.memory_mb}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--faults", type=int, default=0, help="one in 12 rounds, unless given")
    parser.add_argument("--seconds", type=float, default=600.0, help="after these no more faults come")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = run(
            Path(folder),
            rounds=given.rounds,
            faults=given.faults or given.rounds // 12,
            seed=given.seed,
            seconds=given.seconds,
        )
    for name, value in vars(out).items():
        print(f"{name}: {value}")
    if out.problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
