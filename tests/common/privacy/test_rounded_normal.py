"""rint(N(0, tau^2)) is held against mpmath: the rejection's algebra, what floats decide in it, and what comes out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from common.privacy import noise, rounded_normal
from common.privacy.rounded_normal import COARSE, FINE, MARGIN, RoundedNormal

TAUS = [2.0**11, 2049.5, 3 * 2.0**20, 1.0005 * 2.0**30, 1.9 * 2.0**36, 2.0**52]
each_tau = pytest.mark.parametrize("tau", TAUS)


def f(k: int, tau: float) -> mpmath.mpf:
    """The integral of exp(-t^2 / 2 tau^2) over the cell of k."""
    with mpmath.workprec(300):
        return mpmath.quad(
            lambda t: mpmath.exp(-((t / mpmath.mpf(tau)) ** 2) / 2), [mpmath.mpf(k) - 0.5, mpmath.mpf(k) + 0.5]
        )


def normal_share(low: float, high: float, tau: float) -> float:
    return float(mpmath.ncdf(mpmath.mpf(high) / tau) - mpmath.ncdf(mpmath.mpf(low) / tau))


def scripted(*values: int) -> rounded_normal.Words:
    """Words that were written down; asking for more than there are is an error."""
    rest: Iterator[int] = iter(values)
    return lambda size: np.array([next(rest) for _ in range(size)], np.uint64)


def words_for(law: RoundedNormal, block: int, place: int, *, coarse: int, negative: bool = False) -> tuple[int, int]:
    """The two words that propose a place in a block."""
    for cell in range(2**rounded_normal.CELL_BITS):
        if law._other[cell] == block and law._stay[cell] < 2**FINE:
            first = (cell << FINE) | (2**FINE - 1)
            break
        if cell == block and law._stay[cell] > 0:
            first = cell << FINE
            break
    return first, (negative << 63) | (coarse << (63 - COARSE)) | place


# The proposals


@each_tau
def test_the_alias_table_gives_each_block_its_mass_to_the_last_unit(tau):
    law = RoundedNormal(tau)
    found = [0] * 2**rounded_normal.CELL_BITS
    for cell, (stay, other) in enumerate(zip(law._stay.tolist(), law._other.tolist(), strict=True)):
        assert 0 <= stay <= 2**FINE
        found[cell] += stay
        found[other] += 2**FINE - stay
    assert found[: len(law.mass)] == law.mass
    assert sum(law.mass) == 2**64
    assert not any(found[len(law.mass) :])


@each_tau
def test_no_acceptance_is_above_1(tau):
    # A block's likeliest member is its first; that of the tail is all that lies beyond it.
    law = RoundedNormal(tau)
    width = 2**law.place_bits
    with mpmath.workprec(200):
        for block in [*range(40), *range(40, law.tail, 37), law.tail - 1]:
            assert law.kappa * f(block * width, tau) <= law.mass[block]
        beyond = mpmath.sqrt(mpmath.pi / 2) * mpmath.erfc((law.tail * width - 0.5) / (tau * mpmath.sqrt(2)))
        assert law.kappa * tau * beyond / width <= law.mass[law.tail] == 1


@each_tau
def test_what_sixteen_bits_accept_would_have_been_accepted_anyway(tau):
    law = RoundedNormal(tau)
    width = 2**law.place_bits
    for block in [*range(10), *range(10, law.tail, 29), law.tail - 1]:
        least = law.kappa * f((block + 1) * width, tau) / law.mass[block]  # of ~x = -1 - x too
        assert int(law._surely[block]) <= least * 2**COARSE
    assert law._surely[law.tail] == 0
    assert float(law._surely[:200].min()) > 0.9 * 2**COARSE  # and they do decide nearly always


@each_tau
def test_the_float_that_decides_is_within_its_margin(tau):
    law, rng = RoundedNormal(tau), np.random.default_rng(0)
    for _ in range(60):
        block = int(rng.integers(law.tail))
        k = (block << law.place_bits) + int(rng.integers(2**law.place_bits))
        with mpmath.workprec(300):
            exact = law.kappa * f(k, tau) / law.mass[block]
            assert abs(float(law._probabilities(np.array([k]), np.array([block]))[0]) - exact) < MARGIN / 4
            assert abs(law._exactly(k, block, 150) - exact * 2**150) <= 1


def test_together_they_are_the_distribution_for_every_integer():
    # From the tables alone: the share of what is proposed and accepted at k, over that of all, is the normal's own.
    tau = 2050.25
    law = RoundedNormal(tau)
    width = 2**law.place_bits
    with mpmath.workprec(200):
        everything = mpmath.mpf(tau) * mpmath.sqrt(2 * mpmath.pi)
        for k in (0, 1, -1, 31, 32, -32, -33, 5000, -19_000):
            block = (k if k >= 0 else ~k) // width
            proposed = Fraction(law.mass[block], 2**64) / width / 2
            accepted = mpmath.mpf(law._exactly(k, block, 150)) / mpmath.mpf(2) ** 150
            share = mpmath.mpf(proposed.numerator) / proposed.denominator * accepted
            of_all = law.kappa * everything / width / 2 / mpmath.mpf(2) ** 64
            assert share / of_all == pytest.approx(normal_share(k - 0.5, k + 0.5, tau), rel=1e-9)


# Decisions


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("tau", [2049.5, 1.9 * 2.0**36])
def test_a_close_call_is_decided_by_more_bits(tau, negative):
    law = RoundedNormal(tau)
    block, place = 100, 2**law.place_bits - 1
    k = (block << law.place_bits) + place
    k = ~k if negative else k
    digits = COARSE + 64 + 64
    exact = law._exactly(k, block, digits)
    for distance, accepted in ((-3, True), (3, False)):  # in units of 2^-144: far below what a float tells apart
        uniform = exact + distance
        coarse, fine, more = uniform >> 128, (uniform >> 64) & (2**64 - 1), uniform & (2**64 - 1)
        first, second = words_for(law, block, place, coarse=coarse, negative=negative)
        found, refused = law._propose(1, scripted(first, second, fine, more))
        assert found.tolist() == [k]
        assert len(refused) == (0 if accepted else 1)


def test_what_is_refused_is_drawn_anew():
    law = RoundedNormal(2048.0)
    refused = words_for(law, 100, 31, coarse=2**COARSE - 1)
    taken = words_for(law, 3, 5, coarse=0)
    assert law.draw(1, scripted(*refused, 2**64 - 1, *taken)).tolist() == [3 * 32 + 5]


def test_the_negative_side_has_each_integer_once():
    law = RoundedNormal(2048.0)
    drawn = [law.draw(1, scripted(*words_for(law, 0, p, coarse=0, negative=n))) for n in (True, False) for p in (0, 1)]
    assert np.concatenate(drawn).tolist() == [-1, -2, 0, 1]


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("tau", [2048.0, 1.3 * 2.0**33])
def test_the_tail_is_the_normals_own(tau, negative):
    law = RoundedNormal(tau)
    first, second = words_for(law, law.tail, 0, coarse=0, negative=negative)
    edge = (law.tail << law.place_bits) + (1 if negative else 0) - 0.5
    for share in (0.5, 0.01, 0.999):
        uniform = int(mpmath.mpf(share) * 2**64)
        (found,) = law.draw(1, scripted(first, second, 0, uniform, 0, 0)).tolist()
        assert (found < 0) is negative
        # The inverse: so much of what is beyond the edge is beyond what was found, but for its own cell.
        far, near = (mpmath.erfc((abs(found) + side) / (tau * mpmath.sqrt(2))) for side in (0.5, -0.5))
        whole = mpmath.erfc(edge / (tau * mpmath.sqrt(2)))
        assert far / whole <= share * (1 + 1e-12) and near / whole >= share * (1 - 1e-12)


def test_the_tail_is_refused_in_proportion():
    law = RoundedNormal(2048.0)
    first, second = words_for(law, law.tail, 0, coarse=2**COARSE - 1)  # its acceptance is a few percent
    taken = words_for(law, 0, 7, coarse=0)
    assert law.draw(1, scripted(first, second, 0, *taken)).tolist() == [7]


@pytest.mark.parametrize("tau", [2047.9, 2.0**52 * 1.01, math.nan, math.inf, 0.0, -5000.0])
def test_a_tau_that_is_not_covered_is_refused(tau):
    with pytest.raises(ValueError, match=r"tau must be from 2\^11 to 2\^52"):
        RoundedNormal(tau)


# What comes out


def fits(drawn: NDArray[np.int64], tau: float) -> bool:
    """Chi-square over 400 bins, and the variance at five standard errors."""
    edges = np.round(np.linspace(-4 * tau, 4 * tau, 399)) - 0.5
    observed, _ = np.histogram(drawn, np.concatenate([[-np.inf], edges, [np.inf]]))
    expected = np.diff(stats.norm.cdf(edges / tau), prepend=0.0, append=1.0) * len(drawn)
    variance = (np.float64(drawn) / tau).var()
    return bool(
        stats.chisquare(observed, expected).pvalue > 1e-6
        and abs(variance - 1) < 5 * math.sqrt(2 / len(drawn))
        and abs(np.float64(drawn).mean() / tau) < 5 / math.sqrt(len(drawn))
    )


@pytest.mark.parametrize("make", [noise.secure, lambda: noise.seeded(1)], ids=["secure", "seeded"])
@each_tau
def test_the_integers_that_are_drawn_have_the_distribution(make, tau):
    drawn = make().rounded_normal(400_000, tau)
    assert fits(drawn, tau)
    assert not fits(drawn, tau * 1.02)
    assert not fits(drawn + int(0.02 * tau), tau)
    assert not fits(np.abs(drawn), tau)


def test_single_integers_have_their_frequencies():
    # Below a block's width, where only the place in it is drawn by bits.
    tau, n = 2048.0, 2_000_000
    drawn = noise.seeded(3).rounded_normal(n, tau)
    k = np.arange(-200, 200)
    observed = np.bincount(drawn[np.abs(drawn + 0.5) < 200] + 200, minlength=400)
    expected = n * np.diff(stats.norm.cdf((np.append(k, 200) - 0.5) / tau))
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-6
    even = drawn % 2 == 0  # no bit is more often set than not
    assert abs(even.mean() - 0.5) < 5 / math.sqrt(4 * n)


@pytest.mark.parametrize("size", [0, 1, 3, rounded_normal.CHUNK - 1, rounded_normal.CHUNK + 1])
def test_any_size_is_filled_with_independent_numbers(size):
    drawn = noise.secure().rounded_normal(size, 2.0**40)
    assert drawn.shape == (size,)
    assert drawn.dtype == np.int64
    assert len(np.unique(drawn)) == size
    if size > 1000:
        assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 5 / math.sqrt(size)


def test_a_seed_repeats_its_integers():
    assert (noise.seeded(3, 4).rounded_normal(999, 1e6) == noise.seeded(3, 4).rounded_normal(999, 1e6)).all()
    assert (noise.seeded(3, 4).rounded_normal(999, 1e6) != noise.seeded(3, 5).rounded_normal(999, 1e6)).any()
