"""The owner's table against the federation's schema, as encoding sees it."""

from __future__ import annotations

import secrets
from collections.abc import Generator, Iterator
from pathlib import Path

import torch

from client import data
from client.data import Dataset
from client.settings import ClientFile
from client.site import SPLIT_KEY, size_warnings, split_key
from common.document.federation import Federation
from common.errors import CloisterError, ConfigError, DataError
from common.findings import Finding, State, mistakes, ok, warning, wrong


def look(settings: ClientFile, federation: Federation) -> Generator[Finding, None, Dataset | None]:
    """Reads, encodes and deals the table as a run would. Returns its parts, on the CPU, or None if it does not fit."""
    private = federation.privacy.row is not None
    state = Path(settings.state)
    schema, place = federation.data_schema, Path(settings.data.path)
    try:
        # Before the first run another secret will do, to look: rows are then dealt in another way, about as many.
        key = split_key(state) if (state / SPLIT_KEY).exists() else secrets.token_bytes(32)
    except DataError as error:
        yield wrong("table", error)
        return None
    try:
        rows = data.read(place, schema, key=key, form=settings.data.form, leave_out=private, person=settings.data.id)
        dataset = data.split(rows, schema, key=key, device=torch.device("cpu"), use_up=True)
    except ConfigError as error:
        yield from mistakes("table", error, "mend the client file")
        return None
    except CloisterError as error:
        yield from mistakes("table", error, "mend the table, or ask whoever coordinates for another schema")
        return None
    yield ok(
        "table",
        f"{dataset.rows + dataset.validation_rows} rows fit the schema: {dataset.rows} to train on, "
        f"{dataset.validation_rows} to validate on",
    )
    yield from _met(dataset)
    for said in size_warnings(federation, dataset.rows):
        yield warning("table", said.removeprefix("warning: "))
    return dataset


def _met(dataset: Dataset) -> Iterator[Finding]:
    """What encoding met: a warning where a cell is not taken as it stands."""
    report = dataset.report
    hardly_meant = report.warnings()
    for line in report.lines():
        changed = line in hardly_meant or line.startswith(
            ("left out", "cells that do not fit", "all rows are of one class")
        )
        yield Finding("table", State.WARNING if changed else State.OK, line.removeprefix("warning: "))
