"""What releases cost, and how much noise a budget needs.

Unit: one row of one client's table. Neighbours: tables that differ by adding or removing that row.
Sampler: Poisson, each row independently with the release's rate.

The privacy loss distribution (PLD) gives the figures for plans and statements; RDP is the looser, quick check. Both
are upper bounds (accountants.py), so the lesser of the two is one. What cannot be accounted for is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from common.document.federation import Federation
from common.errors import PrivacyError
from common.privacy.accountants import History, pld_epsilon, rdp_epsilon

Accountant = Literal["pld", "rdp"]

FILTER_ORDERS = [2, 3, 4, 6, 10, 20]


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


def epsilon(releases: Iterable[GaussianRelease], delta: float, *, accountant: Accountant = "pld") -> float:
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
    return rdp_epsilon(history, delta / len(FILTER_ORDERS), FILTER_ORDERS) if history else 0.0


@lru_cache(maxsize=4096)
def calibrate(
    target_epsilon: float,
    delta: float,
    *,
    sampling_rate: float,
    steps: int,
    accountant: Accountant = "pld",
    beside: tuple[GaussianRelease, ...] = (),
) -> float:
    """The least noise multiplier, to 0.2 %, with which `steps` releases, together with those `beside` them, cost at
    most `target_epsilon`.

    It never lands on the wrong side: `epsilon` of what it returns is at most the target.

    Raises:
        PrivacyError: impossible arguments, or an epsilon too small for any noise to reach.
    """
    if not 0 < target_epsilon < math.inf:
        raise PrivacyError(f"epsilon must be finite and > 0, got {target_epsilon!r}")
    _check_delta(delta)

    def cost(sigma: float, by: Accountant) -> float:
        release = GaussianRelease(noise_multiplier=sigma, sampling_rate=sampling_rate, steps=steps)
        return epsilon([release, *beside], delta, accountant=by)

    def least(low: float, high: float, by: Accountant, tolerance: float) -> float:
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
    low = high / 1.25  # mostly enough: PLD asks for a few percent less noise
    while low > 1e-2 and cost(low, "pld") <= target_epsilon:
        low, high = low / 1.25, low
    return least(low, high, "pld", 0.002)


def client_releases(federation: Federation) -> tuple[GaussianRelease, GaussianRelease | None]:
    """What a whole run releases about one client at `privacy.client`: updates, calibrated, and evaluations.

    Raises:
        PrivacyError: the evaluations alone would cost more than `privacy.client.epsilon`.
    """
    client, rounds = federation.privacy.client, federation.evaluation_rounds
    assert client is not None, "only with privacy.client does the server add noise"
    evaluations = None
    if rounds:
        evaluations = GaussianRelease(noise_multiplier=federation.privacy.evaluation.noise, steps=len(rounds))
        _check_evaluations(evaluations, client.epsilon, client.delta, "privacy.client.epsilon")
    rate, steps = federation.strategy.fraction, federation.training.rounds
    beside = (evaluations,) if evaluations else ()
    noise = calibrate(client.epsilon, client.delta, sampling_rate=rate, steps=steps, beside=beside)
    return GaussianRelease(noise_multiplier=noise, sampling_rate=rate, steps=steps), evaluations


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:  # written so that NaN fails
        raise PrivacyError(f"delta must be in (0, 1), got {delta!r}")


@lru_cache(maxsize=4096)
def _epsilon(history: History, delta: float, accountant: Accountant) -> float:
    by_rdp = rdp_epsilon(history, delta)
    return by_rdp if accountant == "rdp" else min(by_rdp, pld_epsilon(history, delta))


def _merged(releases: Iterable[GaussianRelease]) -> History:
    """Equal releases as one, those of no steps left out."""
    merged: dict[tuple[float, float], int] = {}
    for release in releases:
        if release.steps:
            kind = (release.noise_multiplier, release.sampling_rate)
            merged[kind] = merged.get(kind, 0) + release.steps
    return tuple((*kind, steps) for kind, steps in sorted(merged.items()))


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
    _check_evaluations(release, row.epsilon, row.delta, "privacy.row.epsilon")
    return release


def _check_evaluations(release: GaussianRelease, limit: float, delta: float, key: str) -> None:
    if (cost := epsilon([release], delta)) > limit:
        least = math.ceil(10 * calibrate(limit, delta, sampling_rate=1.0, steps=release.steps)) / 10
        raise PrivacyError(
            f"privacy.evaluation: {release.steps} evaluations at noise {release.noise_multiplier:g} cost epsilon "
            f"{cost:.2f}, more than {key} {limit:g}; evaluate less often, or raise noise to {least:.1f}"
        )
