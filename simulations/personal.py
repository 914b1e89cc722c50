"""What an owner's own version of a model is worth, and what it would have had alone, at some clients of a simulation.

The table that `python -m simulations.toolbox personal` puts on docs/toolbox.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.personal import KINDS, Kind, personalise
from simulations.results import PRIVATE_DIGITS, SEEDS
from simulations.sources import Source
from simulations.sweeps.report import gained, markdown
from simulations.trials import Case, finished, privacy_of, processes


@dataclass(frozen=True, kw_only=True)
class Owners(Case):
    """Of many clients only so many make models of their own."""

    owners: int


def cases(folder: Path) -> list[Owners]:
    """In a folder that simulations/toolbox.py has prepared."""
    heart, digits = "simulations/heart/federation.yaml", "simulations/digits.yaml"
    hospitals = Source(data_dir=folder / "simulations" / "heart")
    few = Source(data=folder / "digits.csv", clients=100, partition="iid")
    return [
        *(
            Owners(
                name=f"hospitals, {privacy_of(epsilon)}",
                document=heart,
                grid=(f"privacy.row.epsilon={epsilon}", "privacy.evaluation.every=0"),
                source=hospitals,
                owners=4,
            )
            for epsilon in ("inf", "1", "0.25")
        ),
        *(
            Owners(
                name=f"digits, 18 images at each of 100, {privacy_of(epsilon)}",
                document=digits,
                grid=(f"privacy.row.epsilon={epsilon}", *PRIVATE_DIGITS, "model.hidden=[]"),
                source=few,
                owners=6,
            )
            for epsilon in ("inf", "4")
        ),
    ]


def figures(folder: Path) -> Iterator[str]:
    """The table, as lines."""
    rows = []
    with processes() as pool:
        for case in cases(folder):
            print(case.name, flush=True)
            of_seeds = list(pool.map(_accuracies, [(case, folder, seed) for seed in range(SEEDS)]))
            by_kind = {kind: [each[kind] for each in of_seeds] for kind in KINDS}
            rows.append([case.name, *(gained(own, by_kind["federation"], " %") for own in by_kind.values())])
    yield ""
    yield from markdown(["", *KINDS], rows)
    yield ""


def _accuracies(task: tuple[Owners, Path, int]) -> dict[Kind, float]:
    """The share of the owners' validation rows on which each kind of model is right, in %."""
    case, folder, seed = task
    model, sites = finished(case, folder, seed)
    right: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
    owners = [site for site in sites if site.dataset.rows >= 10 and site.dataset.validation_rows][: case.owners]
    for site in owners:
        for kind, made in personalise(model, site.dataset).models.items():
            right[kind] += made.right.tolist()
    return {kind: 100 * float(np.mean(rows)) for kind, rows in right.items()}
