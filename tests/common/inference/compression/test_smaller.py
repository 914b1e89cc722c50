"""Pruning and distillation: what is kept, what is learned, and that a seed gives one model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn.utils import prune as torch_prune

from common.data import tables
from common.data.encoding import RowEncoder
from common.errors import DataError
from common.inference.compression import smaller
from common.inference.compression.public_rows import MISSING, generated, of_table
from common.inference.saved import SavedModel
from common.model import mlp
from common.model.weights import Weights
from tests.support import saved_model, table

NUMBER = {"schema__target": {"name": "y", "bounds": [-50, 1000]}, "training__loss": "mse"}
ONE_OUTPUT = {"training__loss": "binary_cross_entropy"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(smaller, "PRUNING_STEPS", 30)
    monkeypatch.setattr(smaller, "DISTILLING_STEPS", 300)


def teacher(**changes: object) -> SavedModel:
    model = saved_model(**{"model": {"hidden": [16, 8]}, **changes})
    for array in model.weights.values():
        array *= 2  # so that outputs differ from row to row
    if model.federation.training.loss == "mse":
        model.weights["layers.2.bias"][:] = 0.5  # so that few are clamped
    return model


def matrices(weights: Weights) -> list[np.ndarray]:
    return [array for array in weights.values() if array.ndim == 2]


@pytest.mark.parametrize("sparsity", [0.0, 0.31, 0.5, 0.95, 1.0])
def test_one_round_takes_what_torchs_own_pruning_takes(sparsity):
    model = teacher()
    ours, theirs = (mlp.with_weights(model.federation, model.weights) for _ in range(2))
    smaller.prune(ours, sparsity)
    parameters = [(layer, "weight") for layer in theirs.layers]
    torch_prune.global_unstructured(parameters, pruning_method=torch_prune.L1Unstructured, amount=sparsity)
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.bias, other.bias)


def test_equal_weights_are_pruned_to_the_very_share():
    model = mlp.MLP(10, [10], 2)
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.fill_(0.5)
    masks = smaller.prune(model, 0.25)
    assert sum(int(mask.sum()) for mask in masks) == 90  # of 120


def test_each_sparsity_is_reached_and_what_is_gone_stays_gone():
    model = teacher()
    x = generated(model.federation.data_schema, seed=1, rows=500).x
    total = sum(w.size for w in matrices(model.weights))
    gone = [np.zeros(w.shape, bool) for w in matrices(model.weights)]
    made = list(smaller.pruned(model.federation, model.weights, x, sparsities=(0.5, 0.8, 0.9), seed=0))
    assert [sparsity for sparsity, _ in made] == [0.5, 0.8, 0.9]
    for sparsity, weights in made:
        zeros = [w == 0 for w in matrices(weights)]
        assert sum(int(z.sum()) for z in zeros) == round(sparsity * total)
        assert all((z | ~g).all() for z, g in zip(zeros, gone, strict=True))
        gone = zeros


def test_training_moves_what_is_kept_and_nothing_else():
    model = teacher()
    x = torch.from_numpy(generated(model.federation.data_schema, seed=1, rows=500).x)
    net = mlp.with_weights(model.federation, model.weights)
    taught = smaller.targets(net, x, "cross_entropy")
    masks = smaller.prune(net, 0.5)
    before = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(0)
    smaller.fit(net, x, taught, loss="cross_entropy", steps=30, rate=0.01, generator=generator, masks=masks)
    for layer, old, mask in zip(net.layers, before.layers, masks, strict=True):
        assert (layer.weight[~mask] == 0).all()
        assert (layer.weight[mask] != old.weight[mask]).any()


def test_training_after_pruning_brings_the_outputs_back():
    model = teacher()
    x = generated(model.federation.data_schema, seed=1, rows=1000).x
    inputs = torch.from_numpy(x)
    wanted = smaller.targets(mlp.with_weights(model.federation, model.weights), inputs, "cross_entropy")
    cut = mlp.with_weights(model.federation, model.weights)
    smaller.prune(cut, 0.5)
    ((_, trained),) = smaller.pruned(model.federation, model.weights, x, sparsities=(0.5,), seed=0)
    off = [
        float((smaller.targets(net, inputs, "cross_entropy") - wanted).abs().mean().detach())
        for net in (cut, mlp.with_weights(model.federation, trained))
    ]
    assert off[1] < off[0] / 2


def test_sparsity_rises_fast_at_first():
    # 1 - (1 - i/4)^3 of 0.64: 37/64, 56/64, 63/64 and all of the way.
    assert smaller.rising(0.0, 0.64, 4) == pytest.approx([0.37, 0.56, 0.63, 0.64])
    assert smaller.rising(0.5, 0.8, 1) == [0.8]


@pytest.mark.parametrize("changes", [{}, ONE_OUTPUT, NUMBER])
def test_a_smaller_perceptron_learns_what_its_teacher_says(changes):
    model = teacher(**changes)
    loss = model.federation.training.loss
    x = generated(model.federation.data_schema, seed=1, rows=2000).x
    weights = smaller.distilled(model.federation, model.weights, x, hidden=[6], seed=0)
    assert [w.shape[0] for w in matrices(weights)][:-1] == [6]
    fresh = torch.from_numpy(generated(model.federation.data_schema, seed=2, rows=2000).x)
    student = mlp.with_weights(smaller.resized(model.federation, [6]), weights)
    original = mlp.with_weights(model.federation, model.weights)
    said, wanted = (smaller.targets(net, fresh, loss).detach() for net in (student, original))
    spread = (wanted - wanted.mean(dim=0)).abs().mean()
    assert (said - wanted).abs().mean() < 0.25 * spread  # one that always says the mean is 1 off
    assert spread > 0.01


def test_a_seed_gives_one_model_and_torchs_own_generator_is_left_alone():
    model = teacher()
    x = generated(model.federation.data_schema, seed=1, rows=500).x
    before = torch.random.get_rng_state()
    made = [smaller.distilled(model.federation, model.weights, x, hidden=[4], seed=s) for s in (0, 0, 1)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(np.array_equal(made[0][name], made[1][name]) for name in made[0])
    assert not np.array_equal(made[0]["layers.0.weight"], made[2]["layers.0.weight"])


def test_first_weights_are_the_seeds_too(monkeypatch):
    monkeypatch.setattr(smaller, "DISTILLING_STEPS", 0)
    model = teacher()
    x = generated(model.federation.data_schema, seed=1, rows=500).x
    one, other = (smaller.distilled(model.federation, model.weights, x, hidden=[4], seed=s) for s in (0, 1))
    assert not np.array_equal(one["layers.0.weight"], other["layers.0.weight"])


def test_generated_rows_keep_to_the_schema_and_miss_cells_only_where_they_may():
    features = [
        {"name": "a", "type": "numeric", "bounds": [10, 20]},
        {"name": "m", "type": "numeric", "bounds": [0, 1], "missing": ["?"]},
        {"name": "c", "type": "categorical", "categories": [1, 2, 3], "optional": True},
    ]
    schema = saved_model(schema__features=features).federation.data_schema
    rows = generated(schema, seed=0, rows=4000)
    # Encoded: a; m and whether it is missing; the three categories of c and any other.
    assert rows.x.shape == (3200, 7) and rows.apart.most_rows == 800
    assert np.abs(rows.x[:, 0].mean()) < 0.05 and rows.x[:, 0].std() == pytest.approx(1 / np.sqrt(3), abs=0.03)
    assert rows.x[:, 2].mean() == pytest.approx(MISSING, abs=0.03)
    assert rows.x[:, 3:6].mean(axis=0) == pytest.approx([0.3, 0.3, 0.3], abs=0.04) and not rows.x[:, 6].any()
    assert np.array_equal(rows.x, generated(schema, seed=0, rows=4000).x)
    assert not np.array_equal(rows.x, generated(schema, seed=1, rows=4000).x)


def test_a_public_tables_rows_are_dealt_once_and_it_needs_no_target():
    schema = saved_model().federation.data_schema
    frame = table(100).drop("y")
    rows = of_table(tables.of_frame(frame), schema, seed=3)
    apart = next(RowEncoder(rows.apart, schema, with_target=False).blocks()).x
    whole = next(RowEncoder(tables.of_frame(frame), schema, with_target=False).blocks()).x
    assert (len(rows.x), len(apart)) == (80, 20)
    assert sorted(map(tuple, np.concatenate([rows.x, apart]))) == sorted(map(tuple, whole))


def test_rows_held_apart_keep_their_tables_decimal_commas(tmp_path):
    schema = saved_model().federation.data_schema
    lines = "".join(f"0,{i};-0,{i};red\n" for i in range(10, 40))
    (tmp_path / "rows.csv").write_text(f"a;b;c\n{lines}")
    rows = of_table(tables.read(tmp_path / "rows.csv", schema, with_target=False), schema, seed=0)
    apart = RowEncoder(rows.apart, schema, with_target=False)
    x = next(apart.blocks()).x
    apart.end(leave_out=False)
    assert len(x) == 6 and x[:, 0] == pytest.approx(-x[:, 1]) and (x[:, 0] > 0.09).all()


def test_too_few_rows_are_refused():
    schema = saved_model().federation.data_schema
    with pytest.raises(DataError, match="19 rows are too few to make a model smaller on; 20 or more"):
        of_table(tables.of_frame(table(19)), schema, seed=0)
