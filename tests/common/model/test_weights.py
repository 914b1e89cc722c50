from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from common.model.weights import check_fit, initial_weights, is_finite
from tests.support import federation


def test_first_weights_are_spread_as_torch_spreads_them():
    state = initial_weights(federation(model__hidden=[4000]))
    torch.manual_seed(0)
    for i, (inputs, outputs) in enumerate([(5, 4000), (4000, 2)]):
        layer = torch.nn.Linear(inputs, outputs)
        for kind in ("weight", "bias"):
            ours, theirs = state[f"layers.{i}.{kind}"], getattr(layer, kind).detach().numpy()
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            assert np.abs(ours).max() <= 1 / math.sqrt(inputs)
            if ours.size > 1000:  # the variance of n uniforms is within 6 sd of its own spread, sqrt(0.8 / n) of it
                assert np.var(ours) == pytest.approx(1 / (3 * inputs), rel=6 * math.sqrt(0.8 / ours.size))
                assert np.var(theirs) == pytest.approx(np.var(ours), rel=12 * math.sqrt(0.8 / ours.size))


def test_equal_seeds_give_equal_weights_and_other_seeds_others():
    first = initial_weights(federation(training__seed=7))["layers.0.weight"]
    assert_array_equal(first, initial_weights(federation(), seed=7)["layers.0.weight"])
    assert not (first == initial_weights(federation(training__seed=8))["layers.0.weight"]).any()


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found(odd):
    state = {"w": np.ones((3, 5), np.float32), "b": np.zeros(3, np.float32)}
    assert is_finite(state)
    state["b"][2] = odd
    assert not is_finite(state)


def _without_the_last(state):
    return dict(list(state.items())[:-1])


@pytest.mark.parametrize(
    "change, problem",
    [
        (_without_the_last, "names or shapes of the arrays"),
        (lambda state: {**state, "more": np.zeros(3, np.float32)}, "names or shapes of the arrays"),
        (lambda state: {**state, "layers.0.bias": state["layers.0.bias"][None]}, "names or shapes of the arrays"),
        (lambda state: {**state, "layers.0.bias": state["layers.0.bias"].astype(np.float64)}, "weights are float32"),
    ],
)
def test_arrays_that_are_not_the_models_do_not_fit(change, problem):
    state = initial_weights(federation())
    check_fit(dict(reversed(state.items())), federation())  # names tell them apart, not their order
    with pytest.raises(ValueError, match=problem):
        check_fit(change(state), federation())
