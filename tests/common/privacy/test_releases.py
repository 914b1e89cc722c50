"""Oracles: Google's dp-accounting, Opacus' PRV and RDP accountants, and the Gaussian mechanism's closed form."""

from __future__ import annotations

import math
from functools import cache

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant, privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis import rdp
from scipy.optimize import brentq
from scipy.stats import norm

from common.errors import PrivacyError
from common.privacy import accountants
from common.privacy.releases import GaussianRelease, calibrate, epsilon, evaluation_release
from tests.support import federation

# (noise multiplier, sampling rate, steps, delta): from a strong demand to a weak one, epsilon above 1
PLANS = [
    (0.9, 0.01, 500, 1e-5),
    (1.1, 256 / 60_000, 3000, 1e-5),
    (2.0, 0.1, 60, 1e-3),
    (1.0, 0.5, 4, 1e-3),
    (0.7, 0.05, 50, 1e-6),
    (5.0, 1.0, 30, 1e-3),
]


def release(sigma: float, rate: float = 1.0, steps: int = 1) -> GaussianRelease:
    return GaussianRelease(noise_multiplier=sigma, sampling_rate=rate, steps=steps)


@cache
def pld_epsilon(releases: tuple[tuple[float, float, int], ...], delta: float) -> float:
    """dp-accounting's pessimistic estimate."""
    accountant = pld_privacy_accountant.PLDAccountant()
    for sigma, rate, steps in releases:
        event: dp_event.DpEvent = dp_event.GaussianDpEvent(sigma)
        if rate < 1:
            event = dp_event.PoissonSampledDpEvent(rate, event)
        accountant.compose(event, steps)
    return float(accountant.get_epsilon(delta))


def gaussian_delta(sigma: float, eps: float) -> float:
    """Balle and Wang 2018, arXiv:1805.06530, theorem 8, for sensitivity 1."""
    return float(norm.cdf(0.5 / sigma - eps * sigma) - math.exp(eps + norm.logcdf(-0.5 / sigma - eps * sigma)))


def gaussian_epsilon(sigma: float, delta: float) -> float:
    if gaussian_delta(sigma, 0) <= delta:
        return 0.0
    return float(brentq(lambda eps: gaussian_delta(sigma, eps) - delta, 0, 1e7, xtol=1e-12))


# Against other people's figures


@pytest.mark.parametrize("sigma, rate, steps, delta", PLANS)
def test_epsilon_agrees_with_dp_accounting_to_a_thousandth(sigma, rate, steps, delta):
    expected = pld_epsilon(((sigma, rate, steps),), delta)
    found = epsilon([release(sigma, rate, steps)], delta)
    assert found == pytest.approx(expected, rel=1e-3)


def test_different_releases_compose_as_in_dp_accounting():
    parts = ((2.0, 0.1, 40), (8.0, 1.0, 5), (1.2, 0.02, 100))
    expected = pld_epsilon(parts, 1e-5)
    found = epsilon([release(*part) for part in parts], 1e-5)
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "sigma, steps, delta",
    [(1.0, 1, 1e-5), (4.0, 16, 1e-3), (0.7, 1, 1e-6), (30.0, 100, 1e-5), (0.1, 1, 1e-5), (100.0, 100_000, 1e-7)],
)
def test_epsilon_of_the_gaussian_mechanism_is_its_closed_form_rounded_up(sigma, steps, delta):
    exact = gaussian_epsilon(sigma / math.sqrt(steps), delta)
    found = epsilon([release(sigma, 1.0, steps)], delta)
    assert exact <= found <= exact * 1.001


@pytest.mark.parametrize("sigma, delta", [(1.0, 1e-5), (4.0, 1e-3), (30.0, 1e-6), (300.0, 1e-8)])
def test_rdp_is_an_upper_bound_within_a_quarter_or_a_hundredth(sigma, delta):
    exact = gaussian_epsilon(sigma, delta)
    assert exact <= epsilon([release(sigma)], delta, accountant="rdp") <= 1.25 * exact + 0.01


@pytest.mark.parametrize("sigma, rate, steps, delta", PLANS)
@pytest.mark.parametrize("weaker", [1, 10, 100])
def test_the_figure_that_is_stated_never_exceeds_the_quick_check(sigma, rate, steps, delta, weaker):
    released = [release(sigma * weaker, rate, steps)]
    assert epsilon(released, delta, accountant="pld") <= epsilon(released, delta, accountant="rdp")


@pytest.mark.parametrize("sigma, rate, steps, delta", PLANS[:-1])  # at a rate of 1 they warn of log(0)
def test_epsilon_is_within_the_error_that_opacus_states_of_its_own(sigma, rate, steps, delta):
    accountant = PRVAccountant()
    accountant.history = [(sigma, rate, steps)]
    upper = accountant.get_epsilon(delta, eps_error=0.01)
    assert upper - 0.02 <= epsilon([release(sigma, rate, steps)], delta) <= upper


@pytest.mark.filterwarnings("ignore:Optimal order")
@pytest.mark.parametrize("sigma, rate", [(0.3, 1.0), (0.5, 0.001), (1.5, 0.16), (4.0, 0.5), (20.0, 0.01)])
def test_rdp_is_opacus_own_at_whole_orders(sigma, rate):
    theirs = rdp.compute_rdp(q=rate, noise_multiplier=sigma, steps=7, orders=list(accountants.ORDERS))
    expected, _ = rdp.get_privacy_spent(orders=list(accountants.ORDERS), rdp=theirs, delta=1e-5)
    assert accountants.rdp_epsilon(((sigma, rate, 7),), 1e-5) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sigma, rate, steps", [(1.5, 0.16, 60), (0.6, 0.3, 5), (3.0, 1.0, 20)])
def test_each_direction_agrees_with_dp_accounting(sigma, rate, steps):
    theirs = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=rate, value_discretization_interval=1e-3
    ).self_compose(steps)
    for removed, pmf in ((True, theirs._pmf_remove), (False, theirs._pmf_add)):
        found = accountants.epsilon_one_way(((sigma, rate, steps),), 1e-4, removed)
        assert found == pytest.approx(pmf.get_epsilon_for_delta(1e-4), rel=0.01)


@pytest.mark.parametrize(
    "sigma, rate", [(0.02, 1.0), (0.01, 0.01), (1e-3, 0.5), (1e4, 1.0), (1.0, 1e-7), (1.0, 1e-9), (0.4, 1e-9)]
)
def test_the_extremes_have_a_figure_that_is_not_below_the_truth(sigma, rate):
    for steps in (1, 1000):
        found = epsilon([release(sigma, rate, steps)], 1e-3)
        assert 0 <= found < math.inf
        if rate == 1.0:
            assert found >= gaussian_epsilon(sigma / math.sqrt(steps), 1e-3) * (1 - 1e-9)


def test_at_a_tiny_delta_rdp_answers():
    releases = [release(2.0, 0.1, 100)]
    assert epsilon(releases, 1e-12) == epsilon(releases, 1e-12, accountant="rdp")


# Laws

SIGMAS = st.floats(1, 20)
RATES = st.sampled_from([0.01, 0.1, 1.0])
STEPS = st.integers(1, 60)
DELTAS = st.sampled_from([1e-5, 1e-2])
SLACK = 1e-3  # two discretisations of nearly equal releases


@settings(max_examples=12)
@given(SIGMAS, st.floats(1.01, 3), RATES, STEPS, DELTAS)
def test_more_noise_costs_no_more(sigma, factor, rate, steps, delta):
    less, more = release(sigma, rate, steps), release(sigma * factor, rate, steps)
    assert epsilon([more], delta) <= epsilon([less], delta) + SLACK


@settings(max_examples=12)
@given(SIGMAS, RATES, STEPS, STEPS, DELTAS)
def test_more_steps_cost_no_less(sigma, rate, steps, extra, delta):
    few, many = release(sigma, rate, steps), release(sigma, rate, steps + extra)
    assert epsilon([many], delta) >= epsilon([few], delta) - SLACK


def test_noise_and_steps_do_matter():
    base = epsilon([release(1.0, 0.1, 10)], 1e-5)
    assert epsilon([release(2.0, 0.1, 10)], 1e-5) < base / 2
    assert epsilon([release(1.0, 0.1, 40)], 1e-5) > base * 1.2
    assert epsilon([release(1.0, 0.2, 10)], 1e-5) > base * 1.2
    assert epsilon([release(1.0, 0.1, 10)], 1e-7) > base * 1.1


@settings(max_examples=12)
@given(SIGMAS, RATES, st.lists(st.integers(0, 40), min_size=1, max_size=5), DELTAS)
def test_steps_told_in_parts_cost_what_they_cost_together(sigma, rate, parts, delta):
    together = epsilon([release(sigma, rate, sum(parts))], delta)
    assert epsilon([release(sigma, rate, n) for n in parts], delta) == together


def test_the_order_of_releases_changes_nothing():
    a, b = release(1.0, 0.1, 10), release(3.0, 1.0, 2)
    assert epsilon([a, b, a], 1e-5) == epsilon([b, a, a], 1e-5)


@pytest.mark.parametrize("nothing", [[], [release(1.0, 0.1, 0)]])
def test_nothing_released_costs_nothing(nothing):
    assert epsilon(nothing, 1e-5) == 0.0


# Calibration


@pytest.mark.parametrize("target, delta", [(0.02, 1e-6), (0.1, 1e-3), (4.0, 1e-3), (60, 1e-5)])
@pytest.mark.parametrize("rate, steps, accountant", [(0.02, 1, "pld"), (0.1, 60, "pld"), (1.0, 30, "rdp")])
def test_calibrated_noise_keeps_the_target_and_1_percent_less_would_not(target, delta, rate, steps, accountant):
    sigma = calibrate(target, delta, sampling_rate=rate, steps=steps, accountant=accountant)
    assert epsilon([release(sigma, rate, steps)], delta, accountant=accountant) <= target
    assert epsilon([release(sigma / 1.01, rate, steps)], delta, accountant=accountant) > target


@pytest.mark.parametrize("target, rate, steps", [(0.5, 0.05, 200), (4.0, 0.1, 60), (4.0, 1.0, 30)])
def test_calibrated_noise_keeps_the_target_by_dp_accounting_too(target, rate, steps):
    sigma = calibrate(target, 1e-3, sampling_rate=rate, steps=steps)
    assert 0.99 * target <= pld_epsilon(((sigma, rate, steps),), 1e-3) <= target + 1e-3


def test_an_epsilon_that_no_noise_reaches_is_refused():
    with pytest.raises(PrivacyError, match=r"epsilon 1e-06 at delta 1e-09 is out of reach for 10 steps"):
        calibrate(1e-6, 1e-9, sampling_rate=1.0, steps=10)


# Bad input

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("delta", [0, 1, 1.5, -0.1, NAN, INF])
@pytest.mark.parametrize(
    "ask",
    [
        lambda delta: epsilon([release(1.0)], delta),
        lambda delta: epsilon([], delta),
        lambda delta: epsilon([release(1.0)], delta, accountant="rdp"),
        lambda delta: calibrate(1.0, delta, sampling_rate=1.0, steps=1),
    ],
)
def test_an_impossible_delta_is_refused(ask, delta):
    with pytest.raises(PrivacyError, match=rf"delta must be in \(0, 1\), got {delta}"):
        ask(delta)


@pytest.mark.parametrize("sigma", [0, -1.0, NAN, INF])
def test_an_impossible_noise_multiplier_is_refused(sigma):
    with pytest.raises(PrivacyError, match=f"noise_multiplier must be finite and > 0, got {sigma}"):
        release(sigma)


@pytest.mark.parametrize("rate", [0, -0.1, 1.1, NAN, INF])
def test_an_impossible_sampling_rate_is_refused(rate):
    with pytest.raises(PrivacyError, match=rf"sampling_rate must be in \(0, 1\], got {rate}"):
        release(1.0, rate)
    with pytest.raises(PrivacyError, match=rf"sampling_rate must be in \(0, 1\], got {rate}"):
        calibrate(1.0, 1e-5, sampling_rate=rate, steps=1)


@pytest.mark.parametrize("steps", [-1, 1.5, NAN])
def test_an_impossible_number_of_steps_is_refused(steps):
    with pytest.raises(PrivacyError, match=f"steps must be a whole number >= 0, got {steps}"):
        release(1.0, 1.0, steps)


@pytest.mark.parametrize("target", [0, -1.0, NAN, INF])
def test_an_impossible_epsilon_is_refused(target):
    with pytest.raises(PrivacyError, match=f"epsilon must be finite and > 0, got {target}"):
        calibrate(target, 1e-5, sampling_rate=1.0, steps=1)


# Evaluations


def private(*, noise: float, every: int = 1, rounds: int = 10, fraction: float = 0.25, epsilon: float = 1.0):
    return federation(
        training__rounds=rounds,
        schema__validation_fraction=fraction,
        privacy={
            "row": {"epsilon": epsilon, "delta": 1e-3, "clip": 1.0},
            "evaluation": {"every": every, "noise": noise},
        },
    )


def test_all_evaluations_of_a_run_are_one_release():
    # Every 3 of 10 rounds and the last: 3, 6, 9, 10.
    assert evaluation_release(private(noise=9.0, every=3)) == release(9.0, 1.0, 4)


@pytest.mark.parametrize("without", [federation(), private(noise=9.0, every=0)])
def test_without_row_privacy_or_evaluations_there_is_no_release(without):
    assert evaluation_release(without) is None


def test_evaluations_that_alone_pass_the_epsilon_are_refused_with_advice_that_works():
    cost = gaussian_epsilon(3.0 / math.sqrt(10), 1e-3)  # 3.46, and stated within 0.01 of that
    with pytest.raises(PrivacyError, match=r"10 evaluations at noise 3 cost epsilon (\S+), more than \S+ 1;") as raised:
        evaluation_release(private(noise=3.0))
    said = str(raised.value)
    assert float(said.split("cost epsilon ")[1].split(",")[0]) == pytest.approx(cost, abs=0.02)
    advised = float(said.rsplit(" ", 1)[1])
    assert evaluation_release(private(noise=advised)) is not None
    with pytest.raises(PrivacyError, match=r"more than privacy\.row\.epsilon 1"):
        evaluation_release(private(noise=advised - 0.2))


@pytest.mark.parametrize("epsilon", [0.3, 0.7, 1.3, 3.7])
def test_the_advised_noise_is_rounded_up(epsilon):
    with pytest.raises(PrivacyError, match="raise noise to") as raised:
        evaluation_release(private(noise=1.0, epsilon=epsilon))
    advised = float(str(raised.value).rsplit(" ", 1)[1])
    assert evaluation_release(private(noise=advised, epsilon=epsilon)) is not None
