"""Early stopping on a metric that may carry noise (Prechelt 1998, "Early stopping, but when?", with patience).

The metric has been released already, so looking at it costs no privacy; but when a run stops may depend on it, so
its statement gives the epsilon of the whole plan (server/folder/statement.py).
"""

from __future__ import annotations

from common.document.federation import LOWER_IS_BETTER
from common.model.scores import Scores
from server.rounds.run import Run


def note(run: Run, evaluation: Scores) -> None:
    """Takes note of an evaluation: is it better than the best by at least `min_change`?"""
    rule = run.federation.training.early_stopping
    if rule is None or not evaluation:  # no rows were counted, which is neither better nor worse
        return
    progress, value = run.progress, float(evaluation[rule.metric])
    if is_better(rule.metric, value, progress.best, rule.min_change):
        progress.best, progress.stale = value, 0
    else:
        progress.stale += 1


def is_better(metric: str, value: float, best: float | None, min_change: float) -> bool:
    """Is a figure better than the best so far, by at least `min_change`?"""
    if best is None:
        return True
    gain = best - value if metric in LOWER_IS_BETTER else value - best
    return gain >= min_change > 0 or (min_change == 0 and gain > 0)


def verdict(run: Run) -> str:
    """Why the run should stop now; nothing if it should not."""
    rule = run.federation.training.early_stopping
    progress = run.progress
    if rule is None or progress.stale < rule.patience:
        return ""
    return (
        f"early stopping after round {progress.round}: in {progress.stale} evaluations in a row {rule.metric} was not "
        f"better than its best, {progress.best:.4g}, by {rule.min_change:g}"
    )
