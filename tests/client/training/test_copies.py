"""A row that comes as several copies counts once, whatever they are: exactly, and no longer than S. Layers that are
frozen have no part in its length."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from client.training import kernel
from client.training.kernel import ExactMLP, sensitivity
from common.model.mlp import MLP
from common.model.objective import row_losses
from tests.client.training.test_kernel import (
    CASES,
    LOSSES,
    UNIT,
    draw_layers,
    draw_rows,
    layers_of_case,
    norm_squared,
    outputs_of,
    same,
    threads,
)

COPIES = st.sampled_from([2, 3, 8, 16])
EVEN = {"loss": "cross_entropy", "activation": "tanh", "kind": "even", "size": 0.4, "bad": 0}


def case(rows: int, copies: int, spread: float = 0.05, **drawn: Any) -> tuple[ExactMLP, Tensor, Tensor]:
    """Rows in copies, each of which differs from the row by up to `spread`."""
    rng = np.random.default_rng([drawn["seed"], 1])
    x, y = draw_rows(rng, rows, drawn["inputs"], drawn["loss"], drawn["bad"])
    changed = x.repeat_interleave(copies, 0)
    changed = changed + torch.from_numpy(rng.uniform(-spread, spread, changed.shape).astype(np.float32))
    net = ExactMLP(layers_of_case(**drawn), activation=drawn["activation"], loss=drawn["loss"])
    return net, changed, y.repeat_interleave(copies)


def of_rows(index: Tensor, copies: int) -> Tensor:
    return (index[:, None] * copies + torch.arange(copies)).flatten()


@settings(max_examples=150, deadline=None)
@given(rows=st.integers(0, 60), cut=st.integers(0, 60), copies=COPIES, workers=st.sampled_from([1, 2]), **CASES)
def test_the_sum_over_all_rows_is_the_sum_of_the_sums_over_any_two_groups(rows, cut, copies, workers, clip, **drawn):
    net, x, y = case(rows, copies, **drawn)
    order = torch.from_numpy(np.random.default_rng(drawn["seed"]).permutation(rows))
    with threads(workers):
        whole = net.clipped_sum(x, y, clip=clip, copies=copies)
    groups = [of_rows(group, copies) for group in (order[:cut], order[cut:])]
    parts = [net.clipped_sum(x[group], y[group], clip=clip, copies=copies) for group in groups]
    assert same([a + b for a, b in zip(*parts, strict=True)], whole)


@settings(max_examples=150, deadline=None)
@given(rows=st.integers(1, 8), copies=COPIES, spread=st.sampled_from([0.0, 0.1, 2.0]), **CASES)
def test_no_rows_part_is_longer_than_the_sensitivity(rows, copies, spread, clip, **drawn):
    net, x, y = case(rows, copies, spread, **drawn)
    most = math.floor(sensitivity(net.sizes, copies=copies) ** 2)
    for i in range(0, rows * copies, copies):
        part = net.clipped_sum(x[i : i + copies], y[i : i + copies], clip=clip, copies=copies)
        assert norm_squared(part) <= most


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), copies=COPIES, clip=st.sampled_from([1e-6, 0.3, 1e3]))
def test_copies_that_contradict_each_other_stay_within_it_too(seed, copies, clip):
    # Their targets differ, so that parts cancel; what is left of them is small, and their rounding is not.
    rng = np.random.default_rng(seed)
    net = ExactMLP(draw_layers(rng, [5, 7, 2], 3.0, "even"), activation="relu", loss="cross_entropy")
    x = torch.from_numpy(rng.uniform(-1, 1, (1, 5)).astype(np.float32)).repeat(copies, 1)
    part = net.clipped_sum(x, torch.arange(copies) % 2, clip=clip, copies=copies)
    assert norm_squared(part) <= math.floor(sensitivity(net.sizes, copies=copies) ** 2)


DEEP = {"seed": 5, "hidden": [9, 6], "inputs": 12}


def module_of(loss: str) -> MLP:
    """The model of a deep case."""
    module = MLP(12, [9, 6], outputs_of(loss), activation="tanh").double()
    layers = layers_of_case(**DEEP, **{**EVEN, "loss": loss})
    with torch.no_grad():
        for p, value in zip(module.parameters(), [part for layer in layers for part in layer], strict=True):
            p.copy_(value)
    return module


def mean_gradients(net: MLP, x: Tensor, y: Tensor, loss: str, copies: int) -> Tensor:
    """[rows, parameters]: of each row the gradient of its copies' mean loss, by autograd, in the kernel's order."""
    found = []
    for i in range(0, len(x), copies):
        mean = row_losses(net(x[i : i + copies].double()), y[i : i + copies], loss).mean()
        parts = torch.autograd.grad(mean, list(net.parameters()))
        found.append(
            torch.cat([torch.cat([w, b[:, None]], 1).flatten() for w, b in zip(parts[::2], parts[1::2], strict=True)])
        )
    return torch.stack(found)


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.double().flatten() for part in parts])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("copies", [2, 5, 16])
def test_a_rows_part_is_the_clipped_gradient_of_its_copies_mean_loss(loss, copies):
    net, x, y = case(30, copies, 0.3, **DEEP, **{**EVEN, "loss": loss})
    module = module_of(loss)
    gradients = mean_gradients(module, x, y, loss, copies)
    clip = float(gradients.norm(dim=1).median())  # so that half of the rows are clipped
    expected = gradients * (clip / gradients.norm(dim=1)).clamp(max=1.0)[:, None]
    for i in range(30):
        part = slice(i * copies, (i + 1) * copies)
        found = flat(net.clipped_sum(x[part], y[part], clip=clip, copies=copies)) * UNIT * clip
        assert float((found - expected[i]).norm()) < 1e-3 * clip
    each = torch.cat([mean_gradients(module, x[j : j + 1], y[j : j + 1], loss, 1) for j in range(len(x))])
    each *= (clip / each.norm(dim=1)).clamp(max=1.0)[:, None]
    clipped_before = each.view(30, copies, -1).mean(1)  # which is another mechanism
    assert float((clipped_before - expected).norm(dim=1).max()) > 5e-3 * clip


def test_copies_that_are_alike_are_one_row():
    net, x, y = case(20, 4, 0.0, seed=3, hidden=[6], inputs=8, **EVEN)
    together = flat(net.clipped_sum(x, y, clip=0.2, copies=4)) * UNIT
    once = flat(net.clipped_sum(x[::4], y[::4], clip=0.2)) * UNIT
    assert float((together - once).norm()) < 1e-3
    four_rows = flat(net.clipped_sum(x, y, clip=0.2)) * UNIT
    assert float((four_rows - 4 * once).norm()) < 1e-3


def test_a_row_of_which_one_copy_is_bad_counts_as_zeros():
    net, x, y = case(3, 4, seed=3, hidden=[6], inputs=8, **EVEN)
    others = of_rows(torch.tensor([0, 2]), 4)
    expected = net.clipped_sum(x[others], y[others], clip=0.2, copies=4)
    for bad in (math.nan, math.inf, 3e38):
        x[5, 2] = bad
        assert same(net.clipped_sum(x, y, clip=0.2, copies=4), expected)


def test_masks_and_absent_rows_are_by_copy():
    net, x, y = case(6, 3, seed=4, hidden=[7], inputs=5, **EVEN)
    masks = [torch.from_numpy(np.random.default_rng(0).choice([0.0, 2.0], (18, 7)))]
    present = torch.tensor([True, False, True, True, False, True]).repeat_interleave(3)
    found = net.clipped_sum(x, y, clip=0.5, masks=masks, present=present, copies=3)
    kept = [masks[0][present]]
    assert same(found, net.clipped_sum(x[present], y[present], clip=0.5, masks=kept, copies=3))
    assert not same(found, net.clipped_sum(x[present], y[present], clip=0.5, copies=3))


def test_rows_with_their_copies_are_summed_in_parts(monkeypatch):
    net, x, y = case(50, 3, seed=2, hidden=[9], inputs=5, **EVEN)
    whole = net.clipped_sum(x, y, clip=0.5, copies=3)
    monkeypatch.setattr(kernel, "ROWS_OF_COPIES", 7)
    assert same(net.clipped_sum(x, y, clip=0.5, copies=3), whole)


def test_partial_sums_stay_within_what_a_float_holds():
    assert kernel.ROWS_OF_COPIES * 2**36.5 < 2**kernel.EXACT
    # A row's parts, taken by their size: no longer than the root of what is asked for.
    rng = np.random.default_rng(1)
    for copies in (2, 16):
        lefts = [torch.from_numpy(rng.integers(-(2**15), 2**15, (copies, 3)).astype(float))]
        for size in (2.0**14, 2.0**18, 2.0**20, 2.0**22):
            rights = [torch.from_numpy(np.rint(rng.uniform(-1, 1, (copies, 2)) * size))]
            taken = kernel._copies_are_within(lefts, rights, copies, math.inf)
            parts = sum(float(lefts[0][i].norm() * rights[0][i].norm()) for i in range(copies))
            assert not bool(taken) or parts <= 2**36.5


def test_rows_that_lack_copies_are_an_error():
    net, x, y = case(3, 4, seed=3, hidden=[6], inputs=8, **EVEN)
    with pytest.raises(ValueError, match="11 rows are not 4 copies each"):
        net.clipped_sum(x[:11], y[:11], clip=0.2, copies=4)


def test_the_longest_parts_nearly_reach_the_sensitivity():
    # Else more noise would be added than is needed.
    net, x, y = case(40, 8, 0.3, seed=1, hidden=[20], inputs=30, **EVEN)
    parts = [net.clipped_sum(x[i : i + 8], y[i : i + 8], clip=1e-4, copies=8) for i in range(0, 320, 8)]
    longest = math.sqrt(max(map(norm_squared, parts)))
    assert 0.997 < longest / sensitivity(net.sizes, copies=8) <= 1
    assert all(part[0].any() for part in parts)  # and none is left out
    assert 1 < sensitivity(net.sizes, copies=8) * UNIT < 1.002


@pytest.mark.parametrize("trained", [[0], [1], [2], [0, 2], [1, 2]])
@pytest.mark.parametrize("copies", [1, 3])
def test_the_gradient_of_the_layers_that_are_trained_is_clipped_by_itself(trained, copies):
    _, x, y = case(30, copies, 0.3, **DEEP, **EVEN)
    net = ExactMLP(layers_of_case(**DEEP, **EVEN), activation=EVEN["activation"], loss=EVEN["loss"], trained=trained)
    gradients = mean_gradients(module_of(EVEN["loss"]), x, y, EVEN["loss"], copies)
    layers = torch.split(gradients, [9 * 13, 6 * 10, 3 * 7], 1)
    own = torch.cat([layers[i] for i in trained], 1)
    clip = float(own.norm(dim=1).median())
    expected = own * (clip / own.norm(dim=1)).clamp(max=1.0)[:, None]
    most = sensitivity(net.sizes, copies=copies, trained=trained)
    assert most <= sensitivity(net.sizes, copies=copies)
    for i in range(30):
        part = slice(i * copies, (i + 1) * copies)
        sums = net.clipped_sum(x[part], y[part], clip=clip, copies=copies)
        assert float((flat(sums) * UNIT * clip - expected[i]).norm()) < 1e-3 * clip
        assert norm_squared(sums) <= math.floor(most**2)
