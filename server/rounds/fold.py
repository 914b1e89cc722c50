"""The exact weighted mean of models, taken one at a time.

Replies arrive in any order, and sums of floats depend on theirs. Here each sum is kept in two doubles (Knuth's TwoSum,
The Art of Computer Programming 2, 4.2.2, theorem B), 106 bits, and rounded once to float32 at the end: whichever order
they came in, the mean is the same but for a chance of about 2^-75 a number, so that a run which was interrupted and
resumed can equal one which was not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from common.model.weights import Weights

BLOCK = 65_536  # numbers added at a time, so that scratch space stays small

Floats = NDArray[np.float64]


class Fold:
    """A running weighted mean of states that resemble `like`."""

    def __init__(self, like: Weights) -> None:
        self._like = like
        size = sum(array.size for array in like.values())
        self._high, self._low = np.zeros(size), np.zeros(size)
        self._scratch = np.empty((3, min(size, BLOCK)))
        self._weights: list[float] = []

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def weight(self) -> float:
        """The sum of the weights, exactly rounded."""
        return math.fsum(self._weights)

    def add(self, weights: Mapping[str, NDArray[np.float32]], weight: float) -> None:
        """Adds weights whose arrays have the shapes of `like` and come in its order."""
        self._weights.append(weight)
        at = 0
        for array in weights.values():
            flat = array.reshape(-1)
            for start in range(0, len(flat), BLOCK):
                block = flat[start : start + BLOCK]
                self._add(slice(at, at + len(block)), block, weight)
                at += len(block)

    def _add(self, where: slice, values: NDArray[np.float32], weight: float) -> None:
        np.multiply(values, weight, out=self._scratch[0, : len(values)], dtype=np.float64)
        self._two_sum(where)

    def _two_sum(self, where: slice) -> None:
        """Adds the terms in the first row of the scratch space."""
        high, low = self._high[where], self._low[where]
        term, total, back = self._scratch[:, : len(high)]
        np.add(high, term, out=total)
        np.subtract(total, high, out=back)  # what of the term has arrived in the total
        term -= back
        low += term
        np.subtract(total, back, out=back)
        high -= back
        low += high  # what of the sum before it has not
        high[:] = total

    def add_all(self, flat: NDArray[np.float32], weights: NDArray[np.float64]) -> None:
        """Adds several states, [states, numbers], each as its arrays one after another. They are added in pairs, and
        the sums in pairs, which takes fewer and larger steps than one state after another."""
        self._weights += weights.tolist()
        columns = max(1, BLOCK // max(len(flat), 1))
        for start in range(0, flat.shape[1] if len(flat) else 0, columns):
            where = slice(start, min(start + columns, flat.shape[1]))
            high = flat[:, where] * weights[:, None]
            low = np.zeros_like(high)
            left = len(high)
            while left > 1:
                half = left // 2
                a, b = high[:half], high[half : 2 * half]
                total = a + b
                back = total - a
                low[:half] += low[half : 2 * half]
                low[:half] += (a - (total - back)) + (b - back)
                a[:] = total
                if left % 2:
                    high[half], low[half] = high[left - 1], low[left - 1]
                left = half + left % 2
            self._scratch[0, : where.stop - start] = high[0]
            self._two_sum(where)
            self._low[where] += low[0]

    def merge(self, other: Fold) -> None:
        """Adds what another fold of states like these has added."""
        self._weights += other._weights
        for start in range(0, len(self._high), BLOCK):
            where = slice(start, min(start + BLOCK, len(self._high)))
            np.copyto(self._scratch[0, : where.stop - start], other._high[where])
            self._two_sum(where)
            self._low[where] += other._low[where]

    def mean(self) -> Weights:
        """The mean of what was added. Raises ZeroDivisionError if that was nothing, or weighed nothing."""
        weight = self.weight
        if not weight:
            raise ZeroDivisionError("the mean of no replies")
        result: Weights = {}
        at = 0
        for name, array in self._like.items():
            part = slice(at, at + array.size)
            result[name] = ((self._high[part] + self._low[part]) / weight).astype(np.float32).reshape(array.shape)
            at += array.size
        return result
