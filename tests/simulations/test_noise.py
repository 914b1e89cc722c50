from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from common.privacy import noise
from simulations.noise import SimulationNoise

N = 40_000


@pytest.mark.parametrize("tau", [2.0**11, 2.0**30, 2.0**49])
def test_integers_have_the_deviation_and_the_shape_of_rounded_normals(tau):
    drawn = SimulationNoise(1).rounded_normal(N, tau)
    assert drawn.dtype == np.int64
    z = drawn / tau
    assert abs(z.mean()) < 5 / np.sqrt(N) and abs(z.var() - 1) < 5 * np.sqrt(2 / N)
    assert stats.kstest(z, "norm").pvalue > 1e-7
    assert stats.kstest(z * 1.1, "norm").pvalue < 1e-7


def test_a_seed_repeats_its_stream_and_no_other_has_it():
    def draw(*seed: int | str) -> list[bytes]:
        source = SimulationNoise(*seed)
        return [source.rounded_normal(9, 2.0**20).tobytes(), source.words(9).tobytes(), source.bytes(13)]

    assert draw(1, "a") == draw(1, "a")
    others = [draw(*seed) for seed in ((1, "a"), (1, "b"), (2, "a"), ("1", "a"), (1,), (12,), (1, 2))]
    assert len({part for other in others for part in other}) == 3 * len(others)


def test_batches_may_be_drawn_ahead_of_the_noise():
    one, ahead = SimulationNoise(5), SimulationNoise(5)
    samples, noises = [], []
    for _ in range(4):
        samples.append(one.words(7))
        noises.append(one.rounded_normal(33, 2.0**20))
    assert np.array_equal(np.concatenate(samples), ahead.words(28))
    assert all(np.array_equal(ahead.rounded_normal(33, 2.0**20), drawn) for drawn in noises)


def test_what_is_filled_is_what_is_drawn():
    drawn = SimulationNoise(5).rounded_normal(100, 2.0**31)
    filled = SimulationNoise(5).fill_with_normals(torch.empty(100), 2.0**31).round_()
    assert np.array_equal(filled.to(torch.int64).numpy(), drawn)


def test_it_says_that_it_protects_nobody():
    assert not SimulationNoise(1).hardened


@pytest.mark.parametrize("source", [SimulationNoise(3), noise.seeded(3), noise.secure()])
def test_a_permutation_has_each_number_once_and_every_order_is_likely(source):
    assert sorted(source.permutation(50).tolist()) == list(range(50))
    orders = [tuple(source.permutation(3).tolist()) for _ in range(6000)]
    counts = [orders.count(order) for order in sorted(set(orders))]
    assert len(counts) == 6 and stats.chisquare(counts).pvalue > 1e-7
