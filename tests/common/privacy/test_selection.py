"""What choosing among private runs costs, held against dp-accounting."""

from __future__ import annotations

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant

from common.privacy.accountants import ORDERS
from common.privacy.plan import plan_for
from common.privacy.releases import GaussianRelease, epsilon
from common.privacy.selection import choosing, tournament
from tests.support import PRIVATE, federation


@pytest.mark.parametrize("noise, rate, steps", [(1.2, 0.05, 200), (4.0, 1.0, 30), (0.8, 0.01, 1000), (20.0, 0.3, 50)])
@pytest.mark.parametrize("mean", [2, 10, 300])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_a_tournament_costs_what_dp_accounting_says(noise, rate, steps, mean, delta):
    event = GaussianDpEvent(noise)
    one = SelfComposedDpEvent(PoissonSampledDpEvent(rate, event) if rate < 1 else event, steps)
    accountant = RdpAccountant(list(ORDERS)).compose(RepeatAndSelectDpEvent(one, mean, 1.0))
    run = GaussianRelease(noise_multiplier=noise, sampling_rate=rate, steps=steps)
    assert tournament([run], delta, mean=mean) == pytest.approx(accountant.get_epsilon(delta), rel=1e-6)


def test_of_different_runs_the_tournament_costs_as_the_dearest():
    cheap, dear = (GaussianRelease(noise_multiplier=noise, sampling_rate=0.1, steps=50) for noise in (4.0, 1.0))
    assert tournament([cheap, dear], 1e-5, mean=5) == tournament([dear], 1e-5, mean=5)
    assert tournament([cheap], 1e-5, mean=5) < tournament([dear], 1e-5, mean=5)


def test_many_runs_add_up_and_a_tournament_grows_by_their_logarithm():
    points = [federation(**PRIVATE, training__learning_rate=0.01 * (i + 1)) for i in range(100)]
    two, twenty, hundred = (choosing(points[:n], rows=150) for n in (2, 20, 100))
    assert two is not None and twenty is not None and hundred is not None
    assert twenty.one == two.one <= 4.0
    assert two.one < two.all < twenty.all < hundred.all
    assert two.all < two.tournament  # of two runs it is no bargain
    assert hundred.tournament < hundred.all
    assert hundred.tournament - twenty.tournament < 1.1 * (twenty.tournament - two.tournament)
    plan = plan_for(points[0], rows=150, epsilon=4.0)
    run = GaussianRelease(
        noise_multiplier=plan.noise_multiplier, sampling_rate=plan.sampling_rate, steps=plan.steps * plan.rounds
    )
    assert twenty.all == pytest.approx(epsilon([run] * 20, 1e-3) + 0.1)
    assert f"All 20 runs together cost a row epsilon {twenty.all:.3g} at delta 0.001" in twenty.words


@pytest.mark.parametrize("points", [[], [PRIVATE], [PRIVATE, {}]])
def test_where_there_is_no_private_choice_there_is_no_price(points):
    assert choosing([federation(**changes) for changes in points], rows=100) is None
