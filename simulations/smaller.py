"""What pruning, distillation and int8 make of a run's model, of its size and its accuracy.

The table that `python -m simulations.toolbox compression` puts on docs/toolbox.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from common.inference.compression import public_rows, smaller
from common.inference.compression.candidates import DIVISORS, SPARSITIES, candidates
from simulations.results import PRIVATE_DIGITS, SEEDS
from simulations.sources import Source
from simulations.sweeps.report import gained, markdown
from simulations.trials import Case, finished, privacy_of, processes
from simulations.vector.score import scores_on_validation_rows

NAMES = (
    "original",
    "int8",
    *(f"pruned {100 * sparsity:g} %, int8" for sparsity in SPARSITIES),
    *(f"distilled into 1/{divisor} of the units, int8" for divisor in DIVISORS),
)


def cases(folder: Path) -> list[Case]:
    """In a folder that simulations/toolbox.py has prepared. Models have one hidden layer."""
    digits = Source(data=folder / "digits.csv", clients=100, partition="dirichlet:0.5")
    hospitals = Source(data_dir=folder / "simulations" / "heart")
    found = []
    for epsilon in ("inf", "4"):
        settings = (f"privacy.row.epsilon={epsilon}", *PRIVATE_DIGITS, "model.hidden=[64]")
        found.append(
            Case(
                name=f"digits, {privacy_of(epsilon)}", document="simulations/digits.yaml", grid=settings, source=digits
            )
        )
    for epsilon in ("inf", "1"):
        found.append(
            Case(
                name=f"hospitals, {privacy_of(epsilon)}",
                document="simulations/heart/federation.yaml",
                grid=(f"privacy.row.epsilon={epsilon}", "privacy.evaluation.every=0"),
                source=hospitals,
            )
        )
    return found


def figures(folder: Path) -> Iterator[str]:
    """The table, as lines."""
    columns: dict[str, list[str]] = {}
    with processes() as pool:
        for case in cases(folder):
            print(case.name, flush=True)
            seeds = list(pool.map(_measured, [(case, folder, seed) for seed in range(SEEDS)]))
            kind = case.name.partition(",")[0]
            columns.setdefault(f"{kind}, size", [f"{size / 1000:.1f} kB" for size, _ in seeds[0]])
            accuracies = [[seed[i][1] for seed in seeds] for i in range(len(NAMES))]
            columns[case.name] = [gained(own, accuracies[0], " %") for own in accuracies]
    yield ""
    yield from markdown(["", *columns], [[name, *cells] for name, *cells in zip(NAMES, *columns.values(), strict=True)])
    yield ""


def _measured(task: tuple[Case, Path, int]) -> list[tuple[int, float]]:
    """The size of each model's file in bytes, and its accuracy on all clients' validation rows, in %."""
    case, folder, seed = task
    model, sites = finished(case, folder, seed)
    rows = public_rows.generated(model.federation.data_schema, seed=seed)
    found = []
    for made in candidates(model, rows, seed=seed):
        if made.int8 or made.method == "original":
            resized = smaller.resized(model.federation, made.hidden)
            scores = scores_on_validation_rows(resized, made.weights, sites)
            found.append((len(made.data), 100 * float(scores["accuracy"])))
    return found
