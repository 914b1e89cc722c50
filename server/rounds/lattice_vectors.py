"""Vectors clipped to a length and made whole numbers of a unit, so that sums of them are exact.

Noise in floating point leaves bits that tell what it was added to (Mironov 2012). A sum of integers plus integer noise
has no such bits: it is the Gaussian mechanism's output, rounded (common/privacy/rounded_normal.py). For that a vector
must be integers, a function of itself and of public numbers alone, of a length that is proven. A vector x is clipped to
`steps` units, with a weight w in [0, 1], in these steps:

1. x becomes q = rint(x / 2^e), where 2^e follows from its largest entry: 2^25 <= max |q| <= 2^26.
2. |q| is the root of a sum in exact integers, so that no order of adding changes it.
3. v = rint(q f), with f = w min(2^e / unit, steps / |q|), so |q f| <= steps, but for f's own rounding.
4. Rounding moves each entry by at most 1/2, a vector of n by at most sqrt(n) / 2:

       |v| <= longest(steps, n) = ceil(steps) + floor(sqrt(n) / 2) + 2 >= steps (1 + 2^-40) + sqrt(n) / 2

   for up to 2^25 steps. It is checked in integers, whatever the floats did.

| x                                             | v     | within |
|-----------------------------------------------|-------|--------|
| zero, or empty                                | zeros | yes    |
| has NaN or an infinity, or w is not in [0, 1] | zeros | no     |
| 2^e below 2^-500                              | zeros | yes    |
| 2^e above 2^500                               | zeros | no     |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.privacy.rounded_normal import Integers

MOST_STEPS = 2**25
BITS = 26  # of the largest entry of q: 2^10 of its squares fit an int64
BLOCK = 2**10
FARTHEST = 500  # as a power of two. Powers further out would leave float64 beside a unit


@dataclass(frozen=True)
class LatticeVector:
    """`whole` x unit is the vector, clipped and weighted. `within`: it was no longer than its bound."""

    whole: Integers
    within: bool


def clipped(values: NDArray[np.float64], *, unit: float, steps: float, weight: float = 1.0) -> LatticeVector:
    """`weight` x `values`, clipped to `steps` x `unit`, as whole numbers of `unit`: at most `longest(steps, n)` long.

    `unit` is from 2^-424 to 2^424, `steps` from 1 to 2^25. The table above says what becomes of odd values.
    """
    zeros = np.zeros(values.shape, np.int64)
    if not (np.isfinite(values).all() and 0 <= weight <= 1):
        return LatticeVector(zeros, within=False)
    largest = float(np.abs(values).max(initial=0.0))
    exponent = math.frexp(largest)[1] - BITS
    if largest == 0 or abs(exponent) > FARTHEST:
        return LatticeVector(zeros, within=exponent <= FARTHEST)
    scale = math.ldexp(1.0, exponent)
    own = np.rint(np.ldexp(values, -exponent))
    length = math.sqrt(squared_length(own.astype(np.int64)))
    whole = np.rint(own * (weight * min(scale / unit, steps / length))).astype(np.int64)
    return LatticeVector(or_zeros(whole, longest(steps, values.size)), within=length * scale <= steps * unit)


def longest(steps: float, size: int) -> int:
    """The L2 norm that no vector of `clipped` passes."""
    assert steps <= MOST_STEPS
    return math.ceil(steps) + math.isqrt(size) // 2 + 2


def or_zeros(vector: Integers, most: int) -> Integers:
    """The vector if its L2 norm is at most `most`, up to 2^26. One that is longer counts as nothing."""
    assert most <= 2**BITS
    if vector.size and max(-int(vector.min()), int(vector.max())) > most:  # its squares might not fit
        return np.zeros_like(vector)
    return vector if squared_length(vector) <= most**2 else np.zeros_like(vector)


def squared_length(vector: Integers) -> int:
    """The exact sum of the squares of entries of at most 2^26."""
    sums = np.add.reduceat(vector * vector, np.arange(0, vector.size, BLOCK))
    return sum(sums.tolist())
