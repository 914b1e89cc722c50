"""Randomness that privacy rests on: noise on integers, row sampling, and noise on a row count.

A real client draws all of it from an AES-CTR keystream keyed by the operating system: who does not hold the
key cannot predict it, and no seed of an experiment reaches it. Simulations and tests draw the same
distributions from a seeded stream.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from common.privacy.geometric import two_sided_geometric
from common.privacy.rounded_normal import Integers, rounded_normal

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 16_384  # normals made at a time: their intermediate arrays stay in the cache


class NoiseSource:
    """Draws from a stream of random bytes. Make one with `secure()` or `seeded(seed)`; `hardened` tells them apart."""

    def __init__(self, random_bytes: Callable[[int], bytes], *, hardened: bool) -> None:
        self._random_bytes = random_bytes
        self.hardened = hardened

    def words(self, size: int) -> NDArray[np.uint64]:
        """[size] independent uniform words."""
        return np.frombuffer(self._random_bytes(8 * size), np.uint64)

    def bytes(self, size: int) -> bytes:
        """[size] uniform bytes, such as a key."""
        return self._random_bytes(size)

    def uniform(self, size: int) -> NDArray[np.float64]:
        """[size] numbers in (0, 1], multiples of 2^-53."""
        whole: NDArray[np.float64] = ((self.words(size) >> np.uint64(11)) + np.uint64(1)).astype(np.float64)
        return np.multiply(whole, 2.0**-53, out=whole)

    def rounded_normal(self, size: int, tau: float) -> Integers:
        """[size] integers distributed exactly as rint(N(0, tau^2)), `tau` from 2^11 to 2^52.

        Added to integers of L2 sensitivity S they are the Gaussian mechanism of noise multiplier tau / S, rounded
        (common/privacy/rounded_normal.py).
        """
        return rounded_normal(tau).draw(size, self.words)

    def normal(self, size: int) -> NDArray[np.float64]:
        """[size] standard normals in floating point, whose low bits tell what they are added to: where privacy rests
        on the sum, use `rounded_normal`.

        A hardened source returns (a + b + c + d) / 2 of four independent ones, so that the output's low bits
        do not give away its inputs (Holohan and Braghin 2021, arXiv:2107.10138, section 5.1; Opacus' secure
        mode does the same).
        """
        out = np.empty(size + size % 2)
        for start in range(0, len(out), BLOCK):
            block = out[start : start + BLOCK]
            self._box_muller(block)
            if self.hardened:
                more = np.empty_like(block)
                for _ in range(3):
                    self._box_muller(more)
                    block += more
                block /= 2.0
        return out[:size]

    def gaussian(self, like: Tensor, std: float) -> Tensor:
        """N(0, std^2) in the shape, type and place of `like`."""
        import torch  # here, because a server without it starts in a third of the time

        flat = torch.from_numpy(self.normal(like.numel()) * std)
        return flat.to(dtype=like.dtype, device=like.device).view(like.shape)

    def poisson_sample(self, size: int, rate: float) -> NDArray[np.int64]:
        """Indices of the rows drawn from `size`, each independently with probability `rate`."""
        return np.flatnonzero(self.uniform(size) <= rate).astype(np.int64)

    def two_sided_geometric(self, epsilon: float) -> int:
        """An integer k with probability proportional to exp(-epsilon |k|): noise that makes a count
        epsilon-private (Ghosh, Roughgarden, Sundararajan 2009, arXiv:0811.2841)."""
        return two_sided_geometric(epsilon, self._below)

    def integer(self) -> int:
        """A number in [0, 2^63), to seed what needs no secrecy (dropout)."""
        return int.from_bytes(self._random_bytes(8), "little") >> 1

    def permutation(self, size: int) -> NDArray[np.int64]:
        """The numbers below `size` in a random order, which needs no secrecy."""
        return np.random.default_rng(self.integer()).permutation(size)

    def _below(self, limit: int) -> int:
        """A whole number in [0, limit), all equally likely."""
        bits = (limit - 1).bit_length()
        size = -(-bits // 8)
        while (found := int.from_bytes(self._random_bytes(size), "little") >> (8 * size - bits)) >= limit:
            pass
        return found

    def _box_muller(self, block: NDArray[np.float64]) -> None:
        """Fills a block of even size with normals. Torch's vectorised functions are five times as fast as numpy's."""
        import torch

        half = len(block) // 2
        uniform, out = torch.from_numpy(self.uniform(len(block))), torch.from_numpy(block)
        radius, angle = uniform[:half].log_().mul_(-2.0).sqrt_(), uniform[half:].mul_(2.0 * math.pi)
        torch.mul(radius, torch.cos(angle), out=out[:half])
        torch.mul(radius, torch.sin(angle), out=out[half:])


def secure() -> NoiseSource:
    """A source keyed by the operating system; a forked process gets a key of its own."""
    return NoiseSource(_Keystream().read, hardened=True)


def seeded(*seed: int) -> NoiseSource:
    """A reproducible source, for simulations and tests only. Other seeds give independent streams.

    The seed is hashed, since numpy takes (1,) and (1, 0), and likewise (2^32, 0) and (0, 1), for the same one.
    """
    digest = hashlib.sha256(repr(seed).encode()).digest()
    return NoiseSource(np.random.default_rng(int.from_bytes(digest, "little")).bytes, hardened=False)


class _Keystream:
    """AES-256 in counter mode over zeros."""

    def __init__(self) -> None:
        self._rekey()

    def _rekey(self) -> None:
        self._process = os.getpid()
        self._encryptor = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()

    def read(self, size: int) -> bytes:
        if self._process != os.getpid():  # a fork must not repeat its parent's stream
            self._rekey()
        return self._encryptor.update(bytes(size))
