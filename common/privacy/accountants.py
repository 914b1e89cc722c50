"""The two accountants: numerical composition of privacy loss distributions (PLD), and Rényi DP (RDP).

Both compose noisy sums of Poisson-sampled rows, under adding or removing one row. With sampling rate q and noise
multiplier s, removing a row compares P = (1 - q) N(0, s^2) + q N(1, s^2) with Q = N(0, s^2), and adding one compares
Q with P; what is returned covers both. Both are upper bounds, with nothing but float64's rounding left out.

PLD: one step's privacy loss is put on a mesh by connecting the dots of its hockey-stick curve (Doroshenko, Ghazi,
Kamath, Kumar, Manurangsi 2022, arXiv:2207.04380): between neighbouring mesh points, mass goes to both so that its
probability under P and under Q stay what they were. The pair of distributions on the mesh dominates the true one, and
domination survives composition (Zhu, Dong, Wang 2022, arXiv:2106.08567, theorem 10), also of adaptively chosen
mechanisms, as long as the parameters are fixed beforehand. Steps compose by FFT. It computes the same figure as
Opacus' PRV accountant (Gopi, Lee, Wutschitz 2021, arXiv:2106.02848), without that one's error of 0.01.

RDP: Mironov 2017, arXiv:1702.07476; for this mechanism Mironov, Talwar, Zhang 2019, arXiv:1908.10530, equation 3.

Only numpy is needed, so that whoever asks for a figure does not wait for torch to load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
History = tuple[tuple[float, float, int], ...]  # (noise multiplier, sampling rate, steps)

ORDERS = (*range(2, 64), 72, 80, 96, 128, 192, 256, 384, 512, 1024)  # whole ones have a closed form

MESH = 1 / 32  # of a step's standard deviation; the bound is then loose by less than 0.1 %
MOST_CELLS = 2**21
MOST_STEP_CELLS = 2**17
SMALLEST_DELTA = 1e-9  # below it, FFT's rounding could show
ROUNDING = 1e-11, 1e-15  # probability set aside for that rounding: at least, and a step
REACH = 9.5  # standard deviations of a step that get cells; beyond lies less than 10^-20


def rdp_epsilon(history: History, delta: float, orders: Sequence[int] = ORDERS) -> float:
    """The least epsilon over some of `ORDERS` (Canonne, Kamath, Steinke 2020, arXiv:2004.00010, proposition 12)."""
    places = [ORDERS.index(order) for order in orders]
    return converted(divergences(history)[places], delta, orders)


def divergences(history: History) -> Floats:
    """The Rényi divergence at each of `ORDERS`."""
    found: Floats = np.zeros(len(ORDERS))
    for sigma, rate, steps in history:
        found = found + steps * _rdp_of_step(sigma, rate)
    return found


def converted(divergence: Floats, delta: float, orders: Sequence[int] = ORDERS) -> float:
    """The least epsilon of divergences at these orders (Canonne, Kamath, Steinke 2020, proposition 12)."""
    alpha = np.array(orders, dtype=float)
    found = divergence + np.log1p(-1 / alpha) - (math.log(delta) + np.log(alpha)) / (alpha - 1)
    return max(0.0, float(np.min(found)))


@lru_cache(maxsize=1024)
def _rdp_of_step(sigma: float, rate: float) -> Floats:
    """The Rényi divergence of one step at each of `ORDERS`."""
    if rate == 1.0:
        return np.array(ORDERS) / (2 * sigma**2)
    logs = np.cumsum([0.0, *np.log(np.arange(1, ORDERS[-1] + 1))])  # of factorials
    found = []
    for order in ORDERS:
        k = np.arange(order + 1)
        terms = logs[order] - logs[k] - logs[order - k] + (order - k) * math.log1p(-rate) + k * math.log(rate)
        terms += k * (k - 1) / (2 * sigma**2)
        found.append(float(np.logaddexp.reduce(terms)) / (order - 1))
    return np.array(found)


def pld_epsilon(history: History, delta: float) -> float:
    """The least epsilon for which all steps together are (epsilon, delta)-private.

    Below a delta of `SMALLEST_DELTA`, or after very many steps, it is RDP's, since rounding errors could show.
    """
    if delta < SMALLEST_DELTA or delta < 10 * _rounding(history):
        return rdp_epsilon(history, delta)
    return max(epsilon_one_way(history, delta, removed) for removed in (True, False))


def _rounding(history: History) -> float:
    return max(ROUNDING[0], ROUNDING[1] * sum(n for *_, n in history))


def epsilon_one_way(history: History, delta: float, removed: bool) -> float:
    tail = delta / 1e4
    spreads = [_spread(sigma, rate) for sigma, rate, _ in history]
    total = math.sqrt(sum(n * s**2 for s, (*_, n) in zip(spreads, history, strict=True)))
    widest = max(float(np.ptp(_loss(_ends(sigma), sigma, rate))) for sigma, rate, _ in history)
    mesh = max(MESH * min(spreads), 40 * total / MOST_CELLS, widest / MOST_STEP_CELLS)
    steps = [_step(sigma, rate, mesh, removed) for sigma, rate, _ in history]
    counts = [n for *_, n in history]
    low, high = _window([s[:2] for s in steps], counts, mesh, total, tail)
    cells = max(16, 1 << (high - low).bit_length())
    if cells > 4 * MOST_CELLS:  # nothing is left to protect, or to state precisely
        return rdp_epsilon(history, delta)
    spectrum: NDArray[np.complex128] = np.ones(cells // 2 + 1, dtype=complex)
    first, finite = 0, 1.0
    for (start, mass, infinite), n in zip(steps, counts, strict=True):
        spectrum *= np.fft.rfft(_folded(mass, cells)) ** n
        first += n * start
        finite *= (1 - infinite) ** n
    composed = np.maximum(np.fft.irfft(spectrum, cells), 0.0)
    composed = np.roll(composed, (first - low) % cells)  # cell 0 is now `low`
    losses: Floats = mesh * np.arange(low, low + cells, dtype=np.float64)
    return _solve(losses, composed, delta - tail - _rounding(history) - (1 - finite))


def _solve(loss: Floats, mass: Floats, delta: float) -> float:
    """The epsilon at which the sum of mass (1 - e^(epsilon - loss)), over losses above epsilon, is delta."""
    loss, mass = loss[loss > 0], mass[loss > 0]

    def beyond(place: int) -> tuple[float, float]:
        """Probability of the losses from `place` on, under P, and e^loss[place] times that under Q."""
        rest = mass[place:]
        return float(rest.sum()), float(rest @ np.exp(loss[place] - loss[place:]))

    low, high = -1, len(loss) - 1  # delta is exceeded at low's loss (or 0), and met at high's
    while high - low > 1:
        middle = (low + high) // 2
        p, q = beyond(middle)
        low, high = (middle, high) if p - q > delta else (low, middle)
    p, q = beyond(high)
    if p <= delta or q <= 0.0:
        return 0.0 if low < 0 else float(loss[high])
    return max(0.0, float(loss[high] + math.log((p - delta) / q)))


def _window(
    steps: Sequence[tuple[int, Floats]], counts: Sequence[int], mesh: float, total: float, tail: float
) -> tuple[int, int]:
    """Cells between which the sum of all losses lies, but for probability `tail` on either side (Chernoff)."""
    rates = np.geomspace(0.05, 200, 28) / total
    bounds = []
    for sign in (1, -1):
        cumulants, widest = np.zeros(len(rates)), 0.0
        for (start, mass), n in zip(steps, counts, strict=True):
            # Eight cells as one, at the largest of their losses: quicker, and still a bound.
            loss = sign * (start + np.arange(-(-len(mass) // 8)) * 8 + (7 if sign > 0 else 0)) * mesh
            blocks = np.pad(mass, (0, -len(mass) % 8)).reshape(-1, 8).sum(axis=1)
            top = float(loss.max())  # taken out of the exponent, so that nothing overflows
            widest += n * top
            moments = np.exp(rates[:, None] * (loss - top)[None, :]) @ blocks
            with np.errstate(divide="ignore"):  # a rate at which all has vanished bounds nothing
                cumulants += n * np.where(moments > 0, np.log(moments) + rates * top, np.inf)
        bounds.append(sign * min(widest, float(np.min((cumulants - math.log(tail)) / rates))))
    return math.floor(bounds[1] / mesh) - 1, math.ceil(bounds[0] / mesh) + 1


def _folded(mass: Floats, cells: int) -> Floats:
    """`mass` around a circle of `cells`."""
    padded = np.zeros(-(-len(mass) // cells) * cells)
    padded[: len(mass)] = mass
    folded: Floats = padded.reshape(-1, cells).sum(axis=0)
    return folded


@lru_cache(maxsize=256)
def _spread(sigma: float, rate: float) -> float:
    """The standard deviation of one step's privacy loss under P."""
    x = np.linspace(-REACH * sigma, 1 + REACH * sigma, 4001)
    weight = (1 - rate) * np.exp(-(x**2) / (2 * sigma**2)) + rate * np.exp(-((x - 1) ** 2) / (2 * sigma**2))
    weight /= weight.sum()
    loss = _loss(x, sigma, rate)
    return math.sqrt(max(float(weight @ (loss - weight @ loss) ** 2), 1e-24))


def _ends(sigma: float) -> Floats:
    """The outputs between which cells are kept."""
    return np.array([-REACH * sigma, 1 + REACH * sigma])


def _loss(x: Floats, sigma: float, rate: float) -> Floats:
    """log P(x) / Q(x)."""
    shift = (2 * x - 1) / (2 * sigma**2)
    return shift if rate == 1.0 else np.logaddexp(math.log1p(-rate), math.log(rate) + shift)


def _output(loss: Floats, sigma: float, rate: float) -> Floats:
    """The x of that loss; -inf below log(1 - rate), which no x falls short of."""
    with np.errstate(divide="ignore", invalid="ignore"):
        near = np.log(np.maximum(np.expm1(np.minimum(loss, 1.0)) + rate, 0.0))
        far = loss + np.log1p(-(1 - rate) * np.exp(-np.maximum(loss, 1.0)))
        logs = np.where(loss < 1, near, far) - math.log(rate)
    x: Floats = sigma**2 * logs + 0.5
    return x


@lru_cache(maxsize=256)
def _step(sigma: float, rate: float, mesh: float, removed: bool) -> tuple[int, Floats, float]:
    """One step on the mesh: the first cell's number, mass under the first distribution, and that of infinite loss."""
    sign = 1.0 if removed else -1.0
    ends = sign * _loss(_ends(sigma), sigma, rate)
    first, last = math.floor(ends.min() / mesh) - 1, math.ceil(ends.max() / mesh) + 1
    loss = np.arange(first, last + 1) * mesh
    x = _output(sign * loss, sigma, rate)
    low, high = (x[:-1], x[1:]) if removed else (x[1:], x[:-1])
    plain = _normal_between(low / sigma, high / sigma)
    mixed = (1 - rate) * plain + rate * _normal_between((low - 1) / sigma, (high - 1) / sigma)
    p, q = (mixed, plain) if removed else (plain, mixed)
    with np.errstate(over="ignore", invalid="ignore"):
        up = (p - np.exp(loss[:-1]) * q) / -math.expm1(-mesh)
    up = np.clip(np.where(np.isfinite(up), up, p), 0.0, p)
    mass = np.zeros(len(loss))
    mass[1:] += up
    mass[:-1] += p - up
    below, above = (x[0], x[-1]) if removed else (x[-1], x[0])
    outside = [_normal_between(*np.array([[a], [b]]) / sigma) for a, b in ((-np.inf, below), (above, np.inf))]
    shifted = [_normal_between(*(np.array([[a], [b]]) - 1) / sigma) for a, b in ((-np.inf, below), (above, np.inf))]
    if removed:
        outside = [(1 - rate) * o + rate * s for o, s in zip(outside, shifted, strict=True)]
    else:
        outside.reverse()  # the smallest losses are at the largest x
    mass[0] += outside[0][0]  # rounded up, to the smallest loss that has a cell
    return first, mass, float(outside[1][0])


def _normal_between(low: Floats, high: Floats) -> Floats:
    """Probability that a standard normal lies between; exact to rounding in both tails."""
    right = low > 0
    a, b = np.where(right, -high, low), np.where(right, -low, high)  # both tails by the left one
    return np.maximum(_cdf(b) - _cdf(a), 0.0)


def _cdf(x: Floats) -> Floats:
    return 0.5 * np.fromiter(map(math.erfc, (-x / math.sqrt(2)).tolist()), float, len(x))
