from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from common.data.encoding import encode
from common.document.schema import Schema
from server.folder.folder import RunFolder
from simulations.engine import simulate
from simulations.sources import sites_from_table
from simulations.synthetic import generate
from tests.support import federation

FEATURES = [
    {"name": "a", "type": "numeric", "bounds": [-5, 20]},
    {"name": "b", "type": "numeric", "bounds": [0, 1], "missing": ["?"]},
    {"name": "c", "type": "categorical", "categories": ["red", "green", "blue"]},
    {"name": "d", "type": "categorical", "categories": [1, 2]},
    {"name": "e", "type": "categorical", "categories": [1, "other", 2.5], "optional": True},
]
TARGETS = {
    "two": {"name": "y", "classes": [0, 1]},
    "five": {"name": "y", "classes": ["v", "w", "x", "y", "z"]},
    "grouped": {"name": "y", "classes": {"healthy": [0], "disease": [1, 2, 3]}},
    "number": {"name": "y", "bounds": [-10, 30]},
}


def schema(target: str) -> Schema:
    loss = "mse" if target == "number" else "cross_entropy"
    document = {"features": FEATURES, "target": TARGETS[target], "validation_fraction": 0.25}
    return federation(schema=document, training__loss=loss).data_schema


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rows", [1, 2, 300])
def test_a_generated_table_fits_its_schema(target, rows):
    encoded = encode(generate(schema(target), rows=rows, seed=0), schema(target))
    assert encoded.x.shape == (rows, schema(target).inputs)
    assert np.isfinite(encoded.x).all()


def test_a_generated_table_has_nothing_to_report():
    encoded = encode(generate(schema("five"), rows=300, seed=0), schema("five"))
    (line,) = encoded.report.lines()  # no cell was clamped, missing or of another category
    assert line.startswith("classes: v ")


@pytest.mark.parametrize("target", TARGETS)
def test_a_seed_gives_the_same_table_and_another_a_different_one(target):
    first = generate(schema(target), rows=100, seed=3)
    assert first.equals(generate(schema(target), rows=100, seed=3))
    assert not first.equals(generate(schema(target), rows=100, seed=4))


@pytest.mark.parametrize("target, classes", [("two", 2), ("five", 5), ("grouped", 2)])
@pytest.mark.parametrize("seed", range(5))
def test_no_class_is_rare(target, classes, seed):
    encoded = encode(generate(schema(target), rows=2000, seed=seed), schema(target))
    shares = np.bincount(encoded.y, minlength=classes) / 2000
    assert shares.min() > 0.4 / classes


def test_features_cover_their_bounds_and_categories():
    frame = generate(schema("two"), rows=2000, seed=0)
    assert frame["a"].min() < -4.9 < 19.9 < frame["a"].max()
    assert frame["a"].mean() == pytest.approx(7.5, abs=4 * 25 / 12**0.5 / 2000**0.5)  # uniform on [-5, 20]
    assert frame["c"].value_counts()["count"].to_list() == pytest.approx([2000 / 3] * 3, abs=100)


def test_a_numeric_target_stays_within_its_bounds_and_spreads():
    y = generate(schema("number"), rows=2000, seed=0)["y"]
    assert -10 <= y.min() < y.max() <= 30
    assert y.std() > 4
    assert y.mean() == pytest.approx(10, abs=2)  # the middle of the bounds


@pytest.mark.parametrize("target", ["two", "five"])
def test_the_target_can_be_learned(tmp_path, target):
    document = federation(
        schema={"features": FEATURES, "target": TARGETS[target], "validation_fraction": 0.25},
        model__hidden=[32],
        training={"rounds": 5, "local_steps": 60, "batch_size": 64, "learning_rate": 0.01, "optimizer": "adam"},
    )
    sites = sites_from_table(document, 3000, clients=2, how="iid", seed=0, device=torch.device("cpu"))
    labels = torch.cat([site.dataset.validation_y for site in sites])
    majority = labels.bincount().max().item() / len(labels)
    result = simulate(document, sites, RunFolder.create(document, path=tmp_path / "run"), run="test")
    assert result["evaluation"]["accuracy"] > majority + 0.15


def test_a_numeric_target_can_be_learned(tmp_path):
    document = federation(
        schema={"features": FEATURES, "target": TARGETS["number"], "validation_fraction": 0.25},
        model__hidden=[32],
        training={
            "rounds": 5,
            "local_steps": 60,
            "batch_size": 64,
            "learning_rate": 0.01,
            "optimizer": "adam",
            "loss": "mse",
        },
    )
    sites = sites_from_table(document, 3000, clients=2, how="iid", seed=0, device=torch.device("cpu"))
    y = torch.cat([site.dataset.validation_y for site in sites]).double() * 40  # bounds are 40 apart
    result = simulate(document, sites, RunFolder.create(document, path=tmp_path / "run"), run="test")
    assert result["evaluation"]["mse"] < 0.5 * y.var().item()  # the mean alone gives the variance


def test_a_generated_table_survives_a_file(tmp_path):
    frame = generate(schema("grouped"), rows=50, seed=0)
    frame.write_csv(tmp_path / "t.csv")
    again = encode(pl.read_csv(tmp_path / "t.csv", infer_schema=False), schema("grouped"))
    assert np.array_equal(again.x, encode(frame, schema("grouped")).x)
