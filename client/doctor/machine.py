"""What a run needs of this machine: a device, a state folder, room on its disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from client.device import describe_device, resolve_device
from client.settings import ClientFile
from common.document.federation import Federation
from common.errors import DeviceError
from common.findings import Finding, ok, warning, wrong
from common.text import in_bytes

MODELS = 5  # copies of the model at most: kept, personal, replies that wait, drafts
LEDGER_BYTES = 2048  # an entry, and its place in the index
LEAST_ROOM = 16 << 20


def look(settings: ClientFile, federation: Federation | None) -> Iterator[Finding]:
    """Device, state folder and disk. Without a federation, as for one of no size."""
    exact = federation is not None and federation.privacy.row is not None and settings.arithmetic == "exact"
    try:
        device = resolve_device(settings.device, exact=exact)
        yield ok("device", describe_device(device) + (", which computes exactly" if exact else ""))
    except DeviceError as error:
        yield wrong("device", error)
    state = Path(settings.state)
    parent = next(folder for folder in (state, *state.parents) if os.path.exists(folder))  # or nobody lets us look
    if (problem := _unwritable(state, parent)) is not None:
        yield problem
        return
    yield from _private(state)
    yield _room(parent, federation)


def _unwritable(state: Path, parent: Path) -> Finding | None:
    """`parent` is the first of its folders that exists."""
    if not parent.is_dir():
        return wrong("state", f"{parent} is a file", "name a folder as `state:` in the client file")
    try:
        with tempfile.TemporaryFile(dir=parent):
            return None
    except OSError as error:
        return wrong(
            "state", f"{state} cannot be written ({error.strerror})", "name another `state:`, or mend its rights"
        )


def _private(state: Path) -> Iterator[Finding]:
    if not os.path.exists(state):
        yield ok("state", f"{state} will be made")
    elif os.name == "posix" and state.stat().st_mode & 0o077:
        yield warning("state", f"{state}: open to others than its owner", f"run `chmod 700 {state}`")
    else:
        yield ok("state", f"{state}")


def _room(folder: Path, federation: Federation | None) -> Finding:
    needed = LEAST_ROOM
    if federation is not None:
        needed += MODELS * federation.model_bytes + 2 * LEDGER_BYTES * federation.training.rounds
    free = shutil.disk_usage(folder).free
    said = f"{in_bytes(free)} free, and a run needs up to {in_bytes(needed)}"
    if free < needed:
        return wrong("disk", said, "make room, or name a `state:` on another disk")
    return ok("disk", said)
