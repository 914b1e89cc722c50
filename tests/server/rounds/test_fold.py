from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.model.weights import Weights
from server.rounds import fold as folding
from server.rounds.fold import Fold

LIKE: Weights = {"w": np.zeros((3, 5), np.float32), "b": np.zeros(3, np.float32), "scalar": np.zeros((), np.float32)}


def states(number: int, *, spread: int = 12) -> list[Weights]:
    """Numbers of very different sizes, whose sum in doubles depends on its order."""
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(rng.normal(size=shape) * 10.0 ** rng.integers(-spread, spread, shape), np.float32)

    return [{name: draw(array.shape) for name, array in LIKE.items()} for _ in range(number)]


def folded(parts: list[Weights], weights: list[float]) -> Weights:
    fold = Fold(LIKE)
    for part, weight in zip(parts, weights, strict=True):
        fold.add(part, weight)
    return fold.mean()


def test_the_mean_is_the_exact_one_rounded_once():
    parts, weights = states(40), [float(w) for w in range(1, 41)]
    mean = folded(parts, weights)
    for name, array in mean.items():
        assert (array.shape, array.dtype) == (LIKE[name].shape, np.float32)
        for index in np.ndindex(array.shape):
            exact = sum(Fraction(float(p[name][index])) * int(w) for p, w in zip(parts, weights, strict=True)) / 820
            assert array[index] == np.float32(float(exact))


@given(st.permutations(range(12)))
def test_the_order_of_the_replies_changes_no_bit(order):
    parts, weights = states(12), [0.1 * (w + 1) for w in range(12)]
    first = folded(parts, weights)
    again = folded([parts[i] for i in order], [weights[i] for i in order])
    assert all(np.array_equal(first[name], again[name]) for name in LIKE)


@given(st.permutations(range(12)), st.integers(1, 11))
def test_folds_that_are_merged_have_the_bits_of_one(order, cut):
    parts, weights = states(12), [0.1 * (w + 1) for w in range(12)]
    one, other = Fold(LIKE), Fold(LIKE)
    for fold, some in ((one, order[:cut]), (other, order[cut:])):
        for i in some:
            fold.add(parts[i], weights[i])
    one.merge(other)
    whole, merged = folded(parts, weights), one.mean()
    assert all(np.array_equal(whole[name], merged[name]) for name in LIKE)
    assert len(one) == 12


def flat(parts: list[Weights]) -> np.ndarray:
    rows = [np.concatenate([array.reshape(-1) for array in part.values()]) for part in parts]
    return np.array(rows, np.float32).reshape(len(parts), sum(array.size for array in LIKE.values()))


@given(st.permutations(range(12)), st.lists(st.integers(0, 12), max_size=4), st.integers(1, 40))
def test_states_added_several_at_a_time_have_the_bits_of_one_after_another(order, cuts, block):
    parts, weights = states(12), np.array([0.1 * (w + 1) for w in range(12)])
    whole, fold = folded(parts, weights.tolist()), Fold(LIKE)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(folding, "BLOCK", block)
        several = Fold(LIKE)
        for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 12], strict=True):
            some = order[start:end]
            for into in (several, fold):
                into.add_all(flat([parts[i] for i in some]), weights[some])
    for into in (several, fold):
        assert all(np.array_equal(whole[name], into.mean()[name]) for name in LIKE)
        assert len(into) == 12


def test_what_cancels_between_folds_leaves_what_was_small():
    # 1e30 + 3 - 1e30 + 5, of weight 1 each: a mean of 2, though no double holds 1e30 + 3.
    one, other = Fold({"w": np.zeros(1, np.float32)}), Fold({"w": np.zeros(1, np.float32)})
    for fold, values in ((one, (1e30, 3.0)), (other, (-1e30, 5.0))):
        for value in values:
            fold.add({"w": np.array([value], np.float32)}, 1.0)
    one.merge(other)
    assert one.mean()["w"].tolist() == [2.0]


def test_plain_doubles_would_depend_on_the_order():
    values = np.array([np.concatenate([np.ravel(a) for a in part.values()]) for part in states(12)], np.float64)
    sums = {np.cumsum(np.random.default_rng(seed).permutation(values), axis=0)[-1].tobytes() for seed in range(20)}
    assert len(sums) > 1


@pytest.mark.parametrize("block", [1, 2, 7, 1000])
def test_blocks_are_a_matter_of_speed_alone(monkeypatch, block):
    parts, weights = states(5), [1.0] * 5
    expected = folded(parts, weights)
    monkeypatch.setattr(folding, "BLOCK", block)
    again = folded(parts, weights)
    assert all(np.array_equal(expected[name], again[name]) for name in LIKE)


def test_one_reply_is_its_own_mean_whatever_it_weighs():
    (part,) = states(1)
    assert all(np.array_equal(folded([part], [w])[n], part[n]) for n in LIKE for w in (1.0, 3.0, 1e12))


def test_a_mean_of_means_is_the_mean():
    parts, weights = states(9, spread=1), [float(w) for w in range(1, 10)]
    halves = [(parts[:4], weights[:4]), (parts[4:], weights[4:])]
    again = folded([folded(*half) for half in halves], [sum(half[1]) for half in halves])
    whole = folded(parts, weights)
    assert all(np.allclose(again[name], whole[name], rtol=1e-6) for name in LIKE)


def test_the_mean_of_nothing_is_an_error():
    with pytest.raises(ZeroDivisionError, match="the mean of no replies"):
        Fold(LIKE).mean()


def test_the_sum_of_the_weights_is_exactly_rounded():
    fold = Fold(LIKE)
    for weight in [1e12, 1e-3, 1.0, 1e-3]:
        fold.add(states(1)[0], weight)
    assert fold.weight == math.fsum([1e12, 1e-3, 1.0, 1e-3])
    assert len(fold) == 4


def test_memory_does_not_grow_with_the_replies():
    like = {"w": np.zeros(200_000, np.float32)}
    one = {"w": np.ones(200_000, np.float32)}

    def peak(replies: int) -> int:
        tracemalloc.start()
        fold = Fold(like)
        for _ in range(replies):
            fold.add(one, 1.0)
        fold.mean()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(60) < 1.05 * peak(3) < 45 * 200_000
