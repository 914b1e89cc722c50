"""Opacus recomputes what our accountant says a plan costs, and a plan on which the two disagree is not run.

What Opacus states of itself (opacus/accountants/prv.py, analysis/prv/): `PRVAccountant` composes the privacy loss of
*removing* a row numerically (Gopi, Lee, Wutschitz 2021, arXiv:2106.02848, propositions B1 and B4). It finds

    lower <= its epsilon <= upper,  upper = epsilon(delta - delta_error) + eps_error,
                                    lower = epsilon(delta + delta_error) - eps_error,

with delta_error = delta / 1000; `get_epsilon` returns upper, by default with eps_error 0.01. Here eps_error is 1 % of
epsilon, coarser where its mesh would be too large, and never above max(0.01, 5 % of epsilon) or 0.5.

The rule. Ours bounds the epsilon of adding and of removing from above, and is loose by less than 0.1 % (`LOOSE`):

    ours >= lower                            ours bounds removing, whose epsilon is not below lower
    ours <= 1.001 max(upper, our adding)     else it is loose by more than it says

Adding can cost more than removing once steps are composed (Lebeda, Regehr, Kamath, Steinke 2024, arXiv:2405.20769),
and Opacus has no figure for it, so ours is taken: it is computed only if `upper` alone is exceeded.

PRV is left, and Opacus' RDP accountant asked, where

    delta is below 10^-9            PRV checks its rounding as if it computed in long doubles; it does in doubles
    our own figure is RDP's         (a tiny delta, very many steps) PRV's would be far below it
    losses pass 700                 exp overflows, and PRV answers infinity
    the mesh has above 2^21 cells   at the coarsest eps_error: 16 MiB an array, more than a second
    PRV or its integral complains   scipy says when the mean, by which PRV shifts its mesh, is in doubt

RDP is an upper bound, a loose one: ours must not be above it. Where ours is RDP's too, the two must be equal.
"""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from common.errors import Refusal
from common.privacy import accountants
from common.privacy.accountants import History
from common.privacy.plan import Plan
from common.privacy.releases import GaussianRelease, epsilon

log = logging.getLogger("cloister.client")

LOOSE = 0.001  # our mesh error, relative
ROUNDING = 1e-6  # relative; two programs with one formula
FINE, COARSE, LEAST_COARSE, MOST_COARSE = 0.01, 0.05, 0.01, 0.5  # PRV's eps_error: relative twice, absolute twice
FINEST = 1e-4
MOST_CELLS = 2**21
LARGEST_LOSS = 700.0


@dataclass(frozen=True, kw_only=True)
class Opinion:
    """What Opacus says that releases cost."""

    accountant: Literal["PRV", "RDP"]
    low: float  # no accountant's upper bound is below this one; 0 where RDP cannot say
    figure: float
    high: float

    def __str__(self) -> str:
        if self.accountant == "PRV":
            return f"Opacus (PRV): {self.figure:.2f}, between {self.low:.2f} and {self.high:.2f}"
        return f"Opacus (RDP, where its PRV cannot say): at most {self.figure:.2f}"


NOTHING = Opinion(accountant="PRV", low=0.0, figure=0.0, high=0.0)


def opinion(history: History, delta: float) -> Opinion:
    """What Opacus says the history costs together, at `delta`."""
    return _opinion(history, delta) if history else NOTHING


@lru_cache(maxsize=4096)
def _opinion(history: History, delta: float) -> Opinion:
    ours = epsilon((_release(*one) for one in history), delta)
    by_rdp = ours >= accountants.rdp_epsilon(history, delta)
    found = None if by_rdp or delta < accountants.SMALLEST_DELTA else _prv(history, delta, ours)
    if found is not None:
        low, figure, high = (max(0.0, f) for f in found)
        return Opinion(accountant="PRV", low=low, figure=figure, high=high)
    bound = _rdp(history, delta)
    return Opinion(accountant="RDP", low=bound if by_rdp else 0.0, figure=bound, high=bound)


def agrees(ours: float, history: History, delta: float) -> bool:
    """Whether `ours` can be what the history costs, by the rule above. NaN cannot."""
    theirs = opinion(history, delta)
    if not ours >= theirs.low * (1 - ROUNDING):
        return False
    if ours <= theirs.high * (1 + LOOSE):
        return True
    return theirs.accountant == "PRV" and bool(history) and ours <= (1 + LOOSE) * _adding(history, delta)


@lru_cache(maxsize=4096)
def of_plan(plan: Plan, *, rounds: int, evaluations: int) -> Opinion:
    """What Opacus says so much of a plan costs; the row count's epsilon, which is exact, is added to the updates'."""
    updates, counts = (opinion(h, plan.delta) for h in (_updates(plan, rounds), _counts(plan, evaluations)))
    return together(plan.count_epsilon, updates, counts)


def together(count_epsilon: float, updates: Opinion, counts: Opinion) -> Opinion:
    """While the table stays as it is, a row is in the training part or in the validation part, and pays the larger
    cost."""
    return Opinion(
        accountant="PRV" if {updates.accountant, counts.accountant} == {"PRV"} else "RDP",
        low=max(count_epsilon + updates.low, counts.low),
        figure=max(count_epsilon + updates.figure, counts.figure),
        high=max(count_epsilon + updates.high, counts.high),
    )


def check_plan(plan: Plan, *, limit: float) -> None:
    """Raises `Refusal` if Opacus disagrees with what the plan's parts cost, or finds that they cost above `limit`.

    The sentence is for both sides; the owner's log has the numbers.
    """
    updates, counts = _updates(plan, plan.most_updates), _counts(plan, plan.most_evaluations)
    for what, history in (("updates", updates), ("evaluations", counts)):
        check(what, history, plan.delta, epsilon((_release(*one) for one in history), plan.delta))
    theirs = of_plan(plan, rounds=plan.most_updates, evaluations=plan.most_evaluations)
    if not theirs.low <= limit * (1 + ROUNDING):
        _refuse("plan", limit, theirs)


def check(what: str, history: History, delta: float, ours: float) -> None:
    """Raises `Refusal` if `ours` cannot be what the history costs."""
    if not (agrees(ours, history, delta) and math.isfinite(opinion(history, delta).figure)):
        _refuse(what, ours, opinion(history, delta))


def _refuse(what: str, ours: float, theirs: Opinion) -> None:
    log.error("the %s: epsilon %.4f by our accountant or its limit; %s", what, ours, theirs)
    raise Refusal("privacy.row: a second accountant, Opacus, does not confirm the plan's epsilon, so it is not run")


def _release(sigma: float, rate: float, steps: int) -> GaussianRelease:
    return GaussianRelease(noise_multiplier=sigma, sampling_rate=rate, steps=steps)


def _updates(plan: Plan, rounds: int) -> History:
    update = replace(plan.update, steps=plan.steps * rounds)
    return ((update.noise_multiplier, update.sampling_rate, update.steps),) if update.steps else ()


def _counts(plan: Plan, evaluations: int) -> History:
    return ((plan.evaluation_noise, 1.0, evaluations),) if evaluations else ()


def _adding(history: History, delta: float) -> float:
    return accountants.epsilon_one_way(history, delta, removed=False)


def _prv(history: History, delta: float, ours: float) -> tuple[float, float, float] | None:
    """PRV's lower bound, estimate and upper bound, or None where it cannot say.

    `PRVAccountant.get_epsilon`, step by step: that one keeps the lower bound to itself, and chooses its mesh blindly.
    """
    from opacus.accountants.analysis import prv

    delta_error, counts = delta / 1000, [n for *_, n in history]
    with warnings.catch_warnings(record=True) as told, np.errstate(all="ignore"):
        warnings.simplefilter("always")
        try:
            losses = [prv.PoissonSubsampledGaussianPRV(rate, sigma) for sigma, rate, _ in history]
            reach = float(prv.compute_safe_domain_size(losses, counts, FINEST, delta_error))
            cells_an_error = 2 * reach * math.sqrt(sum(counts) * math.log(12 / delta_error) / 2)
            eps_error = _eps_error(ours, finest=cells_an_error / MOST_CELLS)
            if eps_error is None or not reach < LARGEST_LOSS:
                return None
            domain = prv.Domain.create_aligned(-reach, reach, 2 * reach * eps_error / cells_an_error)
            truncated = [prv.TruncatedPrivacyRandomVariable(loss, domain.t_min, domain.t_max) for loss in losses]
            composed = prv.compose_heterogeneous([prv.discretize(one, domain) for one in truncated], counts)
            low, figure, high = map(float, composed.compute_epsilon(delta, delta_error, eps_error))
        except (ArithmeticError, IndexError, MemoryError, RuntimeError, ValueError):
            return None
    doubtful = any(w.category.__name__ == "IntegrationWarning" for w in told)
    return (low, figure, high) if not doubtful and -math.inf < low <= figure <= high < math.inf else None


def _eps_error(ours: float, finest: float) -> float | None:
    """The error to allow PRV; None if even the coarsest is finer than its mesh can be."""
    eps_error = max(min(FINE * ours, MOST_COARSE), finest, FINEST)
    return eps_error if eps_error <= min(max(LEAST_COARSE, COARSE * ours), MOST_COARSE) else None


def _rdp(history: History, delta: float) -> float:
    """Opacus' RDP figure, at the orders that ours has."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = list(history)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # that the best order is the first or the last
        return max(0.0, float(accountant.get_epsilon(delta, alphas=list(accountants.ORDERS))))
