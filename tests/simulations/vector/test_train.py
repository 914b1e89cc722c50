"""Clients trained together are held against client/training/train.py for each alone: bit for bit under privacy, to
floats' rounding without. Autograd is in the latter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.data import Dataset
from client.training import plain
from client.training.dropout import row_ids
from client.training.kernel import Room
from client.training.recipe import DPSGD, Recipe
from client.training.train import train
from common.document.federation import Federation
from common.model import mlp
from common.model.weights import Weights, initial_weights
from simulations.noise import SimulationNoise
from simulations.vector import train as vector
from simulations.vector.jobs import Job
from simulations.vector.models import flat_of
from simulations.vector.plain import train_plainly
from simulations.vector.train import Trainer, unfit
from tests.support import federation

OPTIMIZERS: list[dict[str, Any]] = [
    {"training__optimizer": "sgd"},
    {"training__optimizer": "sgd", "training__momentum": 0.9},
    {"training__optimizer": "sgd", "training__momentum": 0.5, "training__nesterov": True},
    {"training__optimizer": "sgd", "training__weight_decay": 0.1},
    {"training__optimizer": "adam", "training__weight_decay": 0.01},
    {"training__optimizer": "adamw", "training__weight_decay": 0.01},
    {"training__optimizer": "sgd", "strategy__name": "fedprox", "strategy__proximal_mu": 0.5},
    {"training__optimizer": "adam", "strategy__name": "fedprox", "strategy__proximal_mu": 0.5},
]
CASES = {
    "seed": st.integers(0, 2**32),
    "sizes": st.lists(st.integers(1, 40), min_size=1, max_size=7),  # rows of each client
    "inputs": st.integers(1, 12),
    "hidden": st.lists(st.integers(1, 20), max_size=2),
    "loss": st.sampled_from(["cross_entropy", "binary_cross_entropy", "mse"]),
    "activation": st.sampled_from(["relu", "sigmoid", "tanh"]),
    "optimizer": st.sampled_from(OPTIMIZERS),
    "dropout": st.sampled_from([0.0, 0.0, 0.3]),
    "batch": st.integers(1, 50),
    "chunk": st.integers(1, 8),
    "one_table": st.booleans(),
}


def document(**drawn: Any) -> Federation:
    target = {"name": "y", "bounds": [0, 1]} if drawn["loss"] == "mse" else {"name": "y", "classes": [0, 1]}
    features = [{"name": f"x{i}", "type": "numeric", "bounds": [-1, 1]} for i in range(drawn["inputs"])]
    return federation(
        schema__features=features,
        schema__target=target,
        model={"hidden": drawn["hidden"] or [3], "activation": drawn["activation"], "dropout": drawn["dropout"]},
        training__loss=drawn["loss"],
        training__batch_size=drawn["batch"],
        **drawn["optimizer"],
    )


def jobs_of(fed: Federation, recipes: list[Recipe], sizes: list[int], *, seed: int, one_table: bool) -> list[Job]:
    rng = np.random.default_rng(seed)
    number = fed.training.loss == "mse"

    def table(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = rng.uniform(-1, 1, (rows, fed.layer_sizes[0])).astype(np.float32)
        y = rng.uniform(size=rows).astype(np.float32) if number else rng.integers(0, 2, rows)
        return torch.from_numpy(x), torch.from_numpy(y)

    jobs = []
    whole = table(60)
    for i, (recipe, rows) in enumerate(zip(recipes, sizes, strict=True)):
        x, y = whole if one_table else table(rows)
        index = np.sort(rng.permutation(60)[:rows]) if one_table else np.arange(rows)
        ids = row_ids(rng.integers(0, 2**63, rows).astype(np.uint64))
        jobs.append(Job(node=i, recipe=recipe, x=x, y=y, index=index, ids=ids, noise=SimulationNoise(seed, i)))
    return jobs


def alone(job: Job, weights: Weights, *seed: int) -> tuple[np.ndarray, float | None]:
    """What a real client makes of the same rows, weights and noise."""
    rows: Any = {"validation_x": torch.empty(0), "validation_y": torch.empty(0), "content": "", "split": ""}
    dataset = Dataset(x=job.x[job.index], y=job.y[job.index], ids=job.ids, report=None, **rows)
    update = train(job.recipe, weights, dataset, noise=SimulationNoise(*seed))
    return flat_of(update.weights).numpy()[: job.recipe.federation.parameters], update.loss


def together(fed: Federation, weights: Weights, jobs: list[Job], *, chunk: int) -> tuple[np.ndarray, list[float]]:
    found, losses = np.zeros((len(jobs), fed.parameters), np.float32), [0.0] * len(jobs)
    width = min(fed.training.batch_size, 60)
    for places, updates in Trainer(fed, width=width, chunk=chunk).train(weights, jobs):
        found[places] = updates.flat
        for place, update in zip(places, updates, strict=True):
            assert update.weight == jobs[place].recipe.weight
            losses[place] = update.loss or 0.0
    return found, losses


def private(fed: Federation, rng: np.random.Generator, count: int) -> list[Recipe]:
    """Plans that differ in all that plans of one federation may."""
    return [
        Recipe(
            federation=fed,
            steps=(steps := int(rng.integers(1, 6))),
            weight=float(i + 1),
            private=DPSGD(
                steps=steps,
                sampling_rate=float(rng.choice([0.02, 0.3, 1.0])),
                clip=0.7,
                noise_multiplier=float(rng.choice([0.3, 1.1, 2.0])),
                expected_batch_size=fed.training.batch_size,
            ),
        )
        for i in range(count)
    ]


@settings(max_examples=120, deadline=None)
@given(**CASES)
def test_private_training_together_is_bit_for_bit_that_of_each_alone(seed, sizes, chunk, one_table, **drawn):
    fed = document(**drawn)
    weights = initial_weights(fed, seed=seed)
    recipes = private(fed, np.random.default_rng(seed), len(sizes))
    jobs = jobs_of(fed, recipes, sizes, seed=seed, one_table=one_table)
    found, _ = together(fed, weights, jobs, chunk=chunk)
    for i, job in enumerate(jobs):
        expected, _ = alone(job, weights, seed, i)
        assert np.array_equal(found[i], expected, equal_nan=True)
        assert not np.array_equal(found[i], flat_of(weights).numpy()[: fed.parameters])


@settings(max_examples=120, deadline=None)
@given(**CASES)
def test_training_together_without_privacy_is_that_of_autograd(seed, sizes, chunk, one_table, **drawn):
    fed = document(**drawn)
    weights, rng = initial_weights(fed, seed=seed), np.random.default_rng(seed)
    recipes = [Recipe(federation=fed, steps=int(rng.integers(1, 9)), weight=2.0, private=None) for _ in sizes]
    jobs = jobs_of(fed, recipes, sizes, seed=seed, one_table=one_table)
    found, losses = together(fed, weights, jobs, chunk=chunk)
    for i, job in enumerate(jobs):
        expected, loss = alone(job, weights, seed, i)
        # Adam divides a gradient by its own size, so one that is rounding error alone moves by a whole step.
        if fed.training.optimizer == "sgd":
            assert np.abs(found[i] - expected).max() < 1e-5
        assert np.quantile(np.abs(found[i] - expected), 0.9) < 1e-5
        assert losses[i] == pytest.approx(loss, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_in_float64_it_is_autograd_but_for_the_last_bits(seed, sizes, chunk, one_table, **drawn):
    fed = document(**{**drawn, "dropout": 0.0})
    start = flat_of(initial_weights(fed, seed=seed)).double()
    recipes = [Recipe(federation=fed, steps=3, weight=1.0, private=None) for _ in sizes]
    jobs = [replace(job, x=job.x.double()) for job in jobs_of(fed, recipes, sizes, seed=seed, one_table=False)]
    found, losses = train_plainly(fed, start, jobs, Room(), width=min(fed.training.batch_size, 40))
    for i, job in enumerate(jobs):
        model = mlp.with_weights(fed, initial_weights(fed, seed=seed)).double()
        loss = plain.fit(
            model,
            job.x,
            job.y,
            training=fed.training,
            steps=3,
            noise=SimulationNoise(seed, i),
            proximal_mu=job.recipe.proximal_mu,
        )
        expected = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        difference = (found[i, : fed.parameters] - expected).abs()
        if fed.training.optimizer == "sgd":
            assert float(difference.max()) < 1e-12
        assert float(difference.quantile(0.9)) < 1e-12
        assert float(losses[i]) == pytest.approx(loss, abs=1e-12)


@pytest.mark.parametrize("optimizer", OPTIMIZERS[:5])
@pytest.mark.parametrize("batch, hidden", [(10, [200, 200]), (32, [50]), (7, [3])])
def test_without_privacy_a_usual_models_bits_do_not_depend_on_its_chunk(optimizer, batch, hidden):
    fed = document(
        inputs=10, hidden=hidden, loss="cross_entropy", activation="relu", dropout=0.0, batch=batch, optimizer=optimizer
    )
    weights, sizes = initial_weights(fed), [37, 12, 40, 1, 5, 33, 40, 8, 60]
    recipes = [Recipe(federation=fed, steps=-(-rows // batch), weight=1.0, private=None) for rows in sizes]

    def run(chunk: int) -> np.ndarray:
        return together(fed, weights, jobs_of(fed, recipes, sizes, seed=3, one_table=True), chunk=chunk)[0]

    one, three, all_ = run(1), run(3), run(9)
    assert np.array_equal(one, three) and np.array_equal(one, all_)


@pytest.mark.parametrize("is_private", [True, False])
def test_a_client_whose_numbers_explode_leaves_the_others_as_they_were(is_private):
    drawn: dict[str, Any] = {"inputs": 3, "hidden": [5], "loss": "mse", "activation": "relu", "dropout": 0.0}
    fed = document(**drawn, batch=8, optimizer={"training__learning_rate": 0.3})
    weights, sizes = initial_weights(fed), [20, 9, 30]
    recipes = private(fed, np.random.default_rng(1), 3)
    if not is_private:
        recipes = [replace(recipe, private=None, steps=4) for recipe in recipes]

    def run(bad: float) -> np.ndarray:
        jobs = jobs_of(fed, recipes, sizes, seed=3, one_table=False)
        if bad:
            jobs[1].x[:] = bad
        return together(fed, weights, jobs, chunk=3)[0]

    fine, exploded = run(0.0), run(3e38)
    assert np.isfinite(fine).all() and not np.array_equal(exploded[1], fine[1])
    assert np.isfinite(exploded[1]).all() == is_private  # under privacy each row is clipped, or left out
    for i in (0, 2):
        assert np.array_equal(exploded[i], fine[i])


def test_what_cannot_be_one_of_many_is_said():
    fed = document(inputs=3, hidden=[5], loss="mse", activation="relu", dropout=0.0, batch=8, optimizer={})
    (recipe,) = private(fed, np.random.default_rng(1), 1)
    assert recipe.private is not None
    assert unfit(recipe, 20) == "" == unfit(replace(recipe, private=None), 2**30)
    assert unfit(recipe, 0) == "it has no rows"
    assert unfit(replace(recipe, private=replace(recipe.private, arithmetic="opacus")), 9) == "its arithmetic is opacus"
    assert unfit(recipe, 2**21 + 1) == "it has more than 2097152 rows"
    loud = replace(recipe, private=replace(recipe.private, noise_multiplier=2.0**20))
    assert unfit(loud, 9) == "its noise is too large for sums in float64"


def test_the_fastest_size_of_a_chunk_is_found_while_clients_are_trained(monkeypatch):
    fed = document(inputs=3, hidden=[5], loss="mse", activation="relu", dropout=0.0, batch=8, optimizer={})
    recipes = [Recipe(federation=fed, steps=1, weight=1.0, private=None) for _ in range(100)]
    jobs, weights = jobs_of(fed, recipes, [4] * 100, seed=1, one_table=True), initial_weights(fed)
    clock = iter(range(10**6))
    monkeypatch.setattr(vector, "CHUNKS", (1, 2, 5))
    monkeypatch.setattr(vector.time, "perf_counter", lambda: next(clock))  # every chunk takes a second
    trainer = Trainer(fed, width=4)
    sizes = [len(places) for places, _ in trainer.train(weights, jobs)]
    assert sizes[:9] == [1, 1, 1, 2, 2, 2, 5, 5, 5] and max(sizes[9:]) == 5 and sum(sizes) == 100
    assert [len(places) for places, _ in trainer.train(weights, jobs[:12])] == [4, 4, 4]  # and not 5, 5, 2
    assert sorted(place for places, _ in trainer.train(weights, jobs) for place in places) == list(range(100))
