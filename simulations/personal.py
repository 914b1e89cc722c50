"""What an owner's own version of a model is worth, and what it would have had alone, at some clients of a simulation.

The table that `python -m simulations.toolbox personal` puts on docs/toolbox.md.
"""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from client.personal import KINDS, Kind, personalise
from common.inference.saved import SavedModel
from common.logs import quiet_flower
from simulations.engine import run_once
from simulations.results import PRIVATE_DIGITS, SEEDS
from simulations.sources import Source
from simulations.sweeps.points import grid, parse
from simulations.sweeps.report import gained, markdown


@dataclass(frozen=True, kw_only=True)
class Case:
    """Where it is tried. Of many clients only so many make models of their own."""

    name: str
    document: str
    grid: Sequence[str]
    source: Source
    owners: int


def cases(folder: Path) -> list[Case]:
    """In a folder that simulations/toolbox.py has prepared."""
    heart, digits = "simulations/heart/federation.yaml", "simulations/digits.yaml"
    hospitals = Source(data_dir=folder / "simulations" / "heart")
    few = Source(data=folder / "digits.csv", clients=100, partition="iid")
    return [
        *(
            Case(
                name=f"hospitals, {_shown(epsilon)}",
                document=heart,
                grid=(f"privacy.row.epsilon={epsilon}", "privacy.evaluation.every=0"),
                source=hospitals,
                owners=4,
            )
            for epsilon in ("inf", "1", "0.25")
        ),
        *(
            Case(
                name=f"digits, 18 images at each of 100, {_shown(epsilon)}",
                document=digits,
                grid=(f"privacy.row.epsilon={epsilon}", *PRIVATE_DIGITS, "model.hidden=[]"),
                source=few,
                owners=6,
            )
            for epsilon in ("inf", "4")
        ),
    ]


def _shown(epsilon: str) -> str:
    return "no privacy" if epsilon == "inf" else f"epsilon {epsilon}"


def figures(folder: Path) -> Iterator[str]:
    """The table, as lines."""
    rows = []
    with ProcessPoolExecutor(2, mp_context=mp.get_context("spawn"), initializer=_begin) as pool:
        for case in cases(folder):
            print(case.name, flush=True)
            of_seeds = list(pool.map(_accuracies, [(case, folder, seed) for seed in range(SEEDS)]))
            by_kind = {kind: [each[kind] for each in of_seeds] for kind in KINDS}
            rows.append([case.name, *(gained(own, by_kind["federation"], " %") for own in by_kind.values())])
    yield ""
    yield from markdown(["", *KINDS], rows)
    yield ""


def _begin() -> None:
    torch.set_num_threads(1)
    quiet_flower()


def _accuracies(task: tuple[Case, Path, int]) -> dict[Kind, float]:
    """The share of the owners' validation rows on which each kind of model is right, in %."""
    case, folder, seed = task
    (point,) = grid(folder / case.document, parse(case.grid))
    federation = point.federation.with_seed(seed)
    sites = case.source.sites(federation, device=torch.device("cpu"))
    weights, _ = run_once(federation, sites)
    model = SavedModel(federation=federation, weights=weights, round=federation.training.rounds)
    right: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
    owners = [site for site in sites if site.dataset.rows >= 10 and site.dataset.validation_rows][: case.owners]
    for site in owners:
        for kind, made in personalise(model, site.dataset).models.items():
            right[kind] += made.right.tolist()
    return {kind: 100 * float(np.mean(rows)) for kind, rows in right.items()}
