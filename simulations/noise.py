"""Randomness of a simulation: seeded, so that a run can be repeated, and fast. It protects nobody.

Normals are torch's, in float32, where a real client draws integers of an exact distribution (about six times as slow)
from a keystream of the operating system. They have a stream of their own, so whoever wants the batches of many steps at
once may draw them ahead of the noise.
"""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.privacy.noise import NoiseSource
from common.privacy.rounded_normal import Integers


class SimulationNoise(NoiseSource):
    """The stream of a seed. Other seeds give independent streams."""

    def __init__(self, *seed: int | str) -> None:
        super().__init__(self._bytes, hardened=False)
        self.seed, self._integers = seed, 0

    @cached_property
    def _uniform(self) -> torch.Generator:
        return self._generator(0)

    @cached_property
    def _normal(self) -> torch.Generator:
        return self._generator(8)

    def _generator(self, start: int) -> torch.Generator:
        digest = hashlib.sha256(repr(self.seed).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[start : start + 8], "little", signed=True))

    def _bytes(self, size: int) -> bytes:
        return self.words(-(-size // 8)).tobytes()[:size]

    def words(self, size: int) -> NDArray[np.uint64]:
        drawn = torch.empty(size, dtype=torch.int64).random_(-(2**63), None, generator=self._uniform)
        return drawn.numpy().view(np.uint64)

    def integer(self) -> int:
        """Of a stream of its own too: who needs none may leave it."""
        self._integers += 1
        digest = hashlib.sha256(repr((*self.seed, self._integers)).encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    def permutation(self, size: int) -> NDArray[np.int64]:
        order: NDArray[np.int64] = torch.randperm(size, generator=self._uniform).numpy()
        return order

    def rounded_normal(self, size: int, tau: float) -> Integers:
        """[size] integers rint(N(0, tau^2)) of a float32's 24 bits."""
        drawn = self.fill_with_normals(torch.empty(size), tau).round_()
        return drawn.to(torch.int64).numpy()

    def fill_with_normals(self, out: Tensor, tau: float) -> Tensor:
        """What `rounded_normal` gives, but for the rounding, in `out`, float32 [size]."""
        return out.normal_(0.0, tau, generator=self._normal)
