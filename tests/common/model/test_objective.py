"""Losses against torch or hand arithmetic; metrics against a confusion matrix worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from client.training.train import noisy_counts
from common.document.schema import Schema
from common.model import objective
from common.model.scores import count_sensitivity, count_size, headlines_of, scores_of
from common.privacy import noise
from tests.support import federation


def schema(classes: int) -> Schema:
    """A target of so many classes, or a number from 100 to 300 for 0."""
    target: dict[str, Any] = {"name": "y", "classes": [f"c{i}" for i in range(classes)]}
    if not classes:
        target = {"name": "y", "bounds": [100, 300]}
    loss = "cross_entropy" if classes else "mse"
    return federation(schema__target=target, training__loss=loss).data_schema


THREE, NUMBER = schema(3), schema(0)


class Echo(torch.nn.Module):
    """Puts out its input, and remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.batches.append(len(x))
        return x


def test_cross_entropy_of_each_row():
    # -log softmax: equal logits give log 3; logits (log 8, 0, 0) give log(10 / 8) for class 0 and log 10 for class 1.
    logits = torch.tensor([[0.0, 0.0, 0.0], [math.log(8), 0.0, 0.0], [math.log(8), 0.0, 0.0]])
    losses = objective.row_losses(logits, torch.tensor([2, 0, 1]), "cross_entropy")
    assert_allclose(losses, [math.log(3), math.log(10 / 8), math.log(10)], rtol=1e-6)


def test_binary_cross_entropy_of_each_row():
    # The logit log 3 is a probability of 3 / 4.
    logits = torch.tensor([[0.0], [math.log(3)], [math.log(3)]])
    losses = objective.row_losses(logits, torch.tensor([1, 1, 0]), "binary_cross_entropy")
    assert_allclose(losses, [math.log(2), math.log(4 / 3), math.log(4)], rtol=1e-6)


def test_squared_error_of_each_row():
    losses = objective.row_losses(torch.tensor([[0.5], [-1.0]]), torch.tensor([0.25, 1.0]), "mse")
    assert_allclose(losses, [0.0625, 4.0])


@pytest.mark.parametrize("loss, outputs", [("cross_entropy", 3), ("binary_cross_entropy", 1), ("mse", 1)])
def test_no_rows_have_no_losses(loss, outputs):
    assert objective.row_losses(torch.zeros(0, outputs), torch.zeros(0, dtype=torch.int64), loss).shape == (0,)


def test_the_two_losses_for_two_classes_agree():
    logits = torch.linspace(-5, 5, 11)[:, None]
    y = torch.arange(11) % 2
    pair = torch.cat([torch.zeros_like(logits), logits], dim=1)
    assert_allclose(
        objective.row_losses(logits, y, "binary_cross_entropy"),
        objective.row_losses(pair, y, "cross_entropy"),
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    "loss, logits, expected",
    [
        ("cross_entropy", [[1.0, 3.0, 2.0], [5.0, -1.0, 0.0]], [1, 0]),
        ("binary_cross_entropy", [[0.1], [-0.1], [0.0]], [1, 0, 0]),
        ("mse", [[0.3], [-2.0], [7.0]], [0.3, 0.0, 1.0]),
    ],
)
def test_predictions(loss, logits, expected):
    assert_allclose(objective.predictions(torch.tensor(logits), loss), expected)


def test_the_confusion_matrix_has_a_row_for_each_true_class():
    y = torch.tensor([0, 0, 0, 1, 2, 2])
    predicted = torch.tensor([0, 1, 1, 1, 0, 2])
    assert_array_equal(objective.counts(predicted, y, THREE), [1, 2, 0, 0, 1, 0, 1, 0, 1])


def test_counts_of_a_numeric_target_are_rows_and_sums_of_errors():
    # Errors 0.5, 0.25 and 0: absolute 0.75, squared 0.25 + 0.0625.
    counts = objective.counts(torch.tensor([0.5, 0.75, 1.0]), torch.tensor([0.0, 1.0, 1.0]), NUMBER)
    assert_array_equal(counts, [3, 0.75, 0.3125])


def test_an_error_is_rounded_before_it_is_added_so_that_no_order_shows():
    # 0.3 and 0.1 are no multiples of 2^-20: each row's error is, and so is every sum, exactly.
    predicted, y = torch.tensor([0.3, 0.1] * 500), torch.zeros(1000)
    counts = objective.counts(predicted, y, NUMBER)
    absolute = 500 * (round(0.3 * 2**20) + round(0.1 * 2**20))
    squared = 500 * (round(0.09 * 2**20) + round(0.01 * 2**20))
    assert_array_equal(counts, [1000, absolute / 2**20, squared / 2**20])


def test_a_prediction_that_is_no_number_is_the_largest_error_there_is():
    predicted = objective.predictions(torch.tensor([[math.nan], [math.inf]]), "mse")
    assert_array_equal(objective.counts(predicted, torch.tensor([0.5, 0.0]), NUMBER), [2, 2, 2])


@pytest.mark.parametrize("place", [THREE, NUMBER])
def test_an_empty_table_counts_nothing(place):
    empty = torch.zeros(0, dtype=torch.int64)
    assert_array_equal(objective.counts(empty, empty, place), np.zeros(count_size(place)))


CONFUSION = np.array([[5, 1, 0], [2, 3, 1], [0, 4, 4]], float)  # [true, predicted]


def test_metrics_of_a_confusion_matrix_worked_out_by_hand():
    # 20 rows, 12 on the diagonal. Columns sum to 7, 8, 5; rows to 6, 6, 8.
    precision, recall = [5 / 7, 3 / 8, 4 / 5], [5 / 6, 3 / 6, 4 / 8]
    f1 = [10 / 13, 6 / 14, 8 / 13]  # 2 hits / (row + column): 13, 14 and 13
    metrics = scores_of(CONFUSION.ravel(), THREE)
    per_class = metrics.pop("per_class")
    assert metrics.pop("confusion") == CONFUSION.reshape(3, 3).tolist()
    assert metrics.pop("rows") == 20
    assert metrics == pytest.approx(
        {"accuracy": 0.6, "precision": sum(precision) / 3, "recall": sum(recall) / 3, "f1": sum(f1) / 3}
    )
    assert list(per_class) == ["c0", "c1", "c2"]
    for i, values in enumerate(per_class.values()):
        assert values == pytest.approx({"precision": precision[i], "recall": recall[i], "f1": f1[i]})


def test_a_class_that_is_never_predicted_scores_zero_and_one_that_never_occurs_does_not_count():
    # Class 2 never occurs and is never predicted; class 1 occurs but is never predicted.
    metrics = scores_of(np.array([4, 0, 0, 2, 0, 0, 0, 0, 0], float), THREE)
    assert metrics["per_class"]["c1"] == {"precision": 0, "recall": 0, "f1": 0}
    assert metrics["per_class"]["c2"] == {"precision": None, "recall": None, "f1": None}
    # Class 0 has 4 of 6 predictions right, and all of its 4 rows: precision 2/3, recall 1, f1 4/5.
    assert (metrics["precision"], metrics["recall"], metrics["f1"]) == pytest.approx((1 / 3, 1 / 2, 2 / 5))
    assert metrics["accuracy"] == pytest.approx(4 / 6)


@pytest.mark.parametrize("place", [THREE, NUMBER])
def test_there_are_no_metrics_of_nothing(place):
    assert scores_of(np.zeros(count_size(place)), place) == {}
    assert scores_of(np.full(count_size(place), -2.0), place) == {}  # noise below nothing


def test_negative_noisy_counts_are_read_as_none():
    noisy, clean = CONFUSION.copy(), CONFUSION.copy()
    noisy[0, 2], noisy[2, 0], clean[0, 2], clean[2, 0] = -3.5, -0.1, 0, 0
    assert scores_of(noisy.ravel(), THREE) == scores_of(clean.ravel(), THREE)


@given(noisy=st.lists(st.floats(-1e6, 1e6), min_size=9, max_size=9))
def test_metrics_of_any_noisy_counts_are_between_zero_and_one(noisy):
    metrics = scores_of(np.array(noisy), THREE)
    assert metrics.pop("rows", 0.0) >= 0
    assert all(value >= 0 for row in metrics.pop("confusion", []) for value in row)
    values = [v for c in metrics.pop("per_class", {}).values() for v in c.values()] + list(metrics.values())
    assert all(0 <= value <= 1 + 1e-9 for value in values if value is not None)
    assert bool(metrics) == (sum(noisy) > 0)


def test_a_confusion_matrix_is_told_of_a_few_classes_only():
    for k, told in ((10, True), (11, False)):
        assert ("confusion" in scores_of(np.ones(k * k), schema(k))) == told


def test_headlines_are_each_clients_accuracy_or_error():
    counts = np.array([CONFUSION.ravel(), np.zeros(9), -np.ones(9), np.eye(3).ravel()])
    assert headlines_of(counts, THREE) == pytest.approx([0.6, np.nan, np.nan, 1.0], nan_ok=True)
    assert headlines_of(np.array([[4.0, 1.0, 9.0]]), NUMBER) == pytest.approx([200 / 4])


def test_metrics_do_not_change_the_counts():
    counts = np.array([-1.0, 2, 3])
    scores_of(counts, NUMBER)
    assert_array_equal(counts, [-1, 2, 3])


def test_errors_of_a_numeric_target_are_in_its_own_unit():
    # The target runs over 200 units: predicted 150 for 100, 250 for 300 and 300 for 300.
    scaled = objective.counts(torch.tensor([0.25, 0.75, 1.0]), torch.tensor([0.0, 1.0, 1.0]), NUMBER)
    found = scores_of(scaled, NUMBER)
    assert found.pop("scaled") == pytest.approx({"mae": 1 / 6, "mse": 1 / 24})
    assert found.pop("rows") == 3
    assert found == pytest.approx({"mae": 100 / 3, "mse": 5000 / 3, "rmse": math.sqrt(5000 / 3)})


def test_a_noisy_row_count_below_one_does_not_blow_up_the_errors():
    found = scores_of(np.array([0.01, 0.5, 0.25]), NUMBER)
    assert found.pop("scaled") == {"mae": 0.5, "mse": 0.25}
    assert found.pop("rows") == 0.01
    assert found == pytest.approx({"mae": 100, "mse": 10_000, "rmse": 100})


ROWS = st.integers(1, 30)
LOGITS = st.floats(width=32, allow_subnormal=False)  # also NaN and infinities: a model may diverge


@pytest.mark.parametrize(
    "place, loss, outputs",
    [(THREE, "cross_entropy", 3), (schema(2), "binary_cross_entropy", 1), (NUMBER, "mse", 1)],
)
@given(data=st.data(), rows=ROWS)
def test_one_row_moves_the_counts_by_at_most_their_sensitivity(place, loss, outputs, data, rows):
    logits = torch.tensor(
        data.draw(st.lists(st.lists(LOGITS, min_size=outputs, max_size=outputs), min_size=rows, max_size=rows))
    )
    labels = st.floats(0, 1, width=32) if loss == "mse" else st.integers(0, place.outputs - 1)
    y = torch.tensor(data.draw(st.lists(labels, min_size=rows, max_size=rows)))
    predicted = objective.predictions(logits, loss)
    less, more = objective.counts(predicted[1:], y[1:], place), objective.counts(predicted, y, place)
    assert more.shape == (count_size(place),)
    assert np.linalg.norm(more - less) <= count_sensitivity(place) * (1 + 1e-6)


@pytest.mark.parametrize("place", [THREE, NUMBER])
def test_counts_with_noise_have_the_variance_that_is_charged(place):
    quiet, multiplier, n = np.arange(float(count_size(place))), 2.5, 3000
    source = noise.seeded(4)
    drawn = np.concatenate([noisy_counts(quiet, place, multiplier, source) - quiet for _ in range(n)])
    deviation = multiplier * count_sensitivity(place)
    share = 5 * math.sqrt(2 / len(drawn))
    assert drawn.var() / deviation**2 == pytest.approx(1, abs=share)
    assert drawn.var() / (1.1 * deviation) ** 2 != pytest.approx(1, abs=share)
    assert abs(drawn.mean()) < 5 * deviation / math.sqrt(len(drawn))


def test_the_sensitivity_is_reached_and_so_cannot_be_lower():
    worst = objective.counts(torch.tensor([1.0]), torch.tensor([0.0]), NUMBER)
    assert np.linalg.norm(worst) == pytest.approx(count_sensitivity(NUMBER)) == math.sqrt(3)
    one = objective.counts(torch.tensor([1]), torch.tensor([0]), THREE)
    assert np.linalg.norm(one) == count_sensitivity(THREE) == 1


@pytest.mark.parametrize("place, loss, outputs", [(THREE, "cross_entropy", 3), (NUMBER, "mse", 1)])
@given(rows=ROWS, cut=st.integers(0, 30), seed=st.integers(0, 10**6))
def test_counts_of_two_tables_add_up(place, loss, outputs, rows, cut, seed):
    generator = torch.Generator().manual_seed(seed)
    predicted = objective.predictions(torch.randn(rows, outputs, generator=generator), loss)
    y = torch.rand(rows, generator=generator) if loss == "mse" else torch.randint(3, (rows,), generator=generator)
    parts = [objective.counts(predicted[part], y[part], place) for part in (slice(cut), slice(cut, None))]
    assert_array_equal(sum(parts), objective.counts(predicted, y, place))


@pytest.mark.parametrize("batch, batches", [(4, [4, 4, 2]), (5, [5, 5]), (100, [10])])
def test_a_table_is_scored_in_batches_without_gradients(monkeypatch, batch, batches):
    monkeypatch.setattr(objective, "SCORING_BATCH", batch)
    model = Echo()
    logits = torch.eye(3)[torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])]
    y = torch.tensor([0, 1, 2, 0, 1, 2, 1, 2, 0, 2])
    counts = objective.score(model, logits, y, schema=THREE, loss="cross_entropy")
    # Six hits, then 1 taken for 0, 2 for 1, 0 for 2 and 2 for 0.
    assert_array_equal(counts.reshape(3, 3), [[2, 0, 1], [1, 2, 0], [1, 1, 2]])
    assert model.batches == batches


def test_an_empty_table_is_scored_as_nothing():
    counts = objective.score(Echo(), torch.zeros(0, 1), torch.zeros(0), schema=NUMBER, loss="mse")
    assert_array_equal(counts, [0, 0, 0])
