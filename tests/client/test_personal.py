"""A data owner's own version of a model: made on its own rows, chosen without its validation rows, and compared."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from client import data, personal
from client.data import Dataset
from client.personal import KINDS, NOTE, Way, personalise, saved_as, verdict
from client.training import plain
from common.document.federation import Federation
from common.errors import DataError
from common.inference.saved import SavedModel
from common.model import mlp
from common.model.weights import initial_weights
from common.privacy import noise
from tests.support import PRIVATE, federation, saved_model, table

CPU = torch.device("cpu")
NUMBER = {"schema__target": {"name": "y", "bounds": [-3, 5]}, "training__loss": "mse"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(personal, "STEPS", (0, 16, 64))
    monkeypatch.setattr(personal, "RATES", (0.02,))
    monkeypatch.setattr(personal, "PULLS", (0.01, 1e4))


def rows_of(fed: Federation, frame: pl.DataFrame) -> Dataset:
    key = bytes(32)
    return data.split(data.encode_rows(frame, fed.data_schema, key=key), fed.data_schema, key=key, device=CPU)


def flipped(rows: int, seed: int = 0) -> pl.DataFrame:
    """An owner whose rows say the opposite of what others' do."""
    frame = table(rows, seed=seed)
    return frame.with_columns(y=1 - pl.col("y"))


def good_model(**changes: Any) -> SavedModel:
    """A model that has learned what most rows say."""
    fed = federation(**changes)
    model, others = mlp.build(fed), rows_of(fed, table(1000, seed=5))
    training = fed.training.model_copy(update={"optimizer": "adam", "learning_rate": 0.02, "batch_size": 64})
    plain.fit(model, others.x, others.y, training=training, steps=300, noise=noise.seeded(1), proximal_mu=0.0)
    return SavedModel(federation=fed, weights=mlp.weights_of(model), round=3, run="small-1")


def test_an_owner_like_the_others_gains_by_joining():
    # With few rows one alone learns little.
    compared = personalise(good_model(), rows_of(federation(), table(40, seed=2).head(40)))
    assert list(compared.models) == list(KINDS)
    scores = {kind: made.scores["accuracy"] for kind, made in compared.models.items()}
    assert scores["federation"] >= scores["alone"]
    assert compared.models["federation"].way == Way()
    assert compared.models["federation"].missed <= compared.models["alone"].missed


def test_an_owner_unlike_the_others_is_told_that_alone_it_would_have_done_better():
    compared = personalise(good_model(), rows_of(federation(), flipped(400)))
    scores = {kind: made.scores["accuracy"] for kind, made in compared.models.items()}
    assert scores["federation"] < 0.3 < 0.8 < min(scores["alone"], scores["personal"])
    assert verdict(compared).endswith("alone you would have done better.")
    assert compared.best.missed == min(made.missed for made in compared.models.values())


def test_each_kind_trains_what_it_says_and_from_where_it_says(monkeypatch):
    model = good_model(model__hidden=[8, 5])
    rows = rows_of(federation(), flipped(200))
    compared = personalise(model, rows)
    head, whole, alone = (compared.models[kind].weights for kind in ("head", "personal", "alone"))
    moved = [name for name in head if not np.array_equal(head[name], model.weights[name])]
    assert moved == ["layers.2.weight", "layers.2.bias"]
    assert all(not np.array_equal(whole[name], model.weights[name]) for name in whole)
    assert compared.models["personal"].way.pull == 0.01  # held back by 10,000 it could not learn the opposite
    first = initial_weights(model.federation)
    assert (
        max(float(np.abs(alone[name] - first[name]).max()) for name in first) < 2
    )  # some steps from its first weights


def test_a_strong_pull_keeps_a_model_where_it_began(monkeypatch):
    monkeypatch.setattr(personal, "PULLS", (1e4,))
    trainer = personal._Trainer(good_model(), rows_of(federation(), flipped(200)))
    start = good_model().weights
    held = trainer.train("personal", Way(rate=0.02, pull=1e4, steps=64))
    free = trainer.train("personal", Way(rate=0.02, pull=0.0, steps=64))
    far, near = (max(float(np.abs(w[n] - start[n]).max()) for n in start) for w in (free, held))
    assert near < far / 5  # also over several parts of the path: it pulls to the federation's, not to the part's start


def test_validation_rows_choose_nothing():
    model, rows = good_model(), rows_of(federation(), flipped(200))
    other = replace(rows, validation_x=-rows.validation_x, validation_y=1 - rows.validation_y)
    one, two = personalise(model, rows), personalise(model, other)
    for kind in KINDS:
        assert (one.models[kind].way, one.models[kind].missed) == (two.models[kind].way, two.models[kind].missed)
        assert all(np.array_equal(one.models[kind].weights[n], two.models[kind].weights[n]) for n in model.weights)


def test_numbers_are_compared_by_their_error_in_the_targets_unit():
    frame = table(300).with_columns(y=pl.col("a") * 2 + 1)
    fed = federation(**NUMBER)
    model = saved_model(**NUMBER)
    compared = personalise(model, rows_of(fed, frame))
    for made in compared.models.values():
        assert float(made.right.mean()) == pytest.approx(made.scores["mae"], abs=1e-4)
        assert made.interval[0] <= made.scores["mae"] <= made.interval[1]
    assert compared.models["alone"].scores["mae"] < compared.models["federation"].scores["mae"]
    assert "is nearer than your own alone by -" in verdict(compared)
    assert verdict(compared).endswith("alone you would have done better.")


@pytest.mark.parametrize(
    "right, alone, said",
    [
        ([1] * 9 + [0], [0] * 9 + [0], "On 9 of 10 rows the federation's .* 0 it is .*: joining was worth it."),
        ([1, 0] * 5, [0, 1] * 5, "a difference that chance explains"),
        ([1] * 10, [1] * 10, "On 0 of 10 .* a difference that chance explains"),
    ],
)
def test_the_verdict_is_by_rows_on_which_two_models_differ(right, alone, said):
    compared = personalise(good_model(), rows_of(federation(), table(60)))
    models = {
        **compared.models,
        "federation": replace(compared.models["federation"], right=np.array(right, float)),
        "alone": replace(compared.models["alone"], right=np.array(alone, float)),
    }
    assert re.search(said, verdict(replace(compared, models=models, validation_rows=10)))


def test_more_rows_are_trained_on_for_longer(monkeypatch):
    assert personal._Trainer(saved_model(), rows_of(federation(), table(200)))._steps == [0, 16, 64]
    monkeypatch.setattr(personal, "STEPS", (0, 1, 4))
    # 8 passes over 750 or so rows in batches of 64.
    dataset = rows_of(federation(), table(1000))
    assert personal._Trainer(saved_model(), dataset)._steps[-1] == round(8 * dataset.rows / 64)


def test_too_few_rows_are_said():
    with pytest.raises(
        DataError, match=r"6 rows to train on and \d+ to validate on: to say anything, at least 10 and 1"
    ):
        personalise(saved_model(), replace(rows_of(federation(), table(40)), x=torch.zeros(6, 5), y=torch.zeros(6)))


def test_what_is_kept_says_that_it_is_not_private(tmp_path):
    model = saved_model(**PRIVATE)
    compared = personalise(model, rows_of(model.federation, table(100)))
    kept = saved_as(compared.best, model)
    assert kept.privacy == {"personal": NOTE} and kept.federation == model.federation
    assert kept.checked(str(Path("it"))) is kept
