"""Learning rates that fall when evaluations no longer get better (`schedule: {name: plateau}`).

An evaluation has been released already, so a rate that follows from it costs no privacy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.document.schedule import Plateau
from common.model.scores import Scores
from server.rounds.run import Run
from server.rounds.stopping import is_better

Place = Literal["training", "strategy"]  # whose schedule it is: of the clients' steps, of the server's
PLACES: tuple[Place, ...] = ("training", "strategy")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """What a plateau remembers."""

    best: float | None = None
    stale: int = 0  # evaluations since then, or since the rate fell
    factor: float = 1.0


def note(run: Run, evaluation: Scores) -> None:
    """Takes note of an evaluation, and lowers the rates whose patience it ends."""
    for place in PLACES:
        schedule = getattr(run.federation, place).schedule
        if isinstance(schedule, Plateau) and evaluation:  # without rows it is neither better nor worse
            watch = Patience(**run.progress.plateaus.get(place, {}))
            run.progress.plateaus[place] = vars(after(watch, schedule, float(evaluation[schedule.metric])))


def after(watch: Patience, schedule: Plateau, value: float) -> Patience:
    """What is remembered once the watched figure is `value`."""
    if is_better(schedule.metric, value, watch.best, schedule.min_change):
        return Patience(best=value, factor=watch.factor)
    if watch.stale + 1 < schedule.patience:
        return Patience(best=watch.best, stale=watch.stale + 1, factor=watch.factor)
    return Patience(best=watch.best, factor=max(watch.factor * schedule.factor, schedule.least))


def factor(run: Run, place: Place) -> float:
    """What a plateau has brought the rate down to; 1 without one."""
    return float(run.progress.plateaus.get(place, {}).get("factor", 1.0))
