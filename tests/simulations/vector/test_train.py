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
from client.training.kernel import Room
from client.training.recipe import DPSGD, Recipe
from client.training.row_draws import row_ids
from client.training.train import train
from common.document.federation import Federation
from common.model import mlp
from common.model.weights import Weights, initial_weights
from simulations.noise import SimulationNoise
from simulations.vector.jobs import Job
from simulations.vector.models import flat_of
from simulations.vector.plain import train_plainly
from simulations.vector.train import Trainer, chunks_of, unfit
from tests.support import PRIVATE, federation

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
    trainer = Trainer(fed, width=width)
    for start in range(0, len(jobs), chunk):
        places = range(start, min(start + chunk, len(jobs)))
        updates = trainer.train(weights, [jobs[place] for place in places])
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


@settings(max_examples=60, deadline=None)
@given(**{**CASES, "sizes": st.lists(st.integers(1, 40), min_size=9, max_size=12)})
def test_a_chunks_bits_do_not_depend_on_what_its_worker_did_before(seed, sizes, chunk, one_table, **drawn):
    fed = document(**drawn)
    weights, rng = initial_weights(fed, seed=seed), np.random.default_rng(seed)
    recipes = [Recipe(federation=fed, steps=int(rng.integers(1, 9)), weight=2.0, private=None) for _ in sizes]

    def run(*, backwards: bool) -> dict[int, bytes]:
        trainer, found = Trainer(fed, width=min(fed.training.batch_size, 40)), {}
        jobs = jobs_of(fed, recipes, sizes, seed=seed, one_table=one_table)
        chunks = [jobs[start : start + chunk] for start in range(0, len(jobs), chunk)]
        for some in reversed(chunks) if backwards else chunks:
            updates = trainer.train(weights, some)
            found |= {job.node: flat.tobytes() for job, flat in zip(some, updates.flat, strict=True)}
        return found

    assert run(backwards=True) == run(backwards=False)


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


def cut(hidden: list[int], sizes: list[int], *, is_private: bool = False, **how: Any) -> list[list[Job]]:
    drawn: dict[str, Any] = {"inputs": 5, "loss": "cross_entropy", "activation": "relu", "dropout": 0.0, "batch": 4}
    fed = document(**drawn, hidden=hidden, optimizer=PRIVATE if is_private else {})
    recipes = [Recipe(federation=fed, steps=-(-rows // 4), weight=1.0, private=None) for rows in sizes]
    jobs = jobs_of(fed, recipes, sizes, seed=1, one_table=True)
    return chunks_of(jobs, fed, **{"width": 4, "device": torch.device("cpu"), "workers": 1} | how)


@given(
    sizes=st.lists(st.integers(1, 40), max_size=120),
    hidden=st.sampled_from([[3], [50], [200, 200], [1500, 1500]]),
    is_private=st.booleans(),
    workers=st.integers(1, 200),
    device=st.sampled_from([torch.device("cpu"), torch.device("cuda")]),
)
@settings(max_examples=60, deadline=None)
def test_each_client_is_in_one_chunk_beside_others_of_its_size(sizes, hidden, **how):
    chunks = cut(hidden, sizes, **how)
    assert sorted(job.node for chunk in chunks for job in chunk) == list(range(len(sizes)))
    assert [job.rows for chunk in chunks for job in chunk] == sorted(sizes, reverse=True)
    if sizes:
        assert max(map(len, chunks)) - min(map(len, chunks)) <= 1


@pytest.mark.parametrize("hidden, length", [([50], 50), ([200, 200], 13), ([500, 500], 5), ([1500, 1500], 1)])
def test_without_privacy_chunks_are_the_same_whatever_the_number_of_workers(hidden, length):
    nodes = [
        [[job.node for job in chunk] for chunk in cut(hidden, [9, 30, 7, 40, 8] * 20, workers=workers)]
        for workers in (1, 2, 64)
    ]
    assert nodes[0] == nodes[1] == nodes[2]
    assert max(map(len, nodes[0])) == length


def test_private_chunks_are_for_as_many_workers_as_there_are_and_a_gpus_for_its_memory():
    assert [len(chunk) for chunk in cut([50], [9] * 60, is_private=True)] == [30, 30]
    assert [len(chunk) for chunk in cut([50], [9] * 60, is_private=True, workers=4)] == [15] * 4
    assert [len(chunk) for chunk in cut([50], [9] * 100, device=torch.device("cuda"), workers=2)] == [100]
    assert [len(chunk) for chunk in cut([1500, 1500], [9] * 20, device=torch.device("cuda"))] == [10, 10]
    # A chunk of large batches is small, on a CPU too: 57 units a row, 64 bytes each.
    assert max(map(len, cut([50], [9] * 60, width=100_000))) == 2
