"""A recipe, weights and rows in, an update out: nothing that was given is changed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from client import data
from client.data import Dataset
from client.training.plain import make_optimizer
from client.training.recipe import DPSGD, Pace, Recipe, Scoring
from client.training.train import evaluate, train
from common.document.federation import Federation
from common.model import mlp, objective
from common.model.weights import Weights, initial_weights
from common.privacy import noise
from tests.support import federation, table

PRIVATELY = DPSGD(steps=3, sampling_rate=0.2, clip=1.0, noise_multiplier=1.0, expected_batch_size=8)


def dataset(fed: Federation) -> Dataset:
    rows = data.encode_rows(table(), fed.data_schema, key=b"k")
    return data.split(rows, fed.data_schema, key=b"k", device=torch.device("cpu"))


def recipe(private: DPSGD | None, **changes: object) -> Recipe:
    return Recipe(federation=federation(**changes), steps=3, weight=17.0, private=private)


def same(one: Weights, other: Weights) -> bool:
    return list(one) == list(other) and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("private", [None, PRIVATELY], ids=["plain", "private"])
def test_training_changes_nothing_that_it_was_given_and_can_be_repeated(private):
    how = recipe(private, model__dropout=0.2)
    weights, rows = initial_weights(how.federation), dataset(how.federation)
    before, x = {name: array.copy() for name, array in weights.items()}, rows.x.clone()
    generator = torch.get_rng_state()
    update, again = (train(how, weights, rows, noise=noise.seeded(5)) for _ in range(2))
    assert same(weights, before) and torch.equal(rows.x, x) and torch.equal(torch.get_rng_state(), generator)
    assert same(update.weights, again.weights) and not same(update.weights, weights)
    assert update.weight == 17.0 and (update.loss is None) == (private is not None)


@pytest.mark.parametrize("private", [None, PRIVATELY], ids=["plain", "private"])
@pytest.mark.parametrize(
    "pace, schedule, rate",
    [
        (Pace(factor=0.5), None, 0.05),
        (Pace(round=3), {"name": "exponential", "factor": 0.5}, 0.025),
        (Pace(round=2, factor=0.5), {"name": "plateau", "metric": "f1", "warmup": 2}, 0.1 * 2 / 3 * 0.5),
    ],
)
def test_a_rounds_pace_is_what_a_client_trains_at(private, pace, schedule, rate):
    start, rows = initial_weights(federation()), dataset(federation())
    scheduled = replace(recipe(private, training__schedule=schedule), pace=pace)
    found = train(scheduled, start, rows, noise=noise.seeded(5)).weights
    expected = train(recipe(private, training__learning_rate=rate), start, rows, noise=noise.seeded(5)).weights
    assert all(np.allclose(found[name], expected[name], atol=1e-7) for name in start)


def test_a_proximal_term_keeps_the_update_near_where_it_began():
    far, near = (
        train(recipe(None, **changes), initial_weights(federation()), dataset(federation()), noise=noise.seeded(5))
        for changes in ({}, {"strategy__name": "fedprox", "strategy__proximal_mu": 5.0})
    )
    start = initial_weights(federation())
    moved = [max(float(np.abs(u.weights[name] - start[name]).max()) for name in start) for u in (far, near)]
    assert 0 < moved[1] < moved[0]


def test_counts_have_noise_if_the_scoring_says_so_and_are_exact_otherwise():
    fed = federation()
    weights, rows = initial_weights(fed), dataset(fed)
    exact = evaluate(Scoring(federation=fed, noise_multiplier=None), weights, rows, noise=noise.seeded(5))
    noisy = evaluate(Scoring(federation=fed, noise_multiplier=3.0), weights, rows, noise=noise.seeded(5))
    assert exact.sum() == len(rows.validation_y) and np.array_equal(exact, np.rint(exact))
    assert 0 < np.abs(noisy - exact).max() < 3.0 * 6


def test_an_optimizer_or_a_loss_that_is_not_known_is_an_error_and_nothing_else_is_taken_for_it():
    model = mlp.build(federation())
    with pytest.raises(ValueError, match=r"^optimizer must be sgd, adam or adamw, got 'lion'$"):
        make_optimizer(model.parameters(), federation().training.model_copy(update={"optimizer": "lion"}))
    logits, y = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
    for asked in (lambda: objective.row_losses(logits, y, "hinge"), lambda: objective.predictions(logits, "hinge")):
        with pytest.raises(ValueError, match=r"^loss must be cross_entropy, binary_cross_entropy or mse, got 'hinge'$"):
            asked()
