"""Clipped vectors of integers: no longer than is proven, a function of their input alone, and near it."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from server.rounds.lattice_vectors import MOST_STEPS, clipped, longest, or_zeros, squared_length

CLIP = 2**24
odd = st.sampled_from([0.0, -0.0, 5e-324, 2.3e-308, 1e-38, 3e38, 1.7e308, math.nan, math.inf, -math.inf])
entry = st.floats(-3e38, 3e38) | st.floats(-1, 1) | odd
vectors = st.lists(entry, max_size=40) | st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=400)


def exact_square(vector: NDArray[np.int64]) -> int:
    return sum(int(v) ** 2 for v in vector)


@given(
    values=vectors,
    unit=st.floats(2.0**-60, 2.0**60) | st.sampled_from([2.0**-424, 2.0**424, 2.0**-20, 1 / 3]),
    steps=st.sampled_from([1.0, 2.0**20, math.sqrt(3) * 2**20, 2.0**24, float(MOST_STEPS)]),
    weight=st.floats(0, 1) | st.sampled_from([1.0, -1.0, 2.0, math.nan, math.inf]),
)
@example(values=[1.0] * 399, unit=1.0 / 2**24, steps=2.0**24, weight=1.0)
def test_no_vector_is_longer_than_its_steps_and_rounding(values, unit, steps, weight):
    found = clipped(np.array(values, np.float64), unit=unit, steps=steps, weight=weight)
    assert found.whole.dtype == np.int64 and len(found.whole) == len(values)
    # The proof's bound, (steps (1 + 2^-40) + sqrt(n) / 2), is below the integer that is charged.
    bound = (
        Fraction(steps) * (1 + Fraction(1, 2**40))
        + Fraction(math.isqrt(len(values) * 4**40), 2**41)
        + Fraction(1, 2**40)
    )
    assert exact_square(found.whole) <= bound**2
    assert bound <= longest(steps, len(values))


def test_rounding_lengthens_a_vector_by_as_much_as_half_a_root():
    # Clipped to 10.2, each of 400 entries is 0.51: rounded, they are 1, and 20 long. That is within 10.2 + 20 / 2.
    assert clipped(np.ones(400), unit=1.0, steps=10.2).whole.tolist() == [1] * 400


@given(st.lists(st.floats(-1e6, 1e6).filter(lambda x: abs(x) > 1e-6), min_size=1, max_size=300), st.floats(0, 1))
def test_it_is_the_clipped_vector_to_half_a_unit(values, weight):
    x = np.array(values)
    factor = weight * min(1.0, 2.0 / math.sqrt(math.fsum(x * x)))
    # 1/2 unit from the last rounding; the first is 2^-26 of the largest entry, which counts as 2^24 units at most.
    found = clipped(x, unit=2.0 / CLIP, steps=CLIP, weight=weight).whole
    # A norm that was rounded like its entries is off by sqrt(n) 2^-26 of itself.
    assert abs(found - x * factor * CLIP / 2).max() <= 0.5 + 0.25 + math.sqrt(len(x)) * 0.25 + 1e-3


@pytest.mark.parametrize("power", [-300, -149, -30, 0, 30, 127, 300])
def test_a_power_of_two_on_both_sides_changes_nothing(power):
    x = np.random.default_rng(1).normal(size=500)
    here = clipped(x, unit=2.0**-24, steps=CLIP)
    there = clipped(x * 2.0**power, unit=2.0 ** (power - 24), steps=CLIP)
    assert np.array_equal(here.whole, there.whole) and here.within == there.within is False


def test_bits_below_a_vectors_own_lattice_change_nothing():
    # The largest entry is 1, so that the lattice has steps of 2^-25. Clipped, it is divided by about sqrt(5000 / 3).
    rng = np.random.default_rng(2)
    on_it = np.append(np.rint(rng.uniform(-1, 1, 5000) * 2**25), 2.0**25)
    beside = on_it + np.append(rng.uniform(-0.4, 0.4, 5000), 0)
    vectors = [clipped(x * 2.0**-25, unit=2.0**-25, steps=2.0**25).whole for x in (on_it, beside)]
    assert np.array_equal(*vectors)
    assert not np.array_equal(*(np.rint(x / 40.8) for x in (on_it, beside)))  # which their low bits would change


def test_a_vector_within_its_bound_is_only_rounded():
    found = clipped(np.array([0.25, -0.125, 2.0**-25, 3 * 2.0**-25, 0.0]), unit=2.0**-24, steps=CLIP)
    assert found.whole.tolist() == [2**22, -(2**21), 0, 2, 0]  # 1/2 and 3/2 go to the even neighbour
    assert found.within


@pytest.mark.parametrize(
    "values, within",
    [
        ([3.0, 4.0], True),
        ([3.0, 4.0 + 2.0**-23], False),
        ([-5.0, 0.0], True),
        ([5.0 + 2.0**-23, 0.0], False),
        ([0.0, 0.0], True),
        ([], True),
        ([5e-324], True),
        ([2.0**-1000, 0.0], True),
        ([2.0**530], False),
        ([1.0, math.nan], False),
        ([math.inf, 0.0], False),
        ([1.0, -math.inf], False),
    ],
)
def test_the_integer_norm_decides_what_is_within_the_bound(values, within):
    found = clipped(np.array(values, np.float64), unit=5.0 / CLIP, steps=CLIP)
    assert found.within is within


@pytest.mark.parametrize(
    "values", [[1.0, math.nan], [math.inf, 0.0], [1.0, -math.inf], [2.0**530, 1.0], [1e-300], [0.0]]
)
def test_what_is_not_finite_or_too_far_away_counts_as_zeros(values):
    assert not clipped(np.array(values), unit=2.0**-24, steps=CLIP).whole.any()


@pytest.mark.parametrize("weight", [-1.0, -1e-9, 1 + 1e-9, 1e12, math.nan, math.inf])
def test_a_weight_that_is_none_counts_as_nothing(weight):
    assert not clipped(np.ones(9), unit=2.0**-24, steps=CLIP, weight=weight).whole.any()


def test_subnormals_are_numbers_where_the_unit_is_small():
    x = np.array([1e-38, 1e-45, -1e-40])  # the second and third are subnormal in float32
    found = clipped(x, unit=2e-38 / CLIP, steps=CLIP).whole
    assert found.tolist() == pytest.approx([2**23, 1e-45 / 2e-38 * 2**24, -(2**23) / 100], abs=1)


# The check


@pytest.mark.parametrize(
    "vector, most, kept",
    [
        ([3, -4], 5, True),
        ([3, -4, 1], 5, False),
        ([5], 5, True),
        ([-6], 5, False),
        ([2**62, 0], 2**26, False),  # whose square is 0 in an int64
        ([-(2**63)], 2**26, False),  # which has no absolute value
        ([2**32] * 2, 2**26, False),
        ([2**25] * 4, 2**26, True),
        ([2**25] * 4 + [1], 2**26, False),
        ([], 1, True),
    ],
)
def test_a_vector_that_is_too_long_counts_as_nothing(vector, most, kept):
    found = or_zeros(np.array(vector, np.int64), most)
    assert found.tolist() == (vector if kept else [0] * len(vector))


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 5000])
def test_squares_are_summed_without_overflow(size):
    assert squared_length(np.full(size, -(2**26))) == size * 2**52


@pytest.mark.parametrize("size", [1, 1024, 5000])
def test_the_order_of_entries_changes_no_length(size):
    vector = np.random.default_rng(size).integers(-(2**26), 2**26, size)
    assert squared_length(vector) == squared_length(vector[::-1]) == exact_square(vector)


@pytest.mark.parametrize("size, bound", [(1, 2**24 + 2), (4, 2**24 + 3), (10**6, 2**24 + 502), (10**9, 2**24 + 15813)])
def test_the_sensitivity_is_the_steps_and_half_a_root(size, bound):
    assert longest(2**24, size) == bound
