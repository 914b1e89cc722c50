"""Flower's one internal that cannot be avoided outside its own processes, in one place.

flwr 1.41's `Message` reads who sends it from process-wide variables (`flwr.supercore.task_identity`), which only
Flower's runtimes set. A contract test makes a message, so that a Flower release that changes this is noticed.
"""

from __future__ import annotations

import hashlib

from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE = 1


def identify_process(run: str) -> int:
    """Lets this process make Flower messages as the server of `run`. Returns Flower's number for the run."""
    run_id = number(run)
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE
    return run_id


def node_id(client: str) -> int:
    """Flower's number for a client of this name; the same after a restart."""
    return number(f"client/{client}")


def task_name(run: str, kind: str, group: str) -> str:
    """What a task is called, on the wire and in ledgers: the same when it is asked again. `kind` is train or evaluate,
    `group` the round."""
    return f"{run}/{kind}/{group}"


def number(name: str) -> int:
    """A name as the positive 63-bit number that Flower uses for runs and nodes; the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
