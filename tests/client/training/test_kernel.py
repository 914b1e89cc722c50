"""Exact arithmetic is held against autograd and Opacus for what it computes, and against itself, bit for bit, for what
it promises: that a row's part depends on that row alone and is no longer than S."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from opacus import GradSampleModule
from torch import Tensor
from torch.nn import functional

from client.training import kernel
from client.training.kernel import ExactMLP, sensitivity
from common.document.federation import WIDEST
from common.model import mlp, objective
from common.model.mlp import MLP

Layers = list[tuple[Tensor, Tensor]]

LOSSES = ("cross_entropy", "binary_cross_entropy", "mse")
ACTIVATIONS = ("relu", "sigmoid", "tanh")
UNIT = 4.0**-15  # of a clip


def outputs_of(loss: str) -> int:
    return 3 if loss == "cross_entropy" else 1


def draw_layers(rng: np.random.Generator, sizes: list[int], size: float, kind: str) -> Layers:
    """Weights of a kind that a server might choose, float32."""

    def draw(*shape: int) -> Tensor:
        if kind == "equal":
            value = np.full(shape, size)
        elif kind == "wild":  # of all sizes that float32 has, subnormal ones too
            value = rng.choice([-1, 1], shape) * 2.0 ** rng.uniform(-149, 127.9, shape)
        else:
            value = rng.uniform(-1, 1, shape) * size
        return torch.from_numpy(value).to(torch.float32)

    return [(draw(out, fan_in), draw(out)) for fan_in, out in pairwise(sizes)]


def draw_rows(rng: np.random.Generator, rows: int, inputs: int, loss: str, bad: int) -> tuple[Tensor, Tensor]:
    x = rng.uniform(-1, 1, (rows, inputs)).astype(np.float32)
    for _ in range(min(bad, rows)):
        x[rng.integers(rows), rng.integers(inputs)] = rng.choice([np.nan, np.inf, -np.inf, 3e38, 1e-45])
    y = rng.uniform(size=rows).astype(np.float32) if loss == "mse" else rng.integers(0, max(outputs_of(loss), 2), rows)
    return torch.from_numpy(x), torch.from_numpy(y)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def norm_squared(parts: list[Tensor]) -> int:
    return sum(int(v) ** 2 for part in parts for v in part.flatten().tolist())


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


CASES = {
    "seed": st.integers(0, 2**32),
    "hidden": st.lists(st.integers(1, 70), max_size=2),
    "inputs": st.integers(1, 90),
    "loss": st.sampled_from(LOSSES),
    "activation": st.sampled_from(ACTIVATIONS),
    "kind": st.sampled_from(["even", "equal", "wild"]),
    "size": st.sampled_from([0.0, 1e-45, 1e-38, 1e-19, 1e-3, 0.3, 1.0, 30.0, 1e10, 3e38]),
    "bad": st.sampled_from([0, 0, 0, 1, 5]),
    "clip": st.sampled_from([1e-6, 0.3, 1.0, 1e6]),
}


PLAIN = {"loss": "cross_entropy", "activation": "relu", "kind": "even", "size": 0.5, "bad": 0}


def layers_of_case(**drawn: Any) -> Layers:
    sizes = [drawn["inputs"], *drawn["hidden"], outputs_of(drawn["loss"])]
    return draw_layers(np.random.default_rng(drawn["seed"]), sizes, drawn["size"], drawn["kind"])


def case(rows: int, **drawn: Any) -> tuple[ExactMLP, Tensor, Tensor]:
    layers, rng = layers_of_case(**drawn), np.random.default_rng([drawn["seed"], 1])
    x, y = draw_rows(rng, rows, drawn["inputs"], drawn["loss"], drawn["bad"])
    return ExactMLP(layers, activation=drawn["activation"], loss=drawn["loss"]), x, y


# A row's part depends on that row alone


@settings(max_examples=250, deadline=None)
@given(rows=st.integers(0, 300), cut=st.integers(0, 300), workers=st.sampled_from([1, 2]), **CASES)
def test_the_sum_over_all_rows_is_the_sum_of_the_sums_over_any_two_groups(rows, cut, workers, clip, **drawn):
    net, x, y = case(rows, **drawn)
    order = torch.from_numpy(np.random.default_rng(drawn["seed"]).permutation(rows))
    with threads(workers):
        whole = net.clipped_sum(x, y, clip=clip)
    parts = [net.clipped_sum(x[group], y[group], clip=clip) for group in (order[:cut], order[cut:])]
    assert same([a + b for a, b in zip(*parts, strict=True)], whole)


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 12), **CASES)
def test_no_rows_part_is_longer_than_the_sensitivity(rows, clip, **drawn):
    net, x, y = case(rows, **drawn)
    most = math.floor(sensitivity(net.sizes) ** 2)
    for i in range(rows):
        assert norm_squared(net.clipped_sum(x[i : i + 1], y[i : i + 1], clip=clip)) <= most


@settings(max_examples=150, deadline=None)
@given(rows=st.integers(1, 300), **CASES)
def test_a_prediction_depends_on_its_row_alone(rows, clip, **drawn):
    net, x, _ = case(rows, **drawn)
    together = net.predictions(x)
    with threads(2):
        picked = torch.from_numpy(np.random.default_rng(drawn["seed"]).permutation(rows)[:7])
        alone = torch.cat([net.predictions(x[i : i + 1]) for i in picked])
    assert torch.equal(alone.nan_to_num(-1.0), together[picked].nan_to_num(-1.0))


@pytest.mark.parametrize("workers", [1, 2])
def test_weights_that_let_the_order_of_adding_decide_decide_nothing(workers):
    # Sums over the second layer are 0, there and back: pairs of +-1e20 cancel. What floats leave of them depends on
    # the order, and is so large that it decides a unit's sign.
    rng = np.random.default_rng(0)
    signs = [torch.from_numpy(rng.permutation([1.0, -1.0] * 32)) for _ in range(2)]
    layers = [
        (torch.full((64, 3), 0.37), torch.zeros(64)),
        ((torch.outer(*signs) * 1e20).float(), torch.full((64,), 0.3)),
        (torch.tensor([[0.21], [-0.17]]).repeat(1, 64), torch.zeros(2)),
    ]
    net = ExactMLP(layers, activation="tanh", loss="cross_entropy")
    x, y = torch.full((64, 3), 0.5), torch.zeros(64, dtype=torch.int64)
    one = net.clipped_sum(x[:1], y[:1], clip=1.0)
    assert not one[0].any() and one[1].any()  # what comes back through the second layer is exactly 0
    with threads(workers):
        for rows in range(1, 65):
            assert same(net.clipped_sum(x[:rows], y[:rows], clip=1.0), [rows * part for part in one])


@pytest.mark.parametrize("loss", LOSSES)
def test_an_error_has_the_same_bits_alone_and_among_others(loss):
    rng = np.random.default_rng(6)
    for width in range(1, 40) if loss == "cross_entropy" else [1]:
        out = torch.from_numpy(rng.normal(size=(67, width)) * 3)
        y = torch.from_numpy(rng.uniform(size=67) if loss == "mse" else rng.integers(0, width, 67))
        alone = torch.cat([kernel._error(out[i : i + 1], y[i : i + 1], loss) for i in range(67)])
        assert torch.equal(kernel._error(out, y, loss), alone)


def test_the_longest_parts_nearly_reach_the_sensitivity():
    # Else more noise would be added than is needed. Most rows are clipped at 0.01, to 4^15 but for their rounding.
    net, x, y = case(
        40, seed=1, hidden=[20], inputs=30, loss="cross_entropy", activation="relu", kind="even", size=0.3, bad=0
    )
    longest = max(norm_squared(net.clipped_sum(x[i : i + 1], y[i : i + 1], clip=0.01)) for i in range(40))
    assert 0.999 < math.sqrt(longest) / sensitivity(net.sizes) <= 1
    assert 1 < sensitivity(net.sizes) * UNIT < 1.001


def test_the_sensitivity_is_the_bound_of_its_derivation():
    # 784-200-200-10: (2^15 + sqrt(785) / 2) (2^15 + sqrt(410) / 2).
    expected = (32768 + 28.0178 / 2) * (32768 + 20.2485 / 2)
    assert sensitivity([784, 200, 200, 10]) == pytest.approx(expected, rel=1e-8)


def test_rows_are_summed_in_parts_where_a_float_would_not_hold_them(monkeypatch):
    net, x, y = case(
        50, seed=2, hidden=[9], inputs=5, loss="cross_entropy", activation="tanh", kind="even", size=1.0, bad=1
    )
    whole = net.clipped_sum(x, y, clip=0.5)
    monkeypatch.setattr(kernel, "ROWS", 7)
    assert same(net.clipped_sum(x, y, clip=0.5), whole)


def test_partial_sums_stay_within_what_a_float_holds():
    # Of left and right at most 2^31 the squares, so no entry of right x left is above 2^31; and of products on the way.
    assert kernel.ROWS * 2**31 < 2**kernel.EXACT
    for width in (1, 2, 3, 784, 785, 4096, 65_536, WIDEST):
        rows, weights = kernel.row_bits(width), kernel.weight_bits(width)
        assert weights >= rows >= 15
        assert width * 2**rows * 2**weights <= 2**kernel.EXACT
        assert width * 2 ** (2 * rows) <= 2**kernel.EXACT


# Rows that are not finite or out of range


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 7, 64])
def test_a_row_that_is_not_finite_counts_as_zeros(bad, activation, width):
    net, x, y = case(20, seed=3, hidden=[11], inputs=width, **{**PLAIN, "activation": activation})
    without = net.clipped_sum(x, y, clip=1.0)
    for place in range(width):
        spoilt = torch.cat([x, x[:1]])
        spoilt[-1, place] = bad
        assert same(net.clipped_sum(spoilt, torch.cat([y, y[:1]]), clip=1.0), without)


def test_a_row_whose_error_vanishes_spoils_no_other():
    # Logits (700, 0): a row of class 0 has an error of 1e-304, which a weight of 1e-19 makes subnormal on its way back.
    layers = [(torch.full((4, 3), 0.5), torch.zeros(4)), (torch.full((2, 4), 1e-19), torch.tensor([700.0, 0.0]))]
    net = ExactMLP(layers, activation="sigmoid", loss="cross_entropy")
    x = torch.ones(41, 3)
    ones = net.clipped_sum(x[:40], torch.ones(40, dtype=torch.int64), clip=1.0)
    one = net.clipped_sum(x[:1], torch.ones(1, dtype=torch.int64), clip=1.0)
    assert same(ones, [40 * part for part in one])
    mixed = net.clipped_sum(x, torch.tensor([1] * 40 + [0]), clip=1.0)
    assert same(mixed, ones)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_weights_that_explode_make_parts_of_zeros_and_no_error(bad):
    layers = [(torch.full((4, 3), bad), torch.zeros(4)) for _ in range(1)]
    layers += [(torch.full((4, 4), bad), torch.full((4,), bad)) for _ in range(4)]
    net = ExactMLP(layers, activation="relu", loss="cross_entropy")
    sums = net.clipped_sum(torch.ones(5, 3), torch.zeros(5, dtype=torch.int64), clip=1.0)
    assert all(not part.any() for part in sums)
    assert net.predictions(torch.ones(5, 3)).tolist() == [0] * 5


def test_weights_beyond_float32_make_parts_of_zeros():
    # In float64 they could pass the lattice, and be rounded in a product. A message's weights are float32.
    for layers in (
        [(torch.full((4, 3), 2.0**200, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))],
        [(torch.ones(4, 3, dtype=torch.float64), torch.full((4,), 2.0**200, dtype=torch.float64))],
    ):
        net = ExactMLP(layers, activation="relu", loss="cross_entropy")
        assert not net.clipped_sum(torch.ones(5, 3), torch.zeros(5, dtype=torch.int64), clip=1.0)[0].any()
        assert not net.logits(torch.ones(5, 3))[1].any()


@pytest.mark.parametrize("loss", ["mse", "binary_cross_entropy"])
def test_a_thread_that_takes_subnormal_numbers_for_0_moves_no_row(loss):
    # Torch gives what is beyond 32,768 numbers to another thread, which has a mode of its own: one more row moved all.
    layers = [(torch.full((1, 1), 3e38), torch.zeros(1)) for _ in range(2)]
    net = ExactMLP(layers, activation="relu", loss=loss)
    tiny = torch.from_numpy(np.full(40_000, 1e-40, np.float32))
    y = tiny if loss == "mse" else torch.zeros(40_000)

    def run(rows: int) -> list[Tensor]:
        return net.clipped_sum(tiny[:rows, None], y[:rows], clip=1.0)

    with threads(2):
        run(40_000)  # the other thread starts here, without the mode
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor has no such mode")
        try:
            one, less, more = (run(rows) for rows in (1, 32_768, 32_769))
        finally:
            torch.set_flush_denormal(False)
    assert same(more, [a + b for a, b in zip(less, one, strict=True)])


def test_what_is_longer_than_the_sensitivity_is_left_out():
    most, real = sensitivity([3, 2]), torch.float64
    usual = torch.tensor([[2.0**15]], dtype=real)
    for left, right, fits in [
        (usual, usual, True),
        (2.0 * usual, usual, False),
        (usual, 2.0 * usual, False),
        (math.nan * usual, usual, False),
        (math.inf * usual, 0.0 * usual, False),
        (2.0**11 * usual, usual / 2.0**14, False),  # whose squares are no longer exact
    ]:
        assert kernel._within(left, right, most).tolist() == [[fits]]
    two = torch.tensor([[3.0, 4.0]], dtype=real), torch.tensor([[5.0, 5.0]], dtype=real)
    assert kernel._within(*two, 25.001).item() and not kernel._within(*two, 24.999).item()
    assert not kernel._within(*two, 25.0).item()  # the bound is tighter by what rounding may hide


@pytest.mark.parametrize("width", [1, 3, 4, 5, 50, 785])
def test_a_length_is_that_of_exact_squares(width):
    rng = np.random.default_rng(width)
    rows = torch.from_numpy(rng.integers(-(2**20), 2**20, (70, width)).astype(np.float64))
    expected = [math.sqrt(sum(int(v) ** 2 for v in row)) for row in rows.tolist()]  # of a whole number below 2^53
    assert kernel._norms([rows])[:, 0].tolist() == expected
    assert kernel._norms([rows * 2.0**-300])[:, 0].tolist() == [v * 2.0**-300 for v in expected]


def test_no_rows_give_zeros():
    net, x, y = case(0, seed=3, hidden=[11], inputs=4, **{**PLAIN, "loss": "mse"})
    sums = net.clipped_sum(x, y, clip=1.0)
    assert [tuple(part.shape) for part in sums] == [(11, 5), (1, 12)]
    assert all(part.dtype == torch.int64 and not part.any() for part in sums)
    assert net.predictions(x).shape == (0,)


@pytest.mark.parametrize("loss", LOSSES)
def test_labels_of_another_shape_are_refused_and_not_broadcast(loss):
    net, x, y = case(6, seed=3, hidden=[4], inputs=4, **{**PLAIN, "loss": loss})
    for wrong in (y[:, None], y[:1], y[None]):
        with pytest.raises(ValueError, match=r"y must have one number for each row, \[6\], got"):
            net.clipped_sum(x, wrong, clip=1.0)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"activation": "gelu"}, "activation must be relu, sigmoid or tanh, got 'gelu'"),
        ({"loss": "hinge"}, "loss must be cross_entropy, binary_cross_entropy or mse, got 'hinge'"),
        ({"layers": [(torch.zeros(1, 2**22 + 1), torch.zeros(1))]}, "a layer may have at most 2\\^22 = 4194304 units"),
    ],
)
def test_what_it_does_not_know_is_refused(changes, said):
    arguments: dict[str, Any] = {"layers": [(torch.zeros(2, 3), torch.zeros(2))], "activation": "relu", "loss": "mse"}
    arguments.update(changes)
    with pytest.raises(ValueError, match=said):
        ExactMLP(arguments.pop("layers"), **arguments)


# What it computes


def model_of(sizes: list[int], activation: str, *, seed: int = 5) -> MLP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLP(sizes[0], sizes[1:-1], sizes[-1], activation=activation)


def layers_of(model: MLP) -> Layers:
    return [(layer.weight.detach(), layer.bias.detach()) for layer in model.layers]


def losses_of(out: Tensor, y: Tensor, loss: str) -> Tensor:
    if loss == "cross_entropy":
        return functional.cross_entropy(out, y, reduction="sum")
    if loss == "binary_cross_entropy":
        return functional.binary_cross_entropy_with_logits(out[:, 0], y.to(out.dtype), reduction="sum")
    return ((out[:, 0] - y) ** 2).sum()


def opacus_rows(model: MLP, x: Tensor, y: Tensor, loss: str) -> Tensor:
    """[rows, parameters] by Opacus' hooks, in float64."""
    module = GradSampleModule(model.double(), loss_reduction="sum")
    losses_of(module(x.double()), y, loss).backward()
    return torch.cat([p.grad_sample.flatten(1) for p in module.parameters()], 1)


def flat(parts: list[Tensor]) -> Tensor:
    """In the order of a module's parameters."""
    return torch.cat([torch.cat([part[:, :-1].flatten(), part[:, -1]]) for part in parts]).double()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [[], [50], [20, 30]])
def test_parts_are_the_clipped_gradients_that_opacus_finds(loss, activation, hidden):
    sizes = [12, *hidden, outputs_of(loss)]
    x, y = draw_rows(np.random.default_rng(1), 40, 12, loss, 0)
    model = model_of(sizes, activation)
    net = ExactMLP(layers_of(model), activation=activation, loss=loss)
    gradients = opacus_rows(model, x, y, loss)
    norms = gradients.norm(dim=1)
    clip = float(norms.median())  # so that half of the rows are clipped
    expected = gradients * (clip / norms).clamp(max=1.0)[:, None]
    found = torch.stack([flat(net.clipped_sum(x[i : i + 1], y[i : i + 1], clip=clip)) for i in range(40)]) * UNIT * clip
    # Each entry of left and right is off by at most 1/2 of 2^-15: so is their product, by about 2^-16 (sqrt + sqrt).
    lattice = 2.0**-16 * (math.sqrt(max(sizes) + 1) + math.sqrt(sum(sizes)))
    assert float((found - expected).norm(dim=1).max()) < 1.5 * lattice * clip
    assert torch.allclose(found.norm(dim=1), norms.clamp(max=clip), rtol=0, atol=1.5 * lattice * clip)
    total = flat(net.clipped_sum(x, y, clip=clip)) * UNIT * clip
    assert float((total - expected.sum(0)).norm()) < lattice * clip * math.sqrt(40)
    assert float((total - gradients.sum(0)).norm()) > 0.1 * clip  # without the clip it is another sum


@pytest.mark.parametrize("loss", LOSSES)
def test_how_sure_it_is_is_the_probability_that_torch_finds_whatever_the_batch(loss):
    rng = np.random.default_rng(0)
    layers = draw_layers(rng, [6, 8, outputs_of(loss)], 1.0, "usual")
    x, _ = draw_rows(rng, 500, 6, loss, 0)
    net = ExactMLP(layers, activation="tanh", loss=loss)
    predicted, sure = net.sure_predictions(x)
    assert torch.equal(predicted, net.predictions(x))
    if loss == "mse":
        assert sure is None
        return
    model = MLP(6, [8], outputs_of(loss), activation="tanh")
    mlp.load_weights(model, dict(zip(model.state_dict(), (a.numpy() for pair in layers for a in pair), strict=True)))
    expected = objective.confidences(model.double()(x.double()), loss)
    assert sure is not None and expected is not None
    assert_allclose(sure, expected.detach(), rtol=1e-6)  # of lattices
    alone = torch.cat([net.sure_predictions(x[i : i + 1])[1] for i in range(len(x))])  # type: ignore[misc]
    assert torch.equal(sure, alone)
    bad = torch.full((1, 6), math.nan)
    assert net.sure_predictions(bad)[1] == pytest.approx(0.5 if outputs_of(loss) == 1 else 1 / 3)


@pytest.mark.parametrize("loss", LOSSES)
def test_predictions_are_the_models_own(loss):
    model = model_of([12, 30, outputs_of(loss)], "tanh")
    x, _ = draw_rows(np.random.default_rng(1), 500, 12, loss, 0)
    with torch.no_grad():
        out = model(x)
    found = ExactMLP(layers_of(model), activation="tanh", loss=loss).predictions(x)
    if loss == "mse":
        assert torch.allclose(found, out[:, 0].clamp(0, 1).double(), atol=1e-5)
    else:
        expected = out.argmax(1) if loss == "cross_entropy" else (out[:, 0] > 0).long()
        assert (found != expected).sum() <= 1  # a logit's last bits may decide a tie


def test_of_equal_logits_the_first_wins():
    net = ExactMLP(
        [(torch.zeros(5, 2), torch.tensor([0.0, 1.0, 1.0, 0.5, 1.0]))], activation="relu", loss="cross_entropy"
    )
    for rows in (1, 2, 9, 33):
        assert net.predictions(torch.ones(rows, 2)).tolist() == [1] * rows


def test_dropouts_masks_stand_where_the_models_dropout_does():
    rng, model = np.random.default_rng(1), model_of([6, 8, 7, 3], "tanh").double()
    x, y = torch.from_numpy(rng.uniform(-1, 1, (5, 6))), torch.tensor([0, 1, 2, 0, 1])
    masks = [torch.from_numpy(rng.choice([0.0, 2.0], (5, width))) for width in (8, 7)]
    first, second, last = model.layers
    out = last(torch.tanh(second(torch.tanh(first(x)) * masks[0])) * masks[1])
    expected = torch.autograd.grad(losses_of(out, y, "cross_entropy"), list(model.parameters()))
    net = ExactMLP(layers_of(model), activation="tanh", loss="cross_entropy")
    found = flat(net.clipped_sum(x, y, clip=10.0, masks=masks)) * UNIT * 10.0
    assert float((found - torch.cat([g.flatten() for g in expected])).norm()) < 5e-3 * 10.0
    assert float((found - flat(net.clipped_sum(x, y, clip=10.0)) * UNIT * 10.0).norm()) > 5e-2 * 10.0


def test_several_models_at_once_are_each_as_if_alone():
    rng = np.random.default_rng(4)
    alone = [draw_layers(rng, [6, 9, 3], 0.5, "even") for _ in range(4)]
    data = [draw_rows(rng, 13, 6, "cross_entropy", bad) for bad in (0, 1, 2, 0)]
    present = torch.from_numpy(rng.uniform(size=(4, 13)) < 0.6)
    stacked = [tuple(torch.stack(part) for part in zip(*layer, strict=True)) for layer in zip(*alone, strict=True)]
    together = ExactMLP(stacked, activation="relu", loss="cross_entropy")
    x, y = (torch.stack(side) for side in zip(*data, strict=True))
    found = together.clipped_sum(x, y, clip=0.7, present=present)
    for i in range(4):
        net = ExactMLP(alone[i], activation="relu", loss="cross_entropy")
        expected = net.clipped_sum(x[i][present[i]], y[i][present[i]], clip=0.7)
        assert same([part[i] for part in found], expected)
        assert torch.equal(together.predictions(x)[i], net.predictions(x[i]))


def test_the_elementary_functions_are_near_what_they_are_called():
    x = -torch.cat([torch.linspace(0, 40, 4001, dtype=torch.float64), torch.tensor([0.0, 1e-300, 600.0, 699.9])])
    exact = torch.tensor([float(mpmath.exp(v)) for v in x.tolist()], dtype=torch.float64)
    assert float(((kernel._exp(x) - exact) / exact).abs().max()) < 2e-11
    both = torch.cat([x, -x])
    assert float((kernel._activate(both, "sigmoid") - torch.sigmoid(both)).abs().max()) < 1e-11
    assert float((kernel._activate(both, "tanh") - torch.tanh(both)).abs().max()) < 1e-11
    for activation in ("sigmoid", "tanh"):  # alone or among others: the same bits
        alone = [kernel._activate(both[i : i + 1], activation) for i in range(300)]
        assert torch.equal(torch.cat(alone), kernel._activate(both, activation)[:300])


def test_powers_of_two_are_exact():
    a = torch.tensor([1.0, 1.5, 0.75, 0.0, 3e38, 2.0**419.9, 2.0**-419, 2.0**-500, 2.0**420], dtype=torch.float64)[
        :, None
    ]
    anchor, fits = kernel._anchor(a.abs(), 20, -400)
    assert fits[:, 0].tolist() == [True] * 8 + [False]  # steps are from 2^-400 to 2^400
    value = ((a + anchor) - anchor)[:, 0]
    for i, step in [(0, 2.0**-19), (2, 2.0**-20), (6, 2.0**-400), (7, 2.0**-400)]:
        assert anchor[i].item() == 1.5 * 2.0**52 * step
        assert (value[i] / step).item().is_integer() and abs(value[i] / step) <= 2**20
    assert torch.equal(value[:4], a[:4, 0]) and value[7] == 0
    assert torch.allclose(value[:7], a[:7, 0], rtol=2.0**-20, atol=2.0**-400)


def test_ties_on_the_lattice_go_to_even():
    a = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 1023.0], dtype=torch.float64)
    anchor, _ = kernel._anchor(a.abs().amax(0, keepdim=True), 10, -400)
    assert ((a + anchor) - anchor).tolist() == [0.0, 2.0, 2.0, -0.0, -2.0, -2.0, 1023.0]


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 40), **CASES)
def test_sums_added_to_noise_are_the_same_whole_numbers(rows, clip, **drawn):
    net, x, y = case(rows, **drawn)
    room = kernel.Room()
    rng = np.random.default_rng(drawn["seed"])
    expected, onto = [], []
    for part in net.clipped_sum(x, y, clip=clip):
        noise = torch.from_numpy(rng.integers(-(2**52), 2**52, part.shape))
        expected.append(part + noise)
        onto.append(noise.double()[None])
    for _ in range(2):  # in memory that another batch has used
        layers = [(torch.full((1, 90, 90), 7.0), torch.ones(1, 90)) for _ in range(3)]
        other = ExactMLP(layers, activation="tanh", loss="cross_entropy", room=room)
        other.clipped_sum(torch.full((1, 50, 90), math.nan), torch.zeros(1, 50, dtype=torch.int64), clip=1.0)
    stacked = [(weight[None], bias[None]) for weight, bias in layers_of_case(**drawn)]
    again = ExactMLP(stacked, activation=drawn["activation"], loss=drawn["loss"], room=room)
    again.add_clipped_sum(onto, x[None], y[None], clip=clip)
    assert same([part[0].to(torch.int64) for part in onto], expected)
