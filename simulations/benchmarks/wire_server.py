"""A server process with a GrpcGrid and no more, told on its stdin which rounds to hold (wire.py)."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

import server.serve  # noqa: F401  what a real server has loaded
from common.certificates.identity import ServerIdentity
from common.document import documents
from common.document.federation import Federation
from common.logs import log_to, quiet_flower
from common.wire import records
from server.rounds.admission import Admission
from server.rounds.aggregation import Mean
from server.sessions.grid import GrpcGrid
from simulations.benchmarks.wire_processes import SMALL, document, say, state

TIMEOUT_S = 120.0


def main() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    log_to(logging.StreamHandler())
    quiet_flower()
    federation = documents.validate(document(SMALL), Federation)
    identity = ServerIdentity(Path(sys.argv[1]))
    grid = GrpcGrid(federation, run="benchmark", address="127.0.0.1:0", identity=identity)
    grid.start()
    say(port=grid.port, fingerprint=federation.fingerprint)
    done = 0
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        if command.pop("do") == "wait":
            say(ready=_wait(grid, **command))
        else:
            done += 1
            say(**_round(grid, done, **command))
    grid.stop("the benchmark is over")


def _wait(grid: GrpcGrid, *, ready: int, seconds: float) -> int:
    """Waits for so many clients; says how many there are."""
    deadline = time.monotonic() + seconds
    while len(grid.get_node_ids()) != ready and time.monotonic() < deadline:
        time.sleep(0.02)
    return len(grid.get_node_ids())


def _round(grid: GrpcGrid, number: int, *, clients: int, widths: list[int], mean: bool) -> dict[str, Any]:
    """One round: its messages out, its replies in, and with `mean` each admitted and added up as it comes."""
    nodes = grid.get_node_ids()[:clients]
    arrays = state(tuple(widths), seed=number)
    started, cpu = time.monotonic(), time.process_time()
    config = ConfigRecord({records.RUN: "benchmark"})
    content = RecordDict({records.ARRAYS: records.from_weights(arrays), records.CONFIG: config})
    messages = [Message(content, node, "train", group_id=str(number)) for node in nodes]
    replies = grid.stream(messages, timeout=TIMEOUT_S)
    if mean:
        metrics = (records.WEIGHT, records.LOSS)
        admission = Admission(asked=set(nodes), server_round=number, metrics=metrics, sent=arrays)
        together = Mean(arrays)
        for reply in filter(admission.take, replies):
            together.add(reply.metadata.src_node_id, records.to_update(reply.content))
        together.finish()
        answered = len(admission.nodes)
    else:
        answered = sum(not reply.has_error() for reply in replies)
    told = {"seconds": time.monotonic() - started, "cpu": time.process_time() - cpu, "answered": answered}
    grid.settle()
    return told


if __name__ == "__main__":
    main()
