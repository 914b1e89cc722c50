"""How far apart clients are under strategies that care, beside FedAvg, and how well noisy counts tell groups apart.

The tables that `python -m simulations.toolbox fairness groups` puts on docs/toolbox.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from common.document.federation import Federation
from common.model.scores import Counts, Scores, rows_of
from common.model.weights import Weights
from simulations.engine import run_once
from simulations.results import SEEDS
from simulations.sites import Sites
from simulations.sources import Source
from simulations.sweeps.points import grid, parse
from simulations.sweeps.report import gained, markdown
from simulations.vector.score import count_together, scores_on_validation_rows

HEAD = ("strategy", "accuracy", "worst client or tenth of clients", "deviation between clients, points")
FIXED = ("privacy.row=null", "privacy.evaluation.every=0", "privacy.evaluation.noise=0")
STRATEGIES = (
    ("fedavg", "fedavg", ()),
    ("qfedavg, q 0.2", "qfedavg", ("strategy.q=0.2",)),
    ("qfedavg, q 1", "qfedavg", ("strategy.q=1.0",)),
    ("agnostic, rate 0.1", "agnostic", ("strategy.mixture_rate=0.1",)),
    ("agnostic, rate 1", "agnostic", ("strategy.mixture_rate=1.0",)),
)

GROUP = "schema.group={name: sex, groups: {female: [0], male: [1]}}"
TOLD = (
    "the last evaluation",
    "accuracy",
    "men's less women's, points",
    "told accuracy is off by, points",
    "told difference is off by, points",
    "gap is told",
)
GROUPED = (
    ("no privacy", ("privacy.row=null", "privacy.evaluation.noise=0")),
    ("epsilon 4, noise 1", ("privacy.evaluation.noise=1",)),
    ("epsilon 4, noise 3", ("privacy.evaluation.noise=3",)),
    ("epsilon 4, noise 3, calibration", ("privacy.evaluation.noise=3", "schema.group.calibration=true")),
)


def figures(folder: Path) -> Iterator[str]:
    """The tables, as lines, in a folder that simulations/toolbox.py has prepared."""
    for title, document, source, more in (
        ("The four hospitals", "simulations/heart/federation.yaml", Source(data_dir=folder / "simulations/heart"), ()),
        (
            "The digits, at 100 clients",
            "simulations/digits.yaml",
            Source(data=folder / "digits.csv", clients=100, partition="dirichlet:0.5"),
            ("training.rounds=30", "model.hidden=[]"),
        ),
    ):
        rows = []
        base: list[tuple[float, ...]] = []  # FedAvg's, which comes first: each figure of one seed after another
        for label, name, settings in STRATEGIES:
            print(f"{title}: {label}", flush=True)
            changes = parse([f"strategy.name={name}", *settings, *FIXED, *more])
            (point,) = grid(folder / document, changes)
            seeds = [of_clients(point.federation.with_seed(seed), source) for seed in range(SEEDS)]
            found = list(zip(*seeds, strict=True))
            base = base or found
            rows.append([label, *map(gained, found, base)])
        yield ""
        yield f"{title}, without privacy:"
        yield ""
        yield from markdown(HEAD, rows)
    yield ""


def groups(folder: Path) -> Iterator[str]:
    """Accuracy and its gap by sex as a run's last evaluation tells them, beside what they are, as lines."""
    source = Source(data_dir=folder / "simulations/heart")
    rows = []
    for title, settings in GROUPED:
        print(f"groups: {title}", flush=True)
        changes = parse([GROUP, "privacy.evaluation.every=30", *settings])
        (point,) = grid(folder / "simulations/heart/federation.yaml", changes)
        told = np.array([_gaps(point.federation.with_seed(seed), source) for seed in range(SEEDS)])
        exact, noisy = told[:, :2], told[:, 3:5]
        off = np.nanmean(np.abs(noisy - exact), axis=0)  # noise may leave a group no rows, and so no figure
        figures = [*exact.mean(axis=0), *off]
        rows.append([title, *(f"{each:.1f}" for each in figures), f"{int(told[:, 5].sum())} of {SEEDS}"])
    yield ""
    yield from markdown(TOLD, rows)
    yield ""


def _gaps(federation: Federation, source: Source) -> list[float]:
    """Accuracy and by how much men's is larger than women's, in points, and whether a gap is told: exactly, and then as
    the run told them."""
    weights, evaluation, sites = _run(federation, source)
    found = []
    for scores in (scores_on_validation_rows(federation, weights, sites), evaluation):
        by = scores["by"]["sex"]
        men, women = (by["groups"][name].get("accuracy", math.nan) for name in ("male", "female"))
        found += [100 * scores["accuracy"], 100 * (men - women), float("accuracy" in by["gaps"])]
    return found


def of_clients(federation: Federation, source: Source) -> tuple[float, float, float]:
    """Accuracy over all rows, that of the clients that fare worst, and its deviation between clients, in %."""
    weights, _, sites = _run(federation, source)
    right, rows = _counted(federation, weights, sites)
    each = np.sort(right[rows > 0] / rows[rows > 0])
    worst = each[: max(1, len(each) // 10)]
    return 100 * float(right.sum() / rows.sum()), 100 * float(worst.mean()), 100 * float(each.std())


def _run(federation: Federation, source: Source) -> tuple[Weights, Scores, Sites]:
    """The model of a run, its last evaluation, and its clients."""
    sites = source.sites(federation, device=torch.device("cpu"))
    weights, result = run_once(federation, sites)
    return weights, result["evaluation"] or {}, sites


def _counted(federation: Federation, weights: Weights, sites: Sites) -> tuple[Counts, Counts]:
    """Of each client, on how many validation rows the model is right, and how many it has."""
    schema = federation.data_schema
    counts = np.concatenate(
        [count_together(federation, weights, table, rows, exact=False) for table, rows in sites.validation_rows()]
    )
    right = counts[:, :: schema.outputs + 1].sum(1)
    return right, np.array([rows_of(of, schema) for of in counts])
