"""A client's folder, as its owner has it before the first run."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from client.settings import ClientFile, load_client_file
from common.findings import Finding, State
from tests.support import table

Result = TypeVar("Result")

POLICY = {"epsilon": 8.0, "delta": 1e-3}


def client_file(folder: Path, *, server: str = "127.0.0.1:1", certs: Path | None = None, **changes: Any) -> Path:
    """client.yaml, and ada's table and keys. Without `certs` on plain text."""
    folder.mkdir(parents=True, exist_ok=True)
    tls = None
    if certs is not None:
        (folder / "certs").mkdir(exist_ok=True)
        for name in ("ca.pem", "ada.pem", "ada.key"):
            shutil.copy(certs / name, folder / "certs" / name)
        tls = {"ca": "certs/ca.pem", "certificate": "certs/ada.pem", "key": "certs/ada.key"}
    table(200).write_csv(folder / "ada.csv")
    document = {
        "server": server,
        "tls": tls,
        **({} if tls else {"name": "ada"}),
        "data": {"path": "ada.csv", "name": "ada"},
        "device": "cpu",
        "state": "state",
        "policy": POLICY,
    }
    path = folder / "client.yaml"
    path.write_text(yaml.safe_dump({**document, **changes}))
    return path


def settings_in(folder: Path, **changes: Any) -> ClientFile:
    return load_client_file(client_file(folder, **changes))


def drained(looking: Generator[Finding, None, Result]) -> tuple[list[Finding], Result]:
    """All that is found, and what is returned in the end."""
    found = []
    while True:
        try:
            found.append(next(looking))
        except StopIteration as end:
            return found, end.value


def of(found: Iterable[Finding], state: State) -> list[str]:
    """What was found in that state, each with its subject and its remedy."""
    return [f"{f.what}: {f.said} -> {f.remedy}" for f in found if f.state == state]
