"""What tests share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dp_accounting import DpEvent, GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from filelock import FileLock

from common.inference.saved import SavedModel
from common.model.weights import initial_weights
from simulations import HEART
from simulations.small import PRIVATE, WHOLE, document, federation, table

__all__ = [
    "HEART",
    "PRIVATE",
    "ROOT",
    "WHOLE",
    "document",
    "federation",
    "port_8443",
    "recomputed",
    "saved_model",
    "stated",
    "table",
]

ROOT = Path(__file__).parent.parent


@contextmanager
def port_8443() -> Iterator[None]:
    """The port of the README's examples, for one test at a time, also of several pytest processes."""
    with FileLock(Path(tempfile.gettempdir()) / "cloister-tests-8443.lock"):
        yield


def stated(**changes: float) -> dict[str, float]:
    """What a private client may say of its releases, as it travels."""
    told = {"epsilon": 1.5, "planned_epsilon": 3.0, "delta": 1e-3, "noise_multiplier": 1.0, "sampling_rate": 0.1}
    told |= {"steps": 6, "count_epsilon": 0.1, "rows": 150, "evaluation_noise": 3.0, "evaluations": 1}
    return {**told, **changes}


def recomputed(unit: dict[str, Any]) -> float:
    """The epsilon of one client, or of the whole-client unit, by dp-accounting, from privacy.json alone.

    A row is in one part, so it pays the larger of the parts' costs; what has no part is paid by all.
    """
    pure: dict[str, float] = {}
    accountants: dict[str, PLDAccountant] = {}
    for release in unit["released"]:
        part = release.get("part", "")
        if release["mechanism"] != "Gaussian":
            pure[part] = pure.get(part, 0.0) + release["epsilon"]
            continue
        if not release["steps"]:
            continue
        event: DpEvent = GaussianDpEvent(release["noise_multiplier"])
        if release["sampling_rate"] < 1:
            event = PoissonSampledDpEvent(release["sampling_rate"], event)
        accountants.setdefault(part, PLDAccountant()).compose(event, int(release["steps"]))
    return max(pure.get(part, 0.0) + float(a.get_epsilon(unit["delta"])) for part, a in accountants.items())


def saved_model(*, seed: int = 7, **changes: Any) -> SavedModel:
    """A small model, untrained, as a run would have left it; `changes` as for `document`."""
    of = federation(**changes)
    return SavedModel(federation=of, weights=initial_weights(of, seed=seed), round=3, run="small-1")
