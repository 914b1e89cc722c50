"""What releases cost, and how much noise a budget needs: a thin face over Opacus' accountants.

Unit: one row of one client's table. Neighbours: tables that differ by adding or removing that row.
Sampler: Poisson, each row independently with the release's rate.

PRV (Gopi, Lee, Wutschitz 2021, arXiv:2106.02848) gives the figures for plans and statements; RDP (Mironov
2017, arXiv:1702.07476; Mironov, Talwar, Zhang 2019, arXiv:1908.10530) is the quick check. Both are upper
bounds, so the lesser of the two is one: it is RDP's where epsilon is so small that PRV's 0.01 of error shows.
Inputs are checked here because the libraries do not: a delta above 1 would give a negative epsilon.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from opacus.accountants.analysis import prv, rdp

from common.errors import PrivacyError
from common.federation import Federation

Mechanism = Literal["prv", "rdp"]

# Whole orders have a closed form and are 20 times quicker than Opacus' default list of fractional ones.
RDP_ORDERS = [*range(2, 64), 72, 80, 96, 128, 192, 256, 384, 512, 1024]
FILTER_ORDERS = [2, 3, 4, 6, 10, 20]
PRV_EPSILON_ERROR = 0.01
# Beyond this no protection is left to state precisely, and PRV's mesh would not fit in memory.
PRV_LARGEST_EPSILON = 40.0


@dataclass(frozen=True, kw_only=True)
class GaussianRelease:
    """`steps` noisy sums: each row is in a sum with probability `sampling_rate`, moves it by at most C in L2
    norm, and the sum gets N(0, (noise_multiplier * C)^2 I)."""

    noise_multiplier: float
    sampling_rate: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.noise_multiplier < math.inf:
            raise PrivacyError(f"noise_multiplier must be finite and > 0, got {self.noise_multiplier!r}")
        if not 0 < self.sampling_rate <= 1:
            raise PrivacyError(f"sampling_rate must be in (0, 1], got {self.sampling_rate!r}")
        if not (isinstance(self.steps, int) and self.steps >= 0):
            raise PrivacyError(f"steps must be a whole number >= 0, got {self.steps!r}")


def epsilon(releases: Iterable[GaussianRelease], delta: float, *, accountant: Mechanism = "prv") -> float:
    """The least epsilon for which the releases together are known to be (epsilon, delta)-private.

    Equal releases are merged; nothing released costs 0.
    """
    _check_delta(delta)
    history = _merged(releases)
    return _epsilon(history, delta, accountant) if history else 0.0


def epsilon_of_adaptive(releases: Iterable[GaussianRelease], delta: float) -> float:
    """Epsilon of releases each of which may have been chosen in the light of those before it.

    It holds as long as releases stop before it passes a limit. For one RDP order fixed in advance that is the privacy
    filter of Feldman and Zrnic 2021 (arXiv:2008.11193, theorem 4.3). The least over k orders may be taken if each
    answers for delta / k: on the outcomes where an order ends up least, its own filter never stopped, and the k deltas
    add up.
    """
    _check_delta(delta)
    history = _merged(releases)
    return _rdp(history, delta / len(FILTER_ORDERS), FILTER_ORDERS) if history else 0.0


def epsilon_by_step(release: GaussianRelease, delta: float, steps: Sequence[int]) -> list[float]:
    """`epsilon` of `n` steps like those of the release, for each n in `steps`, by one PRV discretisation."""
    _check_delta(delta)
    histories: list[History] = []
    for n in steps:
        part = replace(release, steps=n)
        histories.append(((part.noise_multiplier, part.sampling_rate, part.steps),))
    by_rdp = [_rdp(history, delta) if n else 0.0 for n, history in zip(steps, histories, strict=True)]
    longest = max((n for n, bound in zip(steps, by_rdp, strict=True) if bound <= PRV_LARGEST_EPSILON), default=0)
    if not longest:
        return by_rdp
    pieces = _discretised(((release.noise_multiplier, release.sampling_rate, longest),), delta)
    return [
        min(bound, _composed(pieces, [n], delta)) if 0 < n <= longest else bound
        for n, bound in zip(steps, by_rdp, strict=True)
    ]


@lru_cache(maxsize=4096)
def calibrate(
    target_epsilon: float, delta: float, *, sampling_rate: float, steps: int, accountant: Mechanism = "prv"
) -> float:
    """The least noise multiplier, to 0.2 %, with which `steps` releases cost at most `target_epsilon`.

    It never lands on the wrong side: `epsilon` of what it returns is at most the target.

    Raises:
        PrivacyError: impossible arguments, or an epsilon too small for any noise to reach.
    """
    if not 0 < target_epsilon < math.inf:
        raise PrivacyError(f"epsilon must be finite and > 0, got {target_epsilon!r}")
    _check_delta(delta)

    def cost(sigma: float, by: Mechanism) -> float:
        release = GaussianRelease(noise_multiplier=sigma, sampling_rate=sampling_rate, steps=steps)
        return epsilon([release], delta, accountant=by)

    def least(low: float, high: float, by: Mechanism, tolerance: float) -> float:
        while high / low > 1 + tolerance:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if cost(middle, by) <= target_epsilon else (middle, high)
        return high

    high = 1.0
    while cost(high, "rdp") > target_epsilon:
        high *= 2
        if high > 1e6:
            raise PrivacyError(f"epsilon {target_epsilon:g} at delta {delta:g} is out of reach for {steps} steps")
    high = least(1e-2, high, "rdp", 0.002)
    if accountant == "rdp":
        return high
    low = high / 1.25  # mostly enough: PRV asks for a few percent less noise
    while low > 1e-2 and cost(low, "prv") <= target_epsilon:
        low, high = low / 1.25, low
    return least(low, high, "prv", 0.002)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:  # written so that NaN fails
        raise PrivacyError(f"delta must be in (0, 1), got {delta!r}")


History = tuple[tuple[float, float, int], ...]  # (noise multiplier, sampling rate, steps)


@lru_cache(maxsize=4096)
def _epsilon(history: History, delta: float, accountant: Mechanism) -> float:
    by_rdp = _rdp(history, delta)
    if accountant == "rdp" or by_rdp > PRV_LARGEST_EPSILON:
        return by_rdp
    return min(by_rdp, _composed(_discretised(history, delta), [steps for *_, steps in history], delta))


def _merged(releases: Iterable[GaussianRelease]) -> History:
    """Equal releases as one, those of no steps left out."""
    merged: dict[tuple[float, float], int] = {}
    for release in releases:
        if release.steps:
            kind = (release.noise_multiplier, release.sampling_rate)
            merged[kind] = merged.get(kind, 0) + release.steps
    return tuple((*kind, steps) for kind, steps in sorted(merged.items()))


def _rdp(history: Sequence[tuple[float, float, int]], delta: float, orders: Sequence[int] = RDP_ORDERS) -> float:
    """RDP's epsilon by the best of some of `RDP_ORDERS`."""
    places = [RDP_ORDERS.index(order) for order in orders]
    divergence = sum(steps * _rdp_of_step(sigma, rate)[places] for sigma, rate, steps in history)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
        found, _ = rdp.get_privacy_spent(orders=list(orders), rdp=divergence, delta=delta)
    return max(0.0, float(found))


@lru_cache(maxsize=1024)
def _rdp_of_step(sigma: float, rate: float) -> NDArray[np.float64]:
    """The Rényi divergence of one step at each order: what takes RDP's time, and depends on nothing else."""
    divergence: NDArray[np.float64] = rdp.compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=RDP_ORDERS)
    return divergence


def _discretised(history: History, delta: float) -> list[prv.DiscretePRV]:
    """The releases' privacy loss variables on one mesh wide enough for all their steps.

    As opacus.accountants.PRVAccountant does, but for the width, which comes from whole RDP orders only: still
    an upper bound (remark 5.6 of the paper), and found in a tenth of the time.
    """
    delta_error = delta / 1000
    total = sum(steps for *_, steps in history)
    width = max(
        _rdp(history, delta_error / 4),
        *(_rdp([(sigma, rate, 1)], delta_error / (8 * total)) for sigma, rate, _ in history),
        PRV_EPSILON_ERROR,
    )
    mesh = PRV_EPSILON_ERROR / math.sqrt(total * math.log(12 / delta_error) / 2)
    domain = prv.Domain.create_aligned(-(width + 3), width + 3, mesh)
    with np.errstate(divide="ignore"):  # a sampling rate of 1 takes log(0), and means it
        return [_discrete(sigma, rate, domain) for sigma, rate, _ in history]


def _discrete(sigma: float, rate: float, domain: prv.Domain) -> prv.DiscretePRV:
    loss = prv.PoissonSubsampledGaussianPRV(rate, sigma)
    return prv.discretize(prv.TruncatedPrivacyRandomVariable(loss, domain.t_min, domain.t_max), domain)


def _composed(pieces: list[prv.DiscretePRV], steps: list[int], delta: float) -> float:
    composed = prv.compose_heterogeneous(dprvs=list(pieces), num_self_compositions=steps)
    *_, upper = composed.compute_epsilon(delta, delta / 1000, PRV_EPSILON_ERROR)
    return max(0.0, float(upper))


def evaluation_release(federation: Federation) -> GaussianRelease | None:
    """All evaluations of a run as one release, or None if there are none.

    Raises:
        PrivacyError: they alone would cost more than `privacy.row.epsilon`.
    """
    row, evaluation, rounds = (
        federation.privacy.row,
        federation.privacy.evaluation,
        federation.evaluation_rounds,
    )
    if row is None or not rounds:
        return None
    release = GaussianRelease(noise_multiplier=evaluation.noise, steps=len(rounds))
    if (cost := epsilon([release], row.delta)) > row.epsilon:
        least = calibrate(row.epsilon, row.delta, sampling_rate=1.0, steps=len(rounds))
        needed = math.ceil(10 * least) / 10
        raise PrivacyError(
            f"privacy.evaluation: {len(rounds)} evaluations at noise {evaluation.noise:g} cost epsilon {cost:.2f}, "
            f"more than privacy.row.epsilon {row.epsilon:g}; evaluate less often, or raise noise to {needed:.1f}"
        )
    return release
