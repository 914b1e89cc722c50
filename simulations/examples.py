"""Federations to begin with: a schema and a table for each participant."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from common.data.tables import Table
from common.errors import ConfigError, DataError
from simulations import HEART, heating, partition
from simulations import digits as handwritten

SIMULATIONS = Path(__file__).parent
HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
SEED = 7  # by which a table is dealt

Writer = Callable[[Path], object]


@dataclass(frozen=True)
class Example:
    """A federation to try out. `tables` writes one for each participant, of about `rows` rows."""

    about: str
    schema: str  # the `schema:` section, as YAML
    tables: dict[str, Writer]
    rows: int


def heart(participants: Sequence[str]) -> Example:
    """The four hospitals, each with its own table."""
    if tuple(participants) != HOSPITALS:
        raise ConfigError([f"--participants: the example heart has its own four: {', '.join(HOSPITALS)}"])
    tables: dict[str, Writer] = {name: functools.partial(shutil.copyfile, HEART / f"{name}.data") for name in HOSPITALS}
    return Example(
        "Does this patient have a heart disease? Four hospitals; the tables are public (UCI, CC BY 4.0).",
        section(HEART / "federation.yaml"),
        tables,
        rows=230,  # on average
    )


def digits(participants: Sequence[str]) -> Example:
    """Scikit-learn's handwritten digits, dealt at random. Raises `ConfigError` where it is not installed."""
    try:
        table = handwritten.table()
    except ImportError as error:
        raise ConfigError(["--example digits: is scikit-learn's table; pip install scikit-learn"]) from error
    return _dealt("Which digit is it? Images of 8 x 8 pixels.", SIMULATIONS / "digits.yaml", table, participants)


def regression(participants: Sequence[str]) -> Example:
    """A made-up table with a number to predict, dealt at random."""
    about = "How much heat does this flat need? A number to predict; the table is made up."
    return _dealt(about, SIMULATIONS / "heating.yaml", heating.table(), participants)


EXAMPLES: dict[str, Callable[[Sequence[str]], Example]] = {"heart": heart, "digits": digits, "regression": regression}


def _dealt(about: str, document: Path, table: pl.DataFrame, participants: Sequence[str]) -> Example:
    tables = deal(table, participants)
    return Example(about, section(document), tables, rows=-(-table.height // len(participants)))


def deal(table: pl.DataFrame, participants: Sequence[str], *, separator: str = ",") -> dict[str, Writer]:
    """What writes each participant's share of a table's rows, as CSV: shares differ by at most one row. Raises
    `DataError` if there are fewer rows than participants."""
    parts = partition.iid(table.height, clients=len(participants), rng=np.random.default_rng(SEED))

    def writer(part: partition.Index) -> Writer:
        return lambda path: table[part].write_csv(path, separator=separator)

    return {name: writer(part) for name, part in zip(participants, parts, strict=True)}


def separator_for(table: Table) -> str:
    """Beside semicolons a decimal comma needs no word in the client file."""
    return ";" if table.decimals.mark == "," else ","


def section(document: Path, name: str = "schema") -> str:
    """A section of a YAML document as its text, comments and all."""
    found = re.search(rf"^{name}:\n(?:[ \t].*\n|\n(?=[ \t]))*", document.read_text(encoding="utf-8"), re.M)
    if found is None:
        raise DataError(f"{document}: has no section {name}")
    return found[0]
