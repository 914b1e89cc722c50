"""Counts and figures by group against plain loops over rows, and noise against noise that is drawn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.document.group import OTHER
from common.document.schema import Schema
from common.model import objective
from common.model.gaps import Figure, gaps
from common.model.scores import (
    COUNT_UNIT,
    count_sensitivity,
    count_size,
    gaps_between,
    headlines_of,
    noise_of_figure,
    rows_of,
    scores_of,
)
from tests.support import federation

KINDS = {
    "classes": {"schema__target": {"name": "y", "classes": [0, 1, 2]}},
    "number": {"schema__target": {"name": "y", "bounds": [-3, 5]}, "training__loss": "mse"},
}
GROUP = {"name": "site", "groups": ["a", "b"]}


def schema(kind: str, *, calibration: bool = False) -> Schema:
    return federation(**KINDS[kind], schema__group={**GROUP, "calibration": calibration}).data_schema


def rows_for(kind: str, n: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Predictions, targets, groups and confidences."""
    rng = np.random.default_rng(seed)
    group, sure = torch.from_numpy(rng.integers(0, 3, n)), torch.from_numpy(rng.uniform(0, 1, n))
    if kind == "number":
        return torch.from_numpy(rng.uniform(0, 1, n)), torch.from_numpy(rng.uniform(0, 1, n)), group, sure
    return torch.from_numpy(rng.integers(0, 3, n)), torch.from_numpy(rng.integers(0, 3, n)), group, sure


@pytest.mark.parametrize("calibration", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_groups_counts_are_those_of_its_rows(kind, calibration):
    place = schema(kind, calibration=calibration)
    predicted, y, group, sure = rows_for(kind, 200)
    total = objective.counts(predicted, y, place, group=group, confidence=sure)
    assert total.shape == (count_size(place),)
    for i, counts in enumerate(total.reshape(3, -1)):
        its = group == i
        alone = objective.counts(predicted[its], y[its], place.ungrouped)
        assert np.array_equal(counts[: len(alone)], alone)
        if calibration:
            share = sure[its] if kind == "classes" else (1 + predicted[its] - y[its]) / 2
            assert counts[-1] == pytest.approx(float(share.sum()), abs=200 * COUNT_UNIT)


@given(
    st.sampled_from(list(KINDS)),
    st.booleans(),
    st.integers(0, 2),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(allow_nan=True),
)
def test_a_row_moves_its_own_groups_counts_by_at_most_the_sensitivity(kind, calibration, of, guess, truth, sure):
    place = schema(kind, calibration=calibration)
    whole = kind == "classes"
    one = [torch.tensor([int(v * 2.99) if whole else v]) for v in (guess, truth)]
    moved = objective.counts(
        one[0], one[1], place, group=torch.tensor([of]), confidence=torch.tensor([sure], dtype=torch.float64)
    )
    assert np.linalg.norm(moved) <= count_sensitivity(place)
    assert (moved >= 0).all() and np.array_equal(moved / COUNT_UNIT, np.rint(moved / COUNT_UNIT))
    others = np.delete(moved.reshape(3, -1), of, axis=0)
    assert not others.any() and moved.any()


def test_the_sensitivity_is_reached():
    for kind, expected in (("classes", math.sqrt(2)), ("number", 2.0)):
        place = schema(kind, calibration=True)
        worst = objective.counts(
            torch.tensor([1]), torch.tensor([0]), place, group=torch.tensor([1]), confidence=torch.ones(1)
        )
        assert np.linalg.norm(worst) == pytest.approx(expected) == count_sensitivity(place)


def test_what_does_not_go_together_is_an_error():
    predicted, y, group, _ = rows_for("classes", 5)
    with pytest.raises(ValueError, match="rows must have groups"):
        objective.counts(predicted, y, schema("classes"))
    with pytest.raises(ValueError, match="rows must have groups"):
        objective.counts(predicted, y, schema("classes").ungrouped, group=group)
    with pytest.raises(ValueError, match="needs the confidences"):
        objective.counts(predicted, y, schema("classes", calibration=True), group=group)
    with pytest.raises(ValueError, match="one number for each row"):
        objective.counts(predicted, y, schema("classes"), group=group[:1])


@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_together_have_the_figures_of_no_groups(kind):
    place = schema(kind, calibration=True)
    predicted, y, group, sure = rows_for(kind, 300)
    total = objective.counts(predicted, y, place, group=group, confidence=sure)
    found = scores_of(total, place)
    expected = scores_of(objective.counts(predicted, y, place.ungrouped), place.ungrouped)
    assert set(found) == {*expected, "by", "bias" if kind == "number" else "overconfidence"}
    for name in expected:
        assert found[name] == expected[name]
    assert rows_of(total, place) == 300 == found["rows"]
    first = "accuracy" if kind == "classes" else "mae"
    assert found[first] == pytest.approx(expected[first])
    assert headlines_of(np.stack([total, 0 * total]), place) == pytest.approx([expected[first], math.nan], nan_ok=True)


def test_figures_of_groups_of_classes_by_hand():
    place = federation(
        schema__target={"name": "y", "classes": ["well", "ill"]},
        schema__group={**GROUP, "calibration": True},
    ).data_schema
    # Confusion [true, predicted] of each group, and the sum of its confidences.
    total = np.array([[40, 10, 5, 45, 90], [30, 0, 30, 0, 42], [0, 0, 0, 2, 2.0]]).ravel()
    by = scores_of(total, place)["by"]["site"]
    a, b, other = (by["groups"][name] for name in ("a", "b", OTHER))
    assert a["accuracy"] == 0.85 and b["accuracy"] == 0.5 and other["accuracy"] == 1.0
    assert a["recall"] == {"well": 0.8, "ill": 0.9} and b["recall"] == {"well": 1.0, "ill": 0.0}
    assert other["recall"] == {"ill": 1.0} and other["rows"] == 2
    assert a["overconfidence"] == pytest.approx(0.05) and b["overconfidence"] == pytest.approx(0.2)
    assert by["gaps"]["accuracy"] == pytest.approx({"gap": 0.35, "worst": "b", "best": "a"})
    assert by["gaps"]["recall of ill"] == pytest.approx({"gap": 0.9, "worst": "b", "best": "a"})
    assert by["gaps"]["recall of well"] == pytest.approx({"gap": 0.2, "worst": "a", "best": "b"})
    assert by["gaps"]["overconfidence"] == pytest.approx({"gap": 0.15, "worst": "b", "best": "a"})


def test_figures_of_groups_of_numbers_by_hand():
    place = schema("number", calibration=True)  # the range is 8
    total = np.array([[50, 5, 1, 27.5], [100, 20, 6, 40], [0, 0, 0, 0.0]]).ravel()
    by = scores_of(total, place)["by"]["site"]
    assert by["groups"]["a"]["mae"] == pytest.approx(0.8) and by["groups"]["a"]["bias"] == pytest.approx(0.8)
    assert by["groups"]["b"]["mae"] == pytest.approx(1.6) and by["groups"]["b"]["bias"] == pytest.approx(-1.6)
    assert by["groups"][OTHER] == {"rows": 0.0}
    assert by["gaps"]["mae"] == pytest.approx({"gap": 0.8, "worst": "b", "best": "a"})
    assert by["gaps"]["bias"] == pytest.approx({"gap": 2.4, "worst": "b", "best": "a"})


def test_figures_of_noisy_groups_stay_where_they_can_be():
    place = federation(
        schema__target={"name": "y", "classes": ["well", "ill"]}, schema__group={**GROUP, "calibration": True}
    ).data_schema
    # More hits than rows, fewer than none, and no rows at all.
    total = np.array([[50, -10, -10, 50, 900], [-20, 60, 60, -20, -50], [-5, -5, -5, -5, 3.0]]).ravel()
    groups = scores_of(total, place, noise=1.0)["by"]["site"]["groups"]
    assert groups["a"]["accuracy"] == 1.0 and groups["a"]["recall"] == {"well": 1.0, "ill": 1.0}
    assert groups["a"]["overconfidence"] == 1.0 and groups["b"]["overconfidence"] == pytest.approx(-0.125)
    assert groups["b"]["accuracy"] == 0.0 and groups["b"]["recall"] == {"well": 0.0, "ill": 0.0}
    assert groups[OTHER] == {"rows": 0.0, "recall": {}, "rows_of_class": {}}
    numbers = schema("number", calibration=True)  # the range is 8
    total = np.array([[50, 70, 60, 90], [50, -7, -6, -9], [-3, 1, 1, 1.0]]).ravel()
    groups = scores_of(total, numbers, noise=1.0)["by"]["site"]["groups"]
    assert groups["a"] == {"rows": 50, "mae": 8.0, "rmse": 8.0, "bias": 8.0}
    assert groups["b"] == {"rows": 50, "mae": 0.0, "rmse": 0.0, "bias": -8.0}


def test_groups_of_few_rows_or_less_than_their_noise_are_not_compared():
    place = federation(schema__target={"name": "y", "classes": ["well", "ill"]}, schema__group=GROUP).data_schema
    total = np.array([[50, 50, 50, 50], [40, 0, 40, 0], [5, 5, 5, 5.0]]).ravel()
    found = scores_of(total, place)["by"]["site"]
    assert set(found["gaps"]) == {"accuracy", "recall of well", "recall of ill"}
    assert found["gaps"]["accuracy"]["best"] == "a"  # of `(other)`, 20 rows, nothing is said
    assert scores_of(total, place, few=0)["by"]["site"]["gaps"]["accuracy"]["gap"] == 0
    # A group's rows are 4 counts: 80 of them exceed 3 x 2 x 13 = 78; a class' are 2: 40 do not exceed 3 x 13 x 1.41.
    noisy = scores_of(total, place, noise=13.0)["by"]["site"]["gaps"]
    assert set(noisy) == {"accuracy"} and noisy["accuracy"]["noise"] > 0
    assert scores_of(total, place, noise=14.0)["by"]["site"]["gaps"] == {}


@pytest.mark.parametrize("k", [2, 5, 10, 60])
def test_the_noise_of_a_group_or_client_without_rows_does_not_look_like_rows(k):
    classes = {"name": "y", "classes": list(range(k))}
    place = federation(schema__target=classes, schema__group={"name": "site", "groups": ["a", "b"]}).data_schema
    full = np.full((k, k), 10.0)
    np.fill_diagonal(full, 90.0 * (k - 1))
    exact, noise, rng = np.concatenate([full.ravel(), full.ravel(), np.zeros(k * k)]), 5.0, np.random.default_rng(k)
    told, of_clients = [], []
    for _ in range(100):
        noisy = exact + noise * rng.normal(size=exact.shape)
        by = scores_of(noisy, place, noise=noise, few=0)["by"]["site"]
        told.append(OTHER in (by["gaps"]["accuracy"]["worst"], by["gaps"]["accuracy"]["best"]))
        assert by["groups"]["a"]["rows"] == pytest.approx(full.sum(), abs=5 * noise * k)
        clients = {name: full.ravel() + noise * rng.normal(size=k * k) for name in ("ada", "ben")}
        clients["cyd"] = noise * rng.normal(size=k * k)
        ends = gaps_between(clients, place.ungrouped, noise=noise, few=0)["accuracy"]
        of_clients.append("cyd" in (ends["worst"], ends["best"]))
    # Beyond three deviations on one side by chance: 1 in 740.
    assert sum(told) <= 2 and sum(of_clients) <= 2


def test_gaps_between_clients_are_over_all_their_groups():
    place = federation(schema__target={"name": "y", "classes": ["well", "ill"]}, schema__group=GROUP).data_schema
    clients = {
        "ada": np.array([10, 0, 0, 10, 10, 0, 0, 10, 0, 0, 0, 0.0]),
        "ben": np.array([10, 10, 0, 0, 0, 0, 10, 10, 0, 0, 0, 0.0]),
    }
    found = gaps_between(clients, place)
    assert found["accuracy"] == {"gap": 0.5, "worst": "ben", "best": "ada"}
    assert set(found) == {"accuracy"}  # each class has 20 rows, too few
    # 40 rows are 4 counts of 3 groups each.
    assert gaps_between(clients, place, noise=3.8)["accuracy"]["noise"] > 0
    assert gaps_between(clients, place, noise=3.9) == {}


def test_a_gap_of_what_has_a_sign_is_between_the_ends_and_the_worst_is_farthest_from_zero():
    found = gaps({"a": {"bias": Figure(0.1)}, "b": {"bias": Figure(-0.3)}, "c": {"bias": Figure(-0.05)}, "d": {}})
    assert found == {"bias": {"gap": pytest.approx(0.4), "worst": "b", "best": "c"}}
    assert gaps({"a": {"mae": Figure(1.0)}}) == {}
    noisy = gaps({"a": {"accuracy": Figure(0.5, 3.0)}, "b": {"accuracy": Figure(0.7, 4.0)}})
    assert noisy["accuracy"]["noise"] == 5.0


@pytest.mark.parametrize("name", ["accuracy", "recall of 1", "overconfidence", "mae", "bias"])
def test_the_noise_of_a_figure_is_that_of_figures_from_noisy_counts(name):
    kind = "number" if name in ("mae", "bias") else "classes"
    place, s = schema(kind, calibration=True).ungrouped, 4.0
    whole = schema(kind, calibration=True)
    cells = [700, 40, 60, 30, 500, 20, 10, 50, 590, 1500.0] if kind == "classes" else [2000, 300, 90, 1100.0]
    rng = np.random.default_rng(0)

    def figure(counts: np.ndarray[Any, Any]) -> float:
        scores = scores_of(np.concatenate([counts, np.zeros(2 * len(counts))]), whole)["by"]["site"]["groups"]["a"]
        return float(scores["recall"]["1"] if "recall" in name else scores[name])

    rows = sum(cells[3:6]) if "recall" in name else sum(cells[:9]) if kind == "classes" else cells[0]
    drawn = np.std([figure(np.array(cells) + s * rng.normal(size=len(cells))) for _ in range(4000)])
    assert noise_of_figure(name, figure(np.array(cells)), rows, place, s) == pytest.approx(drawn, rel=0.05)
    assert noise_of_figure(name, 0.5, rows, place, 0.0) == 0.0
