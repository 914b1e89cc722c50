"""Integers distributed exactly as rint(N(0, tau^2)), drawn from random words.

Gaussian noise in floating point is not the Gaussian that is accounted for, and added to a float it leaves bits that
tell what it was added to (Mironov 2012; Haney et al. 2022, arXiv:2207.13793). Here sums are integers, and so is noise:

    S + rint(N(0, tau^2)) = rint(S + N(0, tau^2))    for every integer S,

so what leaves is a function of the Gaussian mechanism's output, with no delta for the rounding, provided that the
integers follow their distribution exactly. They do, by rejection (von Neumann 1951). Let f(k) be the integral of
exp(-t^2 / 2 tau^2) over [k - 1/2, k + 1/2], which falls as |k| grows.

1. A block v of 2^place_bits neighbouring magnitudes is proposed with probability mass[v] / 2^64, whole numbers that one
   word decides by the alias method (Walker 1977; Vose 1991). They are at least kappa f(first of the block).
2. The place in the block and the sign are bits of a second word. The negative side is ~x = -1 - x, so that every
   integer stands once.
3. k is accepted with probability kappa f(k) / mass[v], so that accepted integers are in proportion to f whatever the
   masses are. Sixteen bits of the second word nearly always decide that; else 64 more do, by a float that is wrong by
   less than 2^-40; and within 2^-38 of the float, mpmath with as many more bits as it takes.
4. The magnitudes beyond REACH tau are one more block, of mass 1. It is met about once in 10^19 draws, and drawn by
   inverting its distribution in mpmath, again with as many bits as it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = Callable[[int], NDArray[np.uint64]]
Integers = NDArray[np.int64]

LEAST_TAU, MOST_TAU = 2.0**11, 2.0**52
REACH = 9.5  # tau
CELL_BITS = 11  # the alias table has 2^11 cells of 2^53 each
FINE = 64 - CELL_BITS
COARSE = 16  # bits that decide nearly every acceptance
MARGIN = 2.0**-38
CHUNK = 16_384  # integers made at a time: their intermediate arrays stay in the cache


class RoundedNormal:
    """rint(N(0, tau^2)) for a `tau` from 2^11 to 2^52."""

    def __init__(self, tau: float) -> None:
        if not LEAST_TAU <= tau <= MOST_TAU:
            raise ValueError(f"tau must be from 2^11 to 2^52, got {tau!r}")
        self.tau = tau
        self.place_bits = math.frexp(tau)[1] - 1 - 6  # a block is tau / 64 to tau / 128 wide
        blocks = math.ceil(REACH * tau / 2.0**self.place_bits)
        self.tail = blocks  # the block of what is further out
        starts = np.arange(blocks) * (2.0**self.place_bits / tau)
        # f(k) <= exp(-k^2 / 2 tau^2) (1 + 1e-6) for these tau and k: the bound holds though the floats are rounded.
        bound = np.exp(-0.5 * starts * starts) * (1 + 2e-6)
        self.kappa = math.floor((2.0**64 - 2.0**20) / float(bound.sum()))
        self.mass = [int(self.kappa * b) + 1 for b in bound.tolist()] + [1]
        self.mass[0] += 2**64 - sum(self.mass)
        self._stay, self._other = _alias_table(self.mass)
        self._scale = np.array([self.kappa / m for m in self.mass])
        # A block's last member is its least likely: below this, any member is accepted. 0 sends the tail to `_tail`.
        last = self._probabilities(np.arange(1, blocks + 1) << self.place_bits, np.arange(blocks))
        self._surely = np.append(np.floor((last - MARGIN) * 2.0**COARSE), 0).clip(min=0).astype(np.uint64)

    def draw(self, size: int, words: Words) -> Integers:
        """[size] independent integers. `words(n)` gives n independent uniform words."""
        out = np.empty(size, np.int64)
        for start in range(0, size, CHUNK):
            part = out[start : start + CHUNK]
            todo: Integers = np.arange(len(part))
            part[:], refused = self._propose(len(part), words)
            while len(todo := todo[refused]):
                part[todo], refused = self._propose(len(todo), words)
        return out

    def _propose(self, size: int, words: Words) -> tuple[Integers, Integers]:
        """[size] integers, and the places of those that were refused."""
        first, second = words(size), words(size)
        cell = (first >> np.uint64(FINE)).view(np.int64)
        stays = (first & np.uint64(2**FINE - 1)) < self._stay[cell]
        block = np.where(stays, cell, self._other[cell])
        sign = second.view(np.int64) >> 63
        place = (second & np.uint64(2**self.place_bits - 1)).view(np.int64)
        coarse = (second >> np.uint64(63 - COARSE)) & np.uint64(2**COARSE - 1)
        found = ((block << self.place_bits) | place) ^ sign
        open_ = np.flatnonzero(coarse >= self._surely[block])
        if not len(open_):
            return found, open_
        return found, open_[~self._settle(found, block, coarse, open_, words)]

    def _settle(
        self, found: Integers, block: Integers, coarse: NDArray[np.uint64], open_: Integers, words: Words
    ) -> NDArray[np.bool_]:
        """Which of those that are still open are accepted. What is in the tail gets its value here."""
        fine = words(len(open_))
        uniform = (coarse[open_].astype(np.float64) + fine.astype(np.float64) * 2.0**-64) * 2.0**-COARSE
        probability = self._probabilities(found[open_], block[open_])
        accepted = uniform < probability
        close = np.abs(uniform - probability) <= MARGIN
        for i in np.flatnonzero(close | (block[open_] == self.tail)):
            at = open_[i]
            bits = _Bits((int(coarse[at]) << 64) | int(fine[i]), COARSE + 64, words)
            if block[at] == self.tail:
                accepted[i], found[at] = self._tail(bits, negative=bool(found[at] < 0))
            else:
                accepted[i] = bits.below(partial(self._exactly, int(found[at]), int(block[at])))
        return accepted

    def _probabilities(self, k: Integers, block: Integers) -> NDArray[np.float64]:
        """kappa f(k) / mass[block], to 2^-40. Not for the tail."""
        k_float = k.astype(np.float64)
        half = k_float / (2.0 * self.tau * self.tau)
        # The cell beside its middle: the mean of exp(-2 half u - u^2 / 2 tau^2) over |u| <= 1/2, to 1e-12.
        cell = 1.0 + half * half / 6.0 - 1.0 / (24.0 * self.tau * self.tau)
        scaled = k_float / self.tau
        ratio: NDArray[np.float64] = np.exp(-0.5 * scaled * scaled) * cell * self._scale[block]
        return ratio

    def _exactly(self, k: int, block: int, digits: int) -> int:
        """kappa f(k) / mass[block] x 2^digits, wrong by less than 1."""
        import mpmath

        with mpmath.workprec(2 * digits + 256):  # the difference cancels log2(tau) <= 52 bits
            root = mpmath.mpf(self.tau) * mpmath.sqrt(2)
            low, high = (mpmath.erfc((abs(k) + side) / root) for side in (mpmath.mpf(-0.5), mpmath.mpf(0.5)))
            integral = self.tau * mpmath.sqrt(mpmath.pi / 2) * (low - high)
            return int(mpmath.floor(mpmath.ldexp(self.kappa * integral / self.mass[block], digits)))

    def _tail(self, bits: _Bits, *, negative: bool) -> tuple[bool, int]:
        """Whether a proposal of the tail is accepted, and its integer.

        The block stands for magnitudes x >= T = tail x WIDTH; together they have kappa sum f / WIDTH of a mass of 1.
        """
        import mpmath

        start = self.tail << self.place_bits
        edge = start + (1 if negative else 0)  # ~x is -1 - x

        def beyond(t: Any) -> Any:  # the integral of exp(-t^2 / 2 tau^2) from t on
            return self.tau * mpmath.sqrt(mpmath.pi / 2) * mpmath.erfc(t / (mpmath.mpf(self.tau) * mpmath.sqrt(2)))

        def whole(digits: int) -> int:
            with mpmath.workprec(2 * digits + 256):
                share = self.kappa * beyond(edge - mpmath.mpf(0.5)) / mpmath.mpf(2) ** self.place_bits
                return int(mpmath.floor(mpmath.ldexp(share, digits)))

        if not bits.below(whole):
            return False, 0
        fresh = _Bits(0, 0, bits.words)
        while True:
            fresh.extend()
            with mpmath.workprec(2 * fresh.count + 256):
                ends: list[int] = []
                for numerator in (fresh.numerator, fresh.numerator + 1):
                    share = mpmath.mpf(numerator) / mpmath.mpf(2) ** fresh.count
                    if share == 0:
                        break
                    # The normal quantile by Newton's method from the tail's own scale.
                    target = mpmath.log(share * beyond(edge - mpmath.mpf(0.5)))
                    guess = mpmath.mpf(edge)
                    for _ in range(60):
                        value = beyond(guess)
                        step = (mpmath.log(value) - target) * value / mpmath.exp(-((guess / self.tau) ** 2) / 2)
                        guess += step
                        if abs(step) < mpmath.mpf(2) ** -64:
                            break
                    low, high = (int(mpmath.nint(guess + side * mpmath.mpf(2) ** -32)) for side in (-1, 1))
                    if low != high:  # too near a rounding edge to tell
                        break
                    ends.append(low)
            if len(ends) == 2 and ends[0] == ends[1]:
                return True, -ends[0] if negative else ends[0]


class _Bits:
    """A uniform number in [0, 1) of which `count` bits are known: it begins with `numerator` / 2^count."""

    def __init__(self, numerator: int, count: int, words: Words) -> None:
        self.numerator, self.count, self.words = numerator, count, words

    def extend(self) -> None:
        self.numerator = (self.numerator << 64) | int(self.words(1)[0])
        self.count += 64

    def below(self, scaled: Callable[[int], int]) -> bool:
        """Is the number below p, where `scaled(digits)` is p x 2^digits, wrong by less than 1?"""
        while True:
            p = scaled(self.count)
            if self.numerator + 1 <= p - 1:
                return True
            if self.numerator >= p + 1 + 1:
                return False
            self.extend()


@lru_cache(maxsize=64)
def rounded_normal(tau: float) -> RoundedNormal:
    """The distribution with its tables, which take milliseconds to make."""
    return RoundedNormal(tau)


def _alias_table(mass: list[int]) -> tuple[NDArray[np.uint64], Integers]:
    """For 2^11 cells of 2^53: how much of each is its own block's, and whose the rest is. Exact, in whole numbers."""
    cells, full = 2**CELL_BITS, 2**FINE
    assert len(mass) <= cells and sum(mass) == cells * full
    left = mass + [0] * (cells - len(mass))
    stay, other = [0] * cells, list(range(cells))
    small = [i for i, m in enumerate(left) if m < full]
    large = [i for i, m in enumerate(left) if m >= full]
    while small:
        i, j = small.pop(), large[-1]
        stay[i], other[i] = left[i], j
        left[j] -= full - left[i]
        if left[j] < full:
            small.append(large.pop())
    for i in large:
        stay[i] = full
    return np.array(stay, np.uint64), np.array(other, np.int64)
