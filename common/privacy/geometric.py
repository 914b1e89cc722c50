"""The two-sided geometric distribution, drawn exactly from uniform whole numbers.

Canonne, Kamath, Steinke 2020 (arXiv:2004.00010), algorithms 1 and 2: no floating point, so no tail is missing and no
probability is rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

Below = Callable[[int], int]


def two_sided_geometric(epsilon: float, below: Below) -> int:
    """k with probability proportional to exp(-epsilon |k|).

    `below(n)` gives a uniform whole number in [0, n). `epsilon` is taken as the fraction that the float is.
    """
    numerator, denominator = Fraction(epsilon).as_integer_ratio()
    while True:
        magnitude = _one_sided(numerator, denominator, below)
        negative = below(2) == 1
        if magnitude or not negative:  # 0 stands once
            return -magnitude if negative else magnitude


def _one_sided(numerator: int, denominator: int, below: Below) -> int:
    """k >= 0 with probability proportional to exp(-k numerator / denominator)."""
    while True:
        part = below(denominator)
        if _with_probability_exp(Fraction(part, denominator), below):
            break
    whole = 0
    while _with_probability_exp(Fraction(1), below):
        whole += 1
    return (part + denominator * whole) // numerator


def _with_probability_exp(gamma: Fraction, below: Below) -> bool:
    """True with probability exp(-gamma), for gamma in [0, 1]."""
    k = 1
    while below(gamma.denominator * k) < gamma.numerator:
        k += 1
    return k % 2 == 1
