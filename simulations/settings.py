"""python -m simulations.settings: what suggested settings reach, beside a grid's best and a newcomer's.

Writes "Settings that work", the last section of docs/results.md, in about two minutes of one core. The rules that it
tries are those of common/privacy/suggestion.py.
"""

from __future__ import annotations

import itertools
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import polars as pl
import torch
import yaml

from common.document import federation as federations
from common.document.documents import validate
from common.document.federation import Federation
from common.document.mistakes import Key
from common.document.schema import Schema
from common.errors import CloisterError
from common.logs import quiet_flower
from common.privacy.suggestion import FOUND_ON, HELD_BACK, suggest
from simulations import HEART
from simulations.engine import run_once
from simulations.results import PAGE, SETTINGS, filled, without_settings
from simulations.sites import Sites
from simulations.sources import Source
from simulations.sweeps.report import markdown
from simulations.synthetic import generate
from simulations.vector.score import scores_on_validation_rows

SEEDS = 2
EPSILONS = (None, 4.0, 1.0)  # None is no privacy
DELTA = 1e-3
MADE_UP_ROWS = 1000
CPU = torch.device("cpu")
NOTHING: list[dict[Key, Any]] = [{}]  # no further settings
FLOOR = -10.0  # below, a figure says only that nothing was learned
CLOSE = 3.0  # points within which the suggestion counts as good as the best
TITLE = "## Settings that work"
WORDS = """
What `cloister plan --suggest` proposes, tried. *Suggested*: its settings, for the table's rows, clients and epsilon.
*Best of the grid*: the best mean over seeds of 6 to 8 settings (below), chosen on the same validation rows,
so that it is a little too good. *Newcomer*: learning rate 0.1, batch 32, clip 1, 50 rounds of one step and a hidden
layer of 32. Accuracy, or for numbers the share of variance that is explained (100 is perfect, 0 is the mean, and
{floor} or less is shown as that), in %, on the validation rows of all clients: means of {seeds} seeds. Written by
`python -m simulations.settings`, which `make results` runs too.
"""
GRIDS = """
The grid, each with and without a hidden layer of 32, in 30 rounds. With each row protected: learning rates 0.1, 0.5 and
2 with all of a client's rows in a step, and, with the layer only, 0.5 with batches of 32; one step, clip 1 (numbers:
0.3). With each client protected: clips 0.1, 0.3 and 1 of an update, 4 steps of rate 0.3, batches of 32. Without
privacy: learning rates 0.1 and 0.5, 1 and 8 steps, batches of 32. The hospitals have their own rows; other tables are
dealt evenly and at random, and the bounds of scikit-learn's columns are their own least and largest values.
"""
UNKNOWN = """
What the suggestion does not know is your rows: how hard they are to tell apart, how unlike the clients are, whether
columns fill their bounds. It is a place to begin, not the best there is, and looking for a better one on private rows
costs privacy of its own.
"""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows to try settings on, dealt to `clients`."""

    name: str
    schema: Mapping[str, Any]
    clients: int
    rows: int  # of all clients together
    source: Source
    unit: str = "row"  # which is protected

    @property
    def is_numeric(self) -> bool:
        return "bounds" in self.schema["target"]

    def document(self, epsilon: float | None) -> dict[str, Any]:
        """The newcomer's."""
        privacy: dict[str, Any] = {"row": None, "client": None, "evaluation": {"every": 0}}
        if epsilon is not None:
            clients = {"clients": self.clients} if self.unit == "client" else {}
            privacy[self.unit] = {"epsilon": epsilon, "delta": DELTA, "clip": 1.0, **clients}
        return {
            "name": "settings",
            "schema": self.schema,
            "model": {"hidden": [32]},
            "training": {
                "rounds": 50,
                "local_steps": 1,
                "batch_size": 32,
                "learning_rate": 0.1,
                "loss": "mse" if self.is_numeric else "cross_entropy",
            },
            "strategy": {"name": "fedavg", "min_clients": self.clients},
            "privacy": privacy,
        }

    def grid(self, epsilon: float | None) -> Iterator[dict[Key, Any]]:
        """Settings in place of the newcomer's."""
        every = round(self.rows / self.clients * (1 - self.schema["validation_fraction"]))
        base: dict[Key, Any] = {("training", "rounds"): 30}
        rates = _each(("training", "learning_rate"), 0.1, 0.5, 2.0)
        whole: dict[Key, Any] = {
            ("training", "batch_size"): every,
            ("privacy", "row", "sampling_rate"): 1.0,
            ("privacy", "row", "count_epsilon"): None,
        }
        ways: Iterable[tuple[dict[Key, Any], dict[Key, Any]]]
        if epsilon is None:
            ways = itertools.product(
                _each(("training", "learning_rate"), 0.1, 0.5), _each(("training", "local_steps"), 1, 8)
            )
        elif self.unit == "client":
            base |= {("training", "learning_rate"): 0.3, ("training", "local_steps"): 4}
            ways = itertools.product(_each(("privacy", "client", "clip"), 0.1, 0.3, 1.0), NOTHING)
        else:
            base[("privacy", "row", "clip")] = 0.3 if self.is_numeric else 1.0
            ways = itertools.product(rates, [whole])
        for (one, other), hidden in itertools.product(ways, _each(("model", "hidden"), [], [32])):
            yield base | one | other | hidden
        if epsilon is not None and self.unit == "row":
            yield base | rates[1]


def _each(key: Key, *values: Any) -> list[dict[Key, Any]]:
    return [{key: value} for value in values]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Means over seeds, in %."""

    table: Table
    epsilon: float | None
    suggested: float
    best: float
    newcomer: float

    @property
    def cells(self) -> list[str]:
        epsilon = "no privacy" if self.epsilon is None else f"{self.table.unit}, {self.epsilon:g}"
        held = " (held back)" if self.table.name in HELD_BACK else ""
        where = f"{self.table.name}{held}, {self.table.clients} clients of {self.table.rows // self.table.clients}"
        return [where, epsilon, *(f"{value:.1f}" for value in (self.suggested, self.best, self.newcomer))]


def main() -> None:
    torch.set_num_threads(1)
    quiet_flower()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as where:
        found = [measured(table, epsilon, Path(where)) for table, epsilon in cases(Path(where))]
    PAGE.write_text(f"{without_settings(PAGE.read_text())}\n{SETTINGS}\n" + "\n".join(section(found)) + "\n")


def cases(folder: Path) -> Iterator[tuple[Table, float | None]]:
    """What is tried: without privacy a table's unit does not matter."""
    for table in tables(folder):
        for epsilon in EPSILONS if table.unit == "row" else EPSILONS[1:]:
            yield table, epsilon


def measured(table: Table, epsilon: float | None, folder: Path) -> Row:
    """One row of the page."""
    path = folder / "federation.yaml"
    path.write_text(yaml.safe_dump(table.document(epsilon)))
    newcomer = federations.load(path)
    changes = suggest(newcomer, rows=table.rows // table.clients, clients=table.clients).changes
    row = Row(
        table=table,
        epsilon=epsilon,
        suggested=score(federations.load(path, changes=changes), table),
        best=max(score(federations.load(path, changes=point), table) for point in table.grid(epsilon)),
        newcomer=score(newcomer, table),
    )
    print(" | ".join(row.cells), flush=True)
    return row


def score(federation: Federation, table: Table) -> float:
    """The mean over seeds, in %."""
    return fmean(_score(federation.with_seed(seed), table) for seed in range(SEEDS))


def _score(federation: Federation, table: Table) -> float:
    sites = table.source.sites(federation, device=CPU)
    try:
        weights, _ = run_once(federation, sites)
    except CloisterError:  # it has diverged
        return FLOOR
    scores = scores_on_validation_rows(federation, weights, sites)
    if not table.is_numeric:
        return 100 * float(scores["accuracy"])
    explained = 1 - float(scores["scaled"]["mse"]) / _variance(sites)
    return max(FLOOR, 100 * explained)


def _variance(sites: Sites) -> float:
    """Of the validation rows' target, as the model is trained."""
    y = [table.y[torch.from_numpy(np.concatenate(rows))] for table, rows in sites.validation_rows()]
    return float(torch.cat(y).var(correction=0))


def tables(folder: Path) -> Iterator[Table]:
    """All of them; scikit-learn's are those that it brings."""
    from sklearn import datasets

    heart = json.loads(federations.load(HEART / "federation.yaml").canonical)["schema"]
    yield Table(name="the hospitals", schema=heart, clients=4, rows=920, source=Source(data_dir=HEART))
    bundled: tuple[tuple[str, Callable[[], Any], int, str], ...] = (
        ("the digits", datasets.load_digits, 50, "row"),
        ("the digits", datasets.load_digits, 50, "client"),
        ("breast cancer", datasets.load_breast_cancer, 5, "row"),
        ("wine", datasets.load_wine, 3, "row"),
        ("diabetes", lambda: datasets.load_diabetes(scaled=False), 5, "row"),
        ("iris", datasets.load_iris, 3, "row"),
    )
    for name, loaded, clients, unit in bundled:
        yield _bundled(folder, name, loaded(), clients=clients, unit=unit)
    classes = {"name": "y", "classes": ["a", "b", "c"]}
    yield _made_up(folder, "a made-up table of classes", classes, unit="row", clients=10)
    yield _made_up(folder, "a made-up table of classes", classes, unit="client", clients=40)
    yield _made_up(folder, "a made-up table of numbers", {"name": "y", "bounds": [0, 1]}, unit="row", clients=10)


def _bundled(folder: Path, name: str, bunch: Any, *, clients: int, unit: str) -> Table:
    """One of scikit-learn's tables. The bounds are the columns' own, as no one who knows the field gave any."""
    columns = [f"x{i}" for i in range(bunch.data.shape[1])]
    path = folder / f"{name}.csv"
    frame = pl.DataFrame(bunch.data, schema=columns, orient="row")
    frame.with_columns(pl.Series("y", bunch.target)).write_csv(path)
    lows, highs = bunch.data.min(axis=0), bunch.data.max(axis=0)
    features = [
        {"name": column, "type": "numeric", "bounds": [float(low), float(max(high, low + 1e-6))]}
        for column, low, high in zip(columns, lows, highs, strict=True)
    ]
    if hasattr(bunch, "target_names"):
        target: dict[str, Any] = {"name": "y", "classes": [int(value) for value in np.unique(bunch.target)]}
    else:
        target = {"name": "y", "bounds": [float(bunch.target.min()), float(bunch.target.max())]}
    schema = {"features": features, "target": target, "validation_fraction": 0.2}
    return Table(
        name=name,
        schema=schema,
        clients=clients,
        rows=len(bunch.data),
        source=Source(data=path, clients=clients),
        unit=unit,
    )


def _made_up(folder: Path, name: str, target: dict[str, Any], *, unit: str, clients: int) -> Table:
    """Twelve numbers and two categories, and a target that a small random network gives (simulations/synthetic.py)."""
    features: list[dict[str, Any]] = [{"name": f"x{i}", "type": "numeric", "bounds": [0, 1]} for i in range(12)]
    features += [{"name": f"c{i}", "type": "categorical", "categories": ["u", "v", "w"]} for i in range(2)]
    schema = {"features": features, "target": target, "validation_fraction": 0.2}
    path = folder / f"{name}.csv"
    generate(validate(schema, Schema), rows=MADE_UP_ROWS, seed=0).write_csv(path)
    source = Source(data=path, clients=clients)
    return Table(name=name, schema=schema, clients=clients, rows=MADE_UP_ROWS, source=source, unit=unit)


HEAD = ("table", "protected, epsilon", "suggested", "best of the grid", "newcomer")


def section(found: Sequence[Row]) -> Iterator[str]:
    """The page's part, as lines."""
    yield TITLE
    yield ""
    yield filled(WORDS.format(seeds=SEEDS, floor=f"{FLOOR:g}"))
    yield ""
    yield filled(
        f"The rules were found on {', '.join(FOUND_ON)}, by looking also at settings beyond this grid, many of them "
        "in a shorter program that takes the same noisy steps and is not kept. Held back, so "
        f"that no rule was chosen by them: {', '.join(HELD_BACK)}."
    )
    yield ""
    yield from markdown(HEAD, [row.cells for row in found])
    yield ""
    yield filled(verdict(found))
    yield ""
    yield filled(GRIDS)
    yield ""
    yield filled(UNKNOWN)


def verdict(found: Sequence[Row]) -> str:
    """Where the suggestion is worse, in words."""
    close = sum(row.suggested >= row.best - CLOSE for row in found)
    worse = [row for row in found if row.suggested < row.best - CLOSE]
    lost = [row for row in found if row.suggested < row.newcomer]
    out = f"In {close} of {len(found)} rows the suggestion is within {CLOSE:g} points of the grid's best, or above it."
    out += _named("It is worse than that for", worse, lambda row: row.suggested - row.best)
    return out + _named("It is worse than the newcomer's for", lost, lambda row: row.suggested - row.newcomer)


def _named(words: str, rows: Sequence[Row], gap: Callable[[Row], float]) -> str:
    if not rows:
        return ""
    names = (f"{row.table.name} ({row.cells[1]}: {gap(row):+.1f})" for row in rows)
    return f" {words} {', '.join(names)}."


if __name__ == "__main__":
    main()
