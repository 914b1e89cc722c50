"""What whoever runs a federation may try when a run goes wrong in a way that has a likely cause."""

from __future__ import annotations

from common.document.federation import Federation


def on_divergence(federation: Federation) -> str:
    """The likely cause of weights or losses that leave all bounds at a client, and what to try."""
    rate, row = federation.training.learning_rate, federation.privacy.row
    if row is not None:
        cause = f"a step is learning_rate x privacy.row.clip, {rate * row.clip:g}, and noise in proportion"
    elif federation.training.optimizer != "sgd":  # Adam divides a step by its size
        cause = f"each step moves every weight by about {rate:g}"
    else:
        cause = "without privacy.row no clip bounds a step"
    return (
        f"training diverged at a client: training.learning_rate {rate:g} is likely too large ({cause}); "
        f"try a tenth, {rate / 10:g}"
    )
