"""The MLP, and its state as named arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from common.model import mlp
from common.model.mlp import MLP
from tests.support import federation


@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=5), rows=st.integers(0, 4))
def test_layers_are_as_wide_as_asked(sizes, rows):
    model = MLP(sizes[0], sizes[1:-1], sizes[-1])
    state = mlp.weights_of(model)
    assert [state[f"layers.{i}.weight"].shape for i in range(len(sizes) - 1)] == list(
        zip(sizes[1:], sizes[:-1], strict=True)
    )
    assert [state[f"layers.{i}.bias"].shape for i in range(len(sizes) - 1)] == [(size,) for size in sizes[1:]]
    assert list(state) == [f"layers.{i}.{part}" for i in range(len(sizes) - 1) for part in ("weight", "bias")]
    assert model(torch.zeros(rows, sizes[0])).shape == (rows, sizes[-1])


@pytest.mark.parametrize(
    "activation, function",
    [("relu", lambda z: np.maximum(z, 0)), ("tanh", np.tanh), ("sigmoid", lambda z: 1 / (1 + np.exp(-z)))],
)
def test_the_model_is_the_product_of_its_layers(activation, function):
    model = mlp.build(federation(model__hidden=[6, 4], model__activation=activation))
    w = mlp.weights_of(model)
    x = np.random.default_rng(0).uniform(-1, 1, (7, 5)).astype(np.float32)
    h = function(x @ w["layers.0.weight"].T + w["layers.0.bias"])
    h = function(h @ w["layers.1.weight"].T + w["layers.1.bias"])
    expected = h @ w["layers.2.weight"].T + w["layers.2.bias"]
    np.testing.assert_allclose(model(torch.from_numpy(x)).detach().numpy(), expected, atol=1e-6)


def test_without_hidden_layers_the_model_is_linear():
    model = mlp.build(federation(model__hidden=[]))
    x, y = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x + y) - model(y), model(x) - model(torch.zeros(5)))


def test_dropout_works_in_training_only():
    model = mlp.build(federation(model__hidden=[200], model__dropout=0.9))
    x = torch.ones(1, 5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


def test_dropout_drops_what_the_activation_puts_out():
    model = mlp.build(federation(model__hidden=[8], model__activation="sigmoid", model__dropout=1 - 1e-9))
    torch.testing.assert_close(model(torch.ones(3, 5)), model.layers[-1].bias.expand(3, 2))  # sigmoid(0) is not 0


def test_equal_seeds_give_equal_weights_and_other_seeds_others():
    def weights(**options):
        return mlp.weights_of(mlp.build(federation(training__seed=7), **options))["layers.0.weight"]

    assert_array_equal(weights(), weights())
    assert_array_equal(weights(), weights(seed=7))
    assert not np.array_equal(weights(), weights(seed=8))
    assert mlp.build(federation(training__seed=2**63 - 1))


def test_seed_zero_is_a_seed():
    state = [mlp.weights_of(mlp.build(federation(training__seed=7), seed=seed)) for seed in (0, 7)]
    assert not np.array_equal(state[0]["layers.0.weight"], state[1]["layers.0.weight"])


def test_building_leaves_the_global_generator_as_it_was():
    before = torch.random.get_rng_state()
    mlp.build(federation())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weights_do_not_depend_on_what_was_drawn_before():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = mlp.weights_of(mlp.build(federation()))
        torch.rand(3)
        assert_array_equal(first["layers.0.weight"], mlp.weights_of(mlp.build(federation()))["layers.0.weight"])


@pytest.mark.parametrize("loss, outputs", [("cross_entropy", 2), ("binary_cross_entropy", 1)])
def test_the_federation_gives_the_widths(loss, outputs):
    shapes = [a.shape for a in mlp.weights_of(mlp.build(federation(training__loss=loss))).values()]
    assert shapes == [(8, 5), (8,), (outputs, 8), (outputs,)]


def test_a_numeric_target_takes_one_output():
    regression = federation(schema__target={"name": "y", "bounds": [0, 1]}, training__loss="mse")
    assert mlp.build(regression)(torch.zeros(3, 5)).shape == (3, 1)


def test_state_goes_out_and_in_unchanged():
    source, target = mlp.build(federation(), seed=1), mlp.build(federation(), seed=2)
    state = mlp.weights_of(source)
    assert all(array.dtype == np.float32 for array in state.values())
    mlp.load_weights(target, state)
    x = torch.ones(3, 5)
    assert torch.equal(source(x), target(x))
    for name, array in mlp.weights_of(target).items():
        assert_array_equal(array, state[name])


def test_state_is_a_copy_on_the_way_out_and_in():
    model = mlp.build(federation())
    state = mlp.weights_of(model)
    kept = {name: array.copy() for name, array in state.items()}
    state["layers.0.weight"][:] = 9
    assert_array_equal(mlp.weights_of(model)["layers.0.weight"], kept["layers.0.weight"])
    mlp.load_weights(model, kept)
    kept["layers.0.bias"][:] = 9
    assert not (mlp.weights_of(model)["layers.0.bias"] == 9).any()


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"layers.0.weight": np.zeros((5, 8), np.float32)}, "size mismatch for layers.0.weight"),
        ({"layers.0.weight": np.zeros((8, 6), np.float32)}, "size mismatch for layers.0.weight"),
        ({"layers.0.bias": np.zeros((1, 8), np.float32)}, "size mismatch for layers.0.bias"),
        ({"layers.9.bias": np.zeros(8, np.float32)}, r"Unexpected key\(s\) in state_dict: .layers.9.bias"),
        ({"layers.1.bias": None}, r"Missing key\(s\) in state_dict: .layers.1.bias"),
    ],
)
def test_state_of_another_model_is_refused(change, expected):
    model = mlp.build(federation())
    state = {name: a for name, a in (mlp.weights_of(model) | change).items() if a is not None}
    with pytest.raises(RuntimeError, match=expected):
        mlp.load_weights(model, state)
