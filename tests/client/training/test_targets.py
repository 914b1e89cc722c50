"""Training for several targets: exact arithmetic and Opacus against autograd of the weighted loss, row by row."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from client import data
from client.training import kernel
from client.training.augment import Augmenter
from client.training.dpsgd import fit_privately
from client.training.kernel import ExactMLP, sensitivity
from client.training.plain import fit
from client.training.recipe import DPSGD, Scoring
from client.training.row_draws import row_ids
from client.training.train import evaluate
from common.document.federation import Training
from common.document.heads import Head
from common.model import objective
from common.model.mlp import MLP
from common.model.scores import count_sensitivity
from common.model.weights import initial_weights
from common.privacy import noise
from tests.support import PRIVATE, federation, table

CPU = torch.device("cpu")

HEADS = (Head("binary_cross_entropy", 1, 1.0), Head("cross_entropy", 3, 0.5), Head("mse", 1, 2.0))
SIZES = [4, 6, 5]
CLIP, LEARNING_RATE = 0.3, 0.5
TRAINING = Training(rounds=1, local_steps=1, batch_size=8, learning_rate=LEARNING_RATE)


def model() -> MLP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return MLP(4, (6,), 5, activation="tanh")


def rows_of(n: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Rows of which each lacks a target in three cases of ten, and the first lacks all."""
    rng = np.random.default_rng(seed)
    y = np.stack([rng.integers(0, 2, n), rng.integers(0, 3, n), rng.uniform(0, 1, n)], 1).astype(np.float32)
    y[rng.random(y.shape) < 0.3] = np.nan
    y[:1] = np.nan
    return torch.from_numpy(rng.normal(size=(n, 4)).astype(np.float32)), torch.from_numpy(y)


def loss_of(out: Tensor, y: Tensor) -> Tensor:
    """The weighted loss of one row, [outputs] and [targets], written out."""
    total = 0.0 * out.sum()
    if not y[0].isnan():
        total = total + functional.softplus(out[0]) - y[0] * out[0]
    if not y[1].isnan():
        total = total + 0.5 * (torch.logsumexp(out[1:4], 0) - out[1 + int(y[1])])
    if not y[2].isnan():
        total = total + 2.0 * (out[4] - y[2]) ** 2
    return total


def row_gradients(net: MLP, x: Tensor, y: Tensor) -> Tensor:
    """[rows, parameters]."""
    found = []
    for row, target in zip(x, y, strict=True):
        gradient = torch.autograd.grad(loss_of(net(row[None])[0], target), list(net.parameters()))
        found.append(torch.cat([g.flatten() for g in gradient]))
    return torch.stack(found)


def flat(net: MLP) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def parts(net: ExactMLP, x: Tensor, y: Tensor, clip: float = CLIP) -> Tensor:
    """The clipped sum in the order of the parameters, in units of a clip."""
    sums = net.clipped_sum(x, y, clip=clip)
    return torch.cat([part.flatten() for of in sums for part in (of[:, :-1], of[:, -1])]).double() / 4.0**15


def exact(net: MLP) -> ExactMLP:
    return ExactMLP(net.weights(), activation="tanh", loss=HEADS)


def test_a_rows_part_is_its_clipped_gradient_by_autograd():
    net, (x, y) = model(), rows_of(40)
    gradients = row_gradients(net, x, y).double()
    norms = gradients.norm(dim=1)
    clip = float(norms[norms > 0].median())
    expected = gradients * (clip / norms.clamp(min=1e-30)).clamp(max=1.0)[:, None]
    found = torch.stack([parts(exact(net), x[i : i + 1], y[i : i + 1], clip) * clip for i in range(40)])
    assert float((found - expected).norm(dim=1).max()) < 1e-3 * clip
    assert not found[0].any() and not y[0].isfinite().any()  # a row without any target adds nothing
    lacks = y[:, 2].isnan()
    head = slice(-1, None)  # the bias of the last output
    assert not found[lacks][:, head].any() and found[~lacks][:, head].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 60), st.integers(0, 60), st.sampled_from([1e-6, 0.3, 1e6]))
def test_a_rows_part_depends_on_that_row_alone_and_is_no_longer_than_the_sensitivity(seed, n, cut, clip):
    net, (x, y) = exact(model()), rows_of(n, seed)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    whole = net.clipped_sum(x, y, clip=clip)
    halves = [net.clipped_sum(x[some], y[some], clip=clip) for some in (order[:cut], order[cut:])]
    assert all(torch.equal(a + b, c) for a, b, c in zip(*halves, whole, strict=True))
    for i in range(min(n, 5)):
        alone = net.clipped_sum(x[i : i + 1], y[i : i + 1], clip=clip)
        assert sum(int(v) ** 2 for part in alone for v in part.flatten().tolist()) <= sensitivity(SIZES) ** 2


def test_rows_are_summed_in_parts_with_their_own_targets(monkeypatch):
    net, (x, y) = exact(model()), rows_of(50)
    whole = net.clipped_sum(x, y, clip=CLIP)
    monkeypatch.setattr(kernel, "ROWS", 7)
    assert all(torch.equal(a, b) for a, b in zip(net.clipped_sum(x, y, clip=CLIP), whole, strict=True))


@pytest.mark.parametrize("wrong", [lambda y: y[:, :2], lambda y: y[:, 0], lambda y: y[:3]])
def test_targets_of_another_shape_are_refused(wrong):
    net, (x, y) = exact(model()), rows_of(5)
    with pytest.raises(ValueError, match=r"y must have one number for each row, \[5, 3\]"):
        net.clipped_sum(x, wrong(y), clip=CLIP)


def test_predictions_and_counts_are_those_in_floats():
    net, (x, y) = model(), rows_of(300)
    predicted, sure = exact(net).sure_predictions(x)
    with torch.no_grad():
        logits = net(x)
    expected, its = objective.predictions(logits, HEADS), objective.confidences(logits, HEADS)
    torch.testing.assert_close(predicted, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sure, its, rtol=1e-5, atol=1e-6, equal_nan=True)
    alone = torch.cat([exact(net).predictions(x[i : i + 1]) for i in range(300)])
    assert torch.equal(predicted, alone)
    schema = federation(
        schema__also=[
            {"name": "k", "classes": [0, 1, 2], "optional": True},
            {"name": "s", "bounds": [0, 1], "optional": True},
        ]
    ).data_schema
    found = kernel.exact_counts(net, x, y, schema=schema, loss=HEADS)
    np.testing.assert_allclose(found, objective.score(net, x, y, schema=schema, loss=HEADS), atol=1e-3)


def step(net: MLP, x: Tensor, y: Tensor, arithmetic: str, **changes: Any) -> Tensor:
    """By how much one private step without noise moves the model."""
    before = flat(net)
    dpsgd = DPSGD(
        steps=1,
        sampling_rate=1.0,
        clip=CLIP,
        noise_multiplier=2e-6,
        expected_batch_size=8,
        arithmetic="exact" if arithmetic == "exact" else "opacus",
    )
    source = noise.seeded(1)
    fit_privately(net, x, y, training=TRAINING, loss=HEADS, dpsgd=dpsgd, noise=source, proximal_mu=0.0, **changes)
    return flat(net) - before


@pytest.mark.parametrize("arithmetic", ["exact", "opacus"])
def test_a_private_step_is_the_sum_of_clipped_rows(arithmetic):
    net, (x, y) = model(), rows_of(30)
    gradients = row_gradients(net, x, y)
    clipped = gradients * (CLIP / gradients.norm(dim=1).clamp(min=1e-30)).clamp(max=1.0)[:, None]
    expected = -LEARNING_RATE * clipped.sum(0) / 8
    torch.testing.assert_close(step(net, x, y, arithmetic), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("arithmetic", ["exact", "opacus"])
def test_copies_of_a_row_have_its_targets(arithmetic, monkeypatch):
    fed = federation(training__augmentation={"copies": 3, "drop": 0.3}, schema__features=FOUR)
    net, (x, y) = model(), rows_of(20)
    augmenter, ids, taken = Augmenter.of(fed), row_ids(np.arange(20, dtype=np.uint64)), list[tuple[Tensor, Tensor]]()
    assert augmenter is not None
    monkeypatch.setattr(augmenter, "rows", lambda *of: taken.append(Augmenter.rows(augmenter, *of)) or taken[-1])
    before = copy.deepcopy(net)
    found = step(net, x, y, arithmetic, augmenter=augmenter, ids=ids)
    ((changed, repeated),) = taken
    torch.testing.assert_close(repeated.view(20, 3, 3), y[:, None].expand(20, 3, 3), rtol=0, atol=0, equal_nan=True)
    gradients = row_gradients(before, changed, repeated).view(20, 3, -1).mean(1)
    clipped = gradients * (CLIP / gradients.norm(dim=1).clamp(min=1e-30)).clamp(max=1.0)[:, None]
    torch.testing.assert_close(found, -LEARNING_RATE * clipped.sum(0) / 8, rtol=0, atol=3e-4)


FOUR = [{"name": name, "type": "numeric", "bounds": [-1, 1]} for name in "abcd"]


def test_a_step_without_privacy_is_the_mean_over_rows():
    net, (x, y) = model(), rows_of(8)
    before, expected = flat(net), row_gradients(net, x, y).mean(0)
    losses = [loss_of(net(row[None])[0], target).item() for row, target in zip(x, y, strict=True)]
    told = fit(net, x, y, training=TRAINING, loss=HEADS, steps=1, noise=noise.seeded(1), proximal_mu=0.0)
    torch.testing.assert_close(flat(net) - before, -LEARNING_RATE * expected, rtol=1e-4, atol=1e-6)
    assert told == pytest.approx(sum(losses) / 8, rel=1e-5) and math.isfinite(told)


@pytest.mark.parametrize("arithmetic", ["exact", "opacus"])
def test_an_evaluation_counts_targets_and_groups_in_either_arithmetic(arithmetic):
    fed = federation(
        **PRIVATE,
        schema__group={"name": "a", "cuts": [0], "calibration": True},
        schema__also=[{"name": "s", "bounds": [0, 1], "optional": True, "weight": 0.5}],
        schema__validation_fraction=0.5,
    )
    rows = table(200).with_columns(s=pl.Series([None if i % 3 == 0 else i / 200 for i in range(200)]))
    key = b"key"
    dataset = data.split(data.encode_rows(rows, fed.data_schema, key=key), fed.data_schema, key=key, device=CPU)
    weights = initial_weights(fed)
    least, source = 2.0**-8, noise.seeded(5)  # the least noise that counts may have
    scoring = Scoring(federation=fed, noise_multiplier=least, arithmetic=arithmetic)
    found = evaluate(scoring, weights, dataset, noise=source)
    exact = evaluate(Scoring(federation=fed, noise_multiplier=None), weights, dataset, noise=source)
    by_group = exact.reshape(3, 4 + 1 + 3 + 1)
    high = (dataset.validation_x[:, 0] >= 0).numpy()
    assert by_group[:, :4].sum(axis=1).tolist() == [(~high).sum(), high.sum(), 0]
    assert by_group[:, 5].sum() == (~dataset.validation_y[:, 1].isnan()).sum()
    off = np.abs(found - exact).max()
    assert 0 < off < 6 * least * count_sensitivity(fed.data_schema)
