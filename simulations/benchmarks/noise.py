"""Nanoseconds for a normal: our keystream beside `torch.normal_` and Opacus' secure mode, in turn.

python -m simulations.benchmarks.noise
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from common.privacy import noise

SIZE, TURNS = 1_000_000, 15


def main() -> None:
    torch.set_num_threads(1)
    hardened, plain = noise.secure(), noise.secure()
    plain.hardened = False
    target = torch.empty(SIZE)

    def four() -> None:
        for _ in range(4):
            target.normal_()

    kinds: dict[str, Callable[[], object]] = {
        "torch.normal_, float32, Mersenne twister": lambda: target.normal_(),
        "the same four times (what Opacus' secure mode sums)": four,
        "ours, AES-CTR, one normal": lambda: plain.normal(SIZE),
        "ours, AES-CTR, hardened: the sum of four, in floating point": lambda: hardened.normal(SIZE),
        "ours, AES-CTR, integers distributed as rint(N(0, tau^2)) (what clients use)": lambda: plain.rounded_normal(
            SIZE, 1.5 * 2.0**30
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(TURNS):
        for name, draw in kinds.items():
            started = time.perf_counter()
            draw()
            seconds[name].append(time.perf_counter() - started)
    base = median(seconds["torch.normal_, float32, Mersenne twister"])
    for name, times in seconds.items():
        print(f"{median(times) / SIZE * 1e9:6.2f} ns  {median(times) / base:5.2f} x  {name}")


if __name__ == "__main__":
    main()
