"""`cloister audit`: what private training claims, measured on this machine, with made-up rows.

Each trial is a real private step (dpsgd.py) of a linear model on made-up rows, with or without one more, the
canary, whose clipped gradient lies in a coordinate of its own. So a trial is one number: noise, and 1 if the canary was
in the batch. Six checks look at many of them:

    bound         at sampling rate 1, who guesses "it was in" above 1/2 has true and false positives, which bound mu of
                  Gaussian differential privacy from below (Clopper and Pearson 1934; Dong, Roth, Su 2022,
                  arXiv:1905.02383; Nasr et al. 2023, arXiv:2302.07956), and so epsilon
    noise         without the canary: is the variance the charged one, or less? chi-square
    distribution  with it, at the plan's own rate: the mixture of both cases? Kolmogorov and Smirnov
    mean          with it: the sampling rate?
    batches       do rows come independently, so that a batch's size has a binomial's variance? chi-square, both sides
    pairs         ... and so that any two rows come together as often as chance has it? the least of all pairs' exact
                  binomial p-values, by Bonferroni
    steps         does a row come in a second step as often if it came in the first? exact binomial
    bits          is all that leaves on the lattice of whole numbers, and does this machine compute exactly?
    fresh         do two trainings draw different noise?

False alarms: each of the `BY_CHANCE` p-values fails below `ALARM` / `BY_CHANCE`, and the bound is one of confidence
1 - `ALARM`, so a sound machine fails with a probability of at most 2 `ALARM` = 0.2 %. The other two do not depend on
chance, but for 1 in 10^7.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.device import is_exact
from client.training.dpsgd import fit_privately
from client.training.kernel import BITS
from client.training.recipe import DPSGD
from common.document.federation import Training
from common.model.mlp import MLP
from common.privacy.noise import NoiseSource
from common.privacy.releases import calibrate

EPSILON, DELTA = 4.0, 1e-5  # what the audited steps claim
RATE, STEPS = 0.25, 8  # the plan of which single steps are looked at
ROWS, INPUTS, BATCH, CLIP = 24, 5, 16, 1.0
LEARNING_RATE = 2.0**-20  # with BATCH a power of two: what left can be read from the model exactly
ALARM = 1e-3
BY_CHANCE = 6  # so many checks are p-values
Numbers = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was measured. `value` is a p-value, a bound or a count, as `measured` says in words."""

    name: str
    measured: str
    claimed: str
    value: float
    passed: bool


def audit(source: Callable[[], NoiseSource], *, trials: int) -> list[Check]:
    """All checks, with `trials` trainings on either side of each question, every one with a source of its own."""
    once = DPSGD(
        steps=1,
        sampling_rate=1.0,
        clip=CLIP,
        noise_multiplier=calibrate(EPSILON, DELTA, sampling_rate=1.0, steps=1),
        expected_batch_size=BATCH,
    )
    planned = DPSGD(
        steps=1,
        sampling_rate=RATE,
        clip=CLIP,
        noise_multiplier=calibrate(EPSILON, DELTA, sampling_rate=RATE, steps=STEPS),
        expected_batch_size=BATCH,
    )
    rows, with_canary = _tables()
    released: list[Numbers] = []
    without, present = (_observe(source, table, once, trials, released) for table in (rows, with_canary))
    sampled_without, sampled = (_observe(source, table, planned, trials, released) for table in (rows, with_canary))
    return [
        _bound(without, present),
        *_fits(sampled_without, sampled, planned.noise_multiplier),
        *_inclusion(source, max(200, trials // 5)),
        _bits(released),
        _fresh(source, rows, planned),
    ]


def _tables() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Rows that leave one coordinate alone, and the same with the canary, which is in that one."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.uniform(-1, 1, (ROWS, INPUTS)))
    x[:, 3] = 0.0
    y = torch.from_numpy(rng.integers(0, 2, ROWS))
    canary = torch.zeros(1, INPUTS, dtype=torch.float64)
    canary[0, 3] = 1e3
    return (x, y), (torch.cat([x, canary]), torch.cat([y, torch.ones(1, dtype=torch.int64)]))


def _train(source: NoiseSource, table: tuple[Tensor, Tensor], dpsgd: DPSGD) -> Numbers:
    """What one private step releases, in units of the clip: [outputs, inputs + 1], read from the model exactly."""
    x, y = table
    model = MLP(x.shape[1], (), 2).double()
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    training = Training(rounds=1, local_steps=1, batch_size=BATCH, learning_rate=LEARNING_RATE)
    fit_privately(model, x, y, training=training, dpsgd=dpsgd, noise=source, proximal_mu=0.0)
    ((weight, bias),) = model.weights()
    told: Numbers = torch.cat([weight, bias[:, None]], 1).numpy() * (-BATCH / LEARNING_RATE / CLIP)
    return told


def _observe(
    source: Callable[[], NoiseSource], table: tuple[Tensor, Tensor], dpsgd: DPSGD, trials: int, released: list[Numbers]
) -> Numbers:
    """[trials] of the canary's coordinate: its error is (1/2, -1/2), so it stands in the two outputs' difference."""
    found = [_train(source(), table, dpsgd) for _ in range(trials)]
    released += found
    return np.array([(told[0, 3] - told[1, 3]) / math.sqrt(2) for told in found])


def _bound(without: Numbers, present: Numbers) -> Check:
    from scipy.stats import beta, norm

    true, false, n = int((present > 0.5).sum()), int((without > 0.5).sum()), len(present)
    low = beta.ppf(ALARM / 2, true, n - true + 1) if true else 0.0
    high = beta.ppf(1 - ALARM / 2, false + 1, n - false) if false < n else 1.0
    found = _epsilon_of(float(norm.ppf(low) - norm.ppf(high)))
    return Check(
        name="bound",
        measured=f"epsilon is at least {found:.2f}, by {true} right and {false} wrong guesses of {n}",
        claimed=f"at most {EPSILON:g} at delta {DELTA:g}",
        value=found,
        passed=found <= EPSILON,
    )


def _epsilon_of(mu: float) -> float:
    """The epsilon of mu-Gaussian differential privacy at `DELTA` (Dong, Roth, Su 2022, corollary 1)."""
    from scipy.stats import norm

    if not mu > 0:
        return 0.0
    low, high = 0.0, 200.0
    for _ in range(60):
        middle = (low + high) / 2
        delta = norm.cdf(mu / 2 - middle / mu) - math.exp(middle + norm.logcdf(-mu / 2 - middle / mu))
        low, high = (middle, high) if delta > DELTA else (low, middle)
    return low


def _fits(without: Numbers, sampled: Numbers, noise: float) -> list[Check]:
    """Is it the mechanism that was charged?"""
    from scipy.stats import chi2, kstest, norm

    n = len(without)
    little = float(chi2.cdf(((without / noise) ** 2).sum(), n))
    mixture = float(
        kstest(sampled, lambda v: (1 - RATE) * norm.cdf(v / noise) + RATE * norm.cdf((v - 1) / noise)).pvalue
    )
    deviation = math.sqrt((noise**2 + RATE * (1 - RATE)) / n)
    mean = float(2 * norm.sf(abs(sampled.mean() - RATE) / deviation))
    return [
        _by_chance("noise", f"{without.std():.3f} clips", f"{noise:.3f} clips or more", little),
        _by_chance("distribution", "updates with the canary", f"noise, and 1 clip at rate {RATE:g}", mixture),
        _by_chance("mean", f"{sampled.mean():.3f} clips", f"the rate, {RATE:g}", mean),
    ]


def _by_chance(name: str, measured: str, claimed: str, p: float) -> Check:
    return Check(name=name, measured=f"{measured} (p {p:.1e})", claimed=claimed, value=p, passed=p >= ALARM / BY_CHANCE)


def _inclusion(source: Callable[[], NoiseSource], trainings: int) -> list[Check]:
    """Does each row come into each of two steps by itself?"""
    from scipy.stats import binom, chi2

    rows, steps = 64, 2
    quiet = DPSGD(steps=steps, sampling_rate=RATE, clip=CLIP, noise_multiplier=1e-5, expected_batch_size=BATCH)
    table = torch.eye(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.int64)
    # A row that comes moves its coordinate by half a clip. [trainings, rows] of 0, 1 and 2.
    times = np.array([np.rint(2 * np.abs(_train(source(), table, quiet)[0, :rows])) for _ in range(trainings)])

    sizes, mean, variance = times.sum(1), steps * rows * RATE, steps * rows * RATE * (1 - RATE)
    spread = float(chi2.cdf(((sizes - mean) ** 2).sum() / variance, trainings))
    came = times > 0
    together = (came[:, :, None] & came[:, None, :]).sum(0)[np.triu_indices(rows, 1)]
    chance = (1 - (1 - RATE) ** steps) ** 2
    twice, both = int((times > 1).sum()), RATE**2

    def two_sided(k: NDArray[np.int64] | int, n: int, rate: float) -> NDArray[np.float64]:
        tail: Numbers = 2 * np.minimum(binom.cdf(k, n, rate), binom.sf(np.asarray(k) - 1, n, rate))
        return tail

    pairs = float(two_sided(together, trainings, chance).min()) * len(together)
    return [
        _by_chance(
            "batches",
            f"{sizes.mean():.1f} rows in {steps} steps, variance {sizes.var():.1f}",
            f"{mean:g} rows, variance {variance:g}",
            2 * min(spread, 1 - spread),
        ),
        _by_chance(
            "pairs",
            f"two rows come together in {together.min()} to {together.max()} of {trainings}",
            f"each two in {trainings * chance:.0f} or so",
            min(1.0, pairs),
        ),
        _by_chance(
            "steps",
            f"a row comes twice in {twice} of {times.size}",
            f"in {times.size * both:.0f} or so",
            min(1.0, float(two_sided(twice, times.size, both))),
        ),
    ]


def _bits(released: list[Numbers]) -> Check:
    off = sum(int((told * 4.0**BITS != np.rint(told * 4.0**BITS)).sum()) for told in released)
    exact = is_exact(torch.device("cpu"))
    return Check(
        name="bits",
        measured=f"{off} of {sum(told.size for told in released)} numbers off the lattice; arithmetic "
        + ("exact" if exact else "NOT exact"),
        claimed="none; exact",
        value=float(off),
        passed=off == 0 and exact,
    )


def _fresh(source: Callable[[], NoiseSource], table: tuple[Tensor, Tensor], dpsgd: DPSGD) -> Check:
    empty = table[0][:0], table[1][:0]
    one, other = (_train(source(), empty, dpsgd) for _ in range(2))
    same = int((one == other).sum())
    return Check(
        name="fresh",
        measured=f"two trainings share {same} of {one.size} numbers",
        claimed="none",
        value=float(same),
        passed=same == 0,
    )
