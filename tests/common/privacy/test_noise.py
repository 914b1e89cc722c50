"""Distributions are tested on fixed streams where there is a seed; secure streams have none, so their bounds are wide
enough to fail a correct source less than once in a million runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from common.privacy import geometric, noise
from common.privacy.noise import BLOCK, NoiseSource
from tests.support import ROOT

N = 40_000
SOURCES: list[Callable[[], NoiseSource]] = [noise.secure, lambda: noise.seeded(1)]
both = pytest.mark.parametrize("make", SOURCES, ids=["secure", "seeded"])


def looks_standard_normal(z: NDArray[np.float64]) -> bool:
    """Mean, variance and shape, each at five standard errors or p = 1e-7."""
    n = len(z)
    return (
        abs(z.mean()) < 5 / np.sqrt(n)
        and abs(z.var() - 1) < 5 * np.sqrt(2 / n)
        and stats.kstest(z, "norm").pvalue > 1e-7
    )


@both
def test_normals_have_mean_0_variance_1_and_the_right_shape(make):
    z = make().normal(N)
    assert looks_standard_normal(z)
    assert not looks_standard_normal(z * 1.05)
    assert not looks_standard_normal(z + 0.05)
    assert not looks_standard_normal(np.random.default_rng(0).uniform(-np.sqrt(3), np.sqrt(3), N))


@both
@pytest.mark.parametrize("size", [0, 1, 3, 33, BLOCK - 1, BLOCK + 1])
def test_any_size_is_filled(make, size):
    z = make().normal(size)
    assert z.shape == (size,)
    assert np.isfinite(z).all()
    assert len(np.unique(z)) == size


@both
def test_normals_of_one_pair_and_of_neighbouring_blocks_are_independent(make):
    z = make().normal(4 * BLOCK)
    blocks = z.reshape(4, 2, BLOCK // 2)  # Box-Muller puts the partners of a pair in a block's two halves
    bound = 5 / np.sqrt(BLOCK // 2)
    halves = blocks.reshape(8, -1)
    for value in (halves, halves**2):  # their squares share a radius if the angle is not uniform
        correlation = np.corrcoef(value) - np.eye(8)
        assert np.abs(correlation).max() < bound
    assert np.abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 5 / np.sqrt(len(z))


@both
def test_gaussian_has_the_deviation_shape_and_type_that_were_asked(make):
    like = torch.zeros(200, 201, dtype=torch.float32)
    drawn = make().gaussian(like, 2.5)
    assert (drawn.shape, drawn.dtype, drawn.device) == (like.shape, like.dtype, like.device)
    assert looks_standard_normal(drawn.double().numpy().ravel() / 2.5)
    assert make().gaussian(torch.zeros((), dtype=torch.float64), 1.0).shape == ()


def test_a_hardened_normal_is_half_the_sum_of_four():
    def stream() -> Callable[[int], bytes]:
        return np.random.default_rng(7).bytes

    source = NoiseSource(stream(), hardened=False)
    expected = sum(source.normal(1000) for _ in range(4)) / 2
    assert NoiseSource(stream(), hardened=True).normal(1000) == pytest.approx(expected, rel=1e-12)
    assert noise.secure().hardened


# Streams


def test_two_secure_sources_do_not_share_a_stream():
    drawn = np.concatenate([noise.secure().uniform(1000) for _ in range(20)])
    assert len(np.unique(drawn)) == len(drawn)


def test_a_secure_source_never_repeats_itself():
    source = noise.secure()
    assert len(np.unique(np.concatenate([source.uniform(1000) for _ in range(20)]))) == 20_000


def test_another_process_draws_another_stream():
    draw = "from common.privacy import noise; print(noise.secure().uniform(50).tolist())"
    runs = [subprocess.run([sys.executable, "-c", draw], cwd=ROOT, capture_output=True, check=True) for _ in range(2)]
    assert len({run.stdout for run in runs}) == 2


# Torch has threads by now; the child only draws and leaves.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_does_not_repeat_its_parents_stream():
    source = noise.secure()
    source.uniform(3)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, source.uniform(100).tobytes())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        theirs = np.frombuffer(pipe.read())
    os.waitpid(child, 0)
    assert len(theirs) == 100
    assert not np.intersect1d(theirs, source.uniform(100)).size


def test_a_seed_repeats_its_stream():
    assert (noise.seeded(3, 4).normal(100) == noise.seeded(3, 4).normal(100)).all()
    assert noise.seeded(3, 4).integer() == noise.seeded(3, 4).integer()


def test_other_seeds_give_other_streams():
    # numpy alone takes (1,) and (1, 0), and (0, 1) and (2^32, 0), for the same seed.
    seeds = [(0,), (1,), (1, 0), (0, 1), (2**32, 0), (0, 0), (1, 2), (2, 1), (12,), (2**63 - 1, 5)]
    drawn = np.concatenate([noise.seeded(*seed).uniform(100) for seed in seeds])
    assert len(np.unique(drawn)) == len(drawn)


# Rows


@both
def test_uniforms_are_uniform(make):
    assert stats.kstest(make().uniform(N), "uniform").pvalue > 1e-7


@pytest.mark.parametrize("byte, expected", [(b"\x00", 2.0**-53), (b"\xff", 1.0)])
def test_a_uniform_is_never_0_and_at_most_1(byte, expected):
    # The logarithm of 0 would be an infinite noise.
    source = NoiseSource(lambda size: byte * size, hardened=False)
    assert source.uniform(4).tolist() == [expected] * 4
    assert np.isfinite(source.normal(4)).all()


@both
def test_each_row_is_drawn_at_the_rate_and_independently_of_the_others(make):
    source, rate, rows, draws = make(), 0.3, 50, 4000
    drawn = np.zeros((draws, rows))
    for i in range(draws):
        drawn[i, source.poisson_sample(rows, rate)] = 1
    deviation = np.sqrt(rate * (1 - rate) / draws)
    assert np.abs(drawn.mean(axis=0) - rate).max() < 6 * deviation
    assert np.abs(drawn.mean() - rate) < 5 * deviation / np.sqrt(rows)
    correlation = np.corrcoef(drawn, rowvar=False) - np.eye(rows)
    assert np.abs(correlation).max() < 6.5 / np.sqrt(draws)
    # A batch of fixed size would have no variance; Poisson batches have n q (1 - q) = 10.5.
    assert drawn.sum(axis=1).var() == pytest.approx(rows * rate * (1 - rate), rel=0.15)


@both
def test_rate_1_takes_every_row_and_no_rows_give_none(make):
    assert make().poisson_sample(1000, 1.0).tolist() == list(range(1000))
    assert make().poisson_sample(0, 0.5).tolist() == []


# Counts


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 2.0])
def test_the_two_sided_geometric_has_its_distribution(epsilon):
    source, n = noise.seeded(11), 20_000
    drawn = np.array([source.two_sided_geometric(epsilon) for _ in range(n)])

    def p_value(scale: float) -> float:
        reach = int(4 / epsilon)  # beyond it, two bins for the tails
        k = np.arange(-reach, reach + 1)
        ratio = np.exp(-scale)
        inner = (1 - ratio) / (1 + ratio) * ratio ** np.abs(k)
        tail = (1 - inner.sum()) / 2
        observed = [(drawn < -reach).sum(), *((drawn == i).sum() for i in k), (drawn > reach).sum()]
        return float(stats.chisquare(observed, n * np.array([tail, *inner, tail])).pvalue)

    assert p_value(epsilon) > 1e-3
    assert p_value(epsilon * 1.1) < 1e-7


def test_a_count_with_noise_is_epsilon_private_to_look_at():
    # Over the outcomes that are common, no count is more than e^epsilon likelier than its neighbour.
    source, n = noise.seeded(12), 40_000
    drawn = np.array([source.two_sided_geometric(1.0) for _ in range(n)])
    for k in range(-3, 4):
        here, there = (drawn == k).sum(), (drawn + 1 == k).sum()
        assert abs(np.log(here / there)) <= 1.0 + 5 * np.sqrt(1 / here + 1 / there)


def test_a_geometric_has_no_end_that_a_float_would_give_it():
    # At epsilon 1 the part below 1 is 0, and each whole 1 is a coin of exp(-1), here won 60 times in a row.
    won, lost, positive = [0, 0, 1], [0, 1], [0]
    draws = iter([0, 0, *won * 60, *lost, *positive])
    assert geometric.two_sided_geometric(1.0, lambda limit: next(draws)) == 60


@pytest.mark.parametrize("limit", [1, 2, 3, 255, 256, 257, 10**20])
def test_whole_numbers_below_a_limit_are_uniform(limit):
    drawn = np.array([noise.seeded(9, i)._below(limit) for i in range(400)], dtype=object)
    assert all(0 <= k < limit for k in drawn)
    share = np.array([float(k / limit) for k in drawn])
    assert abs(share.mean() - (limit - 1) / limit / 2) < 5 * np.sqrt(1 / 12 / len(drawn))


@both
def test_integers_fill_63_bits(make):
    source = make()
    drawn = [source.integer() for _ in range(2000)]
    assert all(0 <= i < 2**63 for i in drawn)
    assert len(set(drawn)) == len(drawn)
    assert stats.kstest(np.array(drawn, np.float64) / 2.0**63, "uniform").pvalue > 1e-7
