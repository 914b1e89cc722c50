"""How far clipped steps can carry a model, and whether that is enough to learn.

With `privacy.row` every row's gradient is clipped to the norm C, so a step of SGD moves the model by at most
learning_rate x C, noise aside, whatever the rows say, and a run by at most

    reach = rounds x local_steps x learning_rate x clip

Where a schedule changes the rate, the rounds' rates are added up.
A momentum m keeps each step going: s steps from rest reach as far as the sum of (1 - m^t) / (1 - m) over t = 1..s.
What is needed was measured (docs/privacy.md, `python -m simulations.benchmarks.reach`): it hardly depends on the model
or on the number of features, since inputs are encoded to [-1, 1] and labels of classes ask for logits of a few units.

Nothing is said where that measurement does not reach: for a number as target, for Adam (whose steps have their own
size), for strategies that take steps of their own, and where `privacy.client` clips a whole update.
"""

from __future__ import annotations

import math

from common.document.federation import Federation, Training
from common.document.schema import Classes
from common.document.strategy import FedAvg, FedProx

LEAST = 15.0  # below, each halving of it costs about ten points of accuracy
ENOUGH = 30.0  # from here on, another doubling gains three points at most


def reach(federation: Federation, *, steps: int | None = None) -> float | None:
    """An upper bound of how far a run moves the model, in L2 norm; None where there is none to compare with.

    Args:
        steps: of a round, where they depend on rows (`local_epochs`) and rows are known.
    """
    row, training = federation.privacy.row, federation.training
    if row is None or not _is_measured(federation):
        return None
    if steps is None and (training.local_steps or row.sampling_rate):
        steps = training.steps(row.sampling_rate or 1.0)
    if steps is None:
        return None
    return _rates(federation, steps) * row.clip * _whole_steps(training, steps)


def warning(federation: Federation, *, steps: int | None = None) -> str | None:
    """One line, if the reach is too small to learn."""
    found = reach(federation, steps=steps)
    if found is None or found >= LEAST * (1 - 1e-9):
        return None
    return (
        f"warning: this run can hardly learn: clipped steps move the model by at most {found:.3g} (rounds x steps x "
        f"learning_rate x clip), and runs that learned well had {ENOUGH:g} or more; raise training.learning_rate "
        f"first, to about {federation.training.learning_rate * ENOUGH / found:.2g}: it costs no privacy, as more "
        "rounds and steps do"
    )


def _is_measured(federation: Federation) -> bool:
    return (
        federation.training.optimizer == "sgd"
        and isinstance(federation.data_schema.target, Classes)
        and isinstance(federation.strategy, FedAvg | FedProx)
        and federation.privacy.client is None
    )


def _rates(federation: Federation, steps: int) -> float:
    """The rounds' learning rates, each the largest of its round, added up; a plateau's as if it never fell."""
    training, server = federation.training, federation.strategy.schedule
    if training.schedule is None and server is None:
        return training.rounds * training.learning_rate
    return math.fsum(
        max(training.rate_at(number, 0), training.rate_at(number, steps - 1))
        * (server.at(number, rounds=training.rounds) if server is not None else 1.0)
        for number in range(1, training.rounds + 1)
    )


def _whole_steps(training: Training, steps: int) -> float:
    """What a round's steps amount to, each optimizer beginning at rest; Nesterov's are one ahead."""
    m, ahead = training.momentum, int(training.nesterov)
    return (steps - m ** (ahead + 1) * (1 - m**steps) / (1 - m)) / (1 - m)
