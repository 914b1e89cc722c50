"""Several targets at once against each by itself: losses, predictions, counts, figures, and the model of one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from common.document import documents
from common.document import federation as federations
from common.document.heads import Head
from common.errors import ConfigError
from common.inference import saved
from common.inference.saved import SavedModel
from common.model import mlp, objective
from common.model.scores import COUNT_UNIT, count_sensitivity, count_size, headlines_of, rows_of, scores_of
from common.model.weights import initial_weights
from common.wire import codec
from tests.support import federation

ALSO: dict[str, Any] = {
    "schema__also": [
        {"name": "kind", "classes": ["p", "q", "r"], "optional": True, "weight": 0.5},
        {"name": "size", "bounds": [10, 30], "missing": ["?"], "weight": 2.0},
    ],
}
FED = federation(**ALSO)
PLACE = FED.data_schema
GROUPED = federation(**ALSO, schema__group={"name": "c", "groups": ["red"], "calibration": True}).data_schema


def some_rows(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, 6], and targets [n, 3] of which a third lacks each."""
    rng = np.random.default_rng(seed)
    y = np.stack([rng.integers(0, 2, n), rng.integers(0, 3, n), rng.uniform(0, 1, n)], 1)
    y[rng.random(y.shape) < 1 / 3] = np.nan
    return torch.from_numpy(rng.normal(size=(n, 6))).float(), torch.from_numpy(y).float()


def test_a_model_has_a_head_for_each_target():
    assert FED.heads == (Head("cross_entropy", 2, 1.0), Head("cross_entropy", 3, 0.5), Head("mse", 1, 2.0))
    assert FED.loss == FED.heads and FED.layer_sizes == (5, 8, 6)
    single = federation(training__loss="binary_cross_entropy")
    assert single.loss == "binary_cross_entropy" and single.layer_sizes == (5, 8, 1)
    assert federation(**ALSO, training__loss="binary_cross_entropy").layer_sizes == (5, 8, 5)


def test_the_loss_is_the_weighted_sum_of_the_targets_that_a_row_has():
    logits, y = some_rows(50)
    found = objective.row_losses(logits, y, FED.heads)
    for i, row in enumerate(y):
        total = 0.0
        if not row[0].isnan():
            total += functional.cross_entropy(logits[i : i + 1, :2], row[:1].long()).item()
        if not row[1].isnan():
            total += 0.5 * functional.cross_entropy(logits[i : i + 1, 2:5], row[1:2].long()).item()
        if not row[2].isnan():
            total += 2.0 * (logits[i, 5] - row[2]).item() ** 2
        assert found[i].item() == pytest.approx(total, rel=1e-5)


def test_a_target_that_a_row_lacks_has_no_gradient():
    logits, y = some_rows(60)
    logits.requires_grad_()
    objective.row_losses(logits, y, FED.heads).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and logits.grad.isfinite().all()
    for columns, lacks in zip((slice(0, 2), slice(2, 5), slice(5, 6)), y.isnan().T, strict=True):
        moved = logits.grad[:, columns].abs().sum(1)
        assert not moved[lacks].any() and moved[~lacks].all()


def test_labels_of_another_shape_are_refused():
    logits, y = some_rows(5)
    for wrong in (y[:, :2], y[:1], y[:, 0]):
        with pytest.raises(ValueError, match="one number for each row"):
            objective.row_losses(logits, wrong, FED.heads)


def test_predictions_and_confidences_are_those_of_each_head():
    logits, _ = some_rows(40)
    found, sure = objective.predictions(logits, FED.heads), objective.confidences(logits, FED.heads)
    assert torch.equal(found[:, 0], logits[:, :2].argmax(1).double())
    assert torch.equal(found[:, 1], logits[:, 2:5].argmax(1).double())
    assert torch.equal(found[:, 2], logits[:, 5].clamp(0, 1).double())
    assert sure is not None and sure[:, 2].isnan().all()
    torch.testing.assert_close(sure[:, 1], torch.softmax(logits[:, 2:5].double(), 1).amax(1))


@pytest.mark.parametrize("place", [PLACE, GROUPED], ids=["alone", "in groups"])
def test_counts_of_each_target_are_those_of_the_rows_that_have_it(place):
    logits, y = some_rows(200)
    rng = np.random.default_rng(1)
    group = torch.from_numpy(rng.integers(0, 2, 200)) if place.group is not None else None
    predicted, sure = objective.predictions(logits, FED.heads), objective.confidences(logits, FED.heads)
    total = objective.counts(predicted, y, place, group=group, confidence=sure)
    assert total.shape == (count_size(place),)
    by_group = total.reshape(len(place.groups), -1)
    start = 0
    for i, task in enumerate(place.tasks):
        has = ~y[:, i].isnan()
        own, true = predicted[has, i], y[has, i]
        if i < 2:
            own, true = own.long(), true.long()
        of_group = None if group is None else group[has]
        alone = objective.counts(own, true, task, group=of_group, confidence=None if sure is None else sure[has, i])
        alone = alone.reshape(len(place.groups), -1)
        assert np.array_equal(by_group[:, start : start + alone.shape[1]], alone)
        start += alone.shape[1]


@given(st.lists(st.none() | st.floats(0, 1), min_size=3, max_size=3), st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_a_row_moves_the_counts_by_at_most_the_sensitivity(true, guess):
    scale = torch.tensor([1.99, 2.99, 1.0], dtype=torch.float64)
    y = torch.tensor([[math.nan if v is None else v for v in true]]).double() * scale
    predicted = torch.tensor([guess]).double() * scale
    y[:, :2], predicted[:, :2] = y[:, :2].floor(), predicted[:, :2].floor()
    for place, group in ((PLACE, None), (GROUPED, torch.tensor([1]))):
        moved = objective.counts(predicted, y.float(), place, group=group, confidence=torch.ones(1, 3))
        assert np.linalg.norm(moved) <= count_sensitivity(place)
        assert np.array_equal(moved / COUNT_UNIT, np.rint(moved / COUNT_UNIT))


def test_the_sensitivity_adds_up_over_targets():
    assert count_sensitivity(PLACE) == pytest.approx(math.sqrt(1 + 1 + 3))
    assert count_sensitivity(GROUPED) == pytest.approx(math.sqrt(2 + 2 + 4))
    worst = objective.counts(torch.tensor([[0, 1, 1.0]]), torch.tensor([[1, 0, 0.0]]), PLACE)
    assert np.linalg.norm(worst) == pytest.approx(count_sensitivity(PLACE))


def test_figures_are_those_of_each_target():
    logits, y = some_rows(300)
    predicted, sure = objective.predictions(logits, FED.heads), objective.confidences(logits, FED.heads)
    group = torch.from_numpy(np.random.default_rng(2).integers(0, 2, 300))
    total = objective.counts(predicted, y, GROUPED, group=group, confidence=sure)
    found = scores_of(total, GROUPED)
    assert list(found["tasks"]) == ["kind", "size"]
    has = [~y[:, i].isnan() for i in range(3)]
    right = [(predicted[has[i], i] == y[has[i], i]).double().mean().item() for i in range(2)]
    assert (found["accuracy"], found["tasks"]["kind"]["accuracy"]) == pytest.approx(tuple(right))
    error = (predicted[has[2], 2] - y[has[2], 2]).abs().mean().item()
    assert found["tasks"]["size"]["mae"] == pytest.approx(20 * error, abs=1e-4)
    assert [found["rows"], *(told["rows"] for told in found["tasks"].values())] == [int(each.sum()) for each in has]
    assert rows_of(total, GROUPED) == max(int(each.sum()) for each in has)
    assert list(found["tasks"]["size"]["by"]["c"]["groups"]) == ["red", "(other)"]
    assert headlines_of(total[None], GROUPED) == pytest.approx([right[0]])
    nobody = objective.counts(predicted[:0], y[:0], PLACE)
    assert scores_of(nobody, PLACE) == {}
    without = y.clone()
    without[:, 1] = math.nan
    counted = objective.counts(predicted, without, PLACE)
    assert scores_of(counted, PLACE)["tasks"]["kind"] == {"rows": 0.0}
    # Noise of 9 counts, of which each of 5 has: 3 x 5 x 3 = 45 rows may be noise.
    noisy = counted.copy()
    noisy[4:13] += np.array([44.0, *([0] * 8)])
    assert scores_of(noisy, PLACE, noise=5.0)["tasks"]["kind"] == {"rows": 0.0}
    assert scores_of(noisy + np.eye(len(noisy))[4] * 2, PLACE, noise=5.0)["tasks"]["kind"]["accuracy"] == 1.0


def test_the_model_of_one_target_is_the_body_with_its_head():
    model = SavedModel(federation=FED, weights=initial_weights(FED, seed=3), round=1, run="r")
    x = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (20, 5)).astype(np.float32))
    whole = mlp.with_weights(FED, model.weights)(x)
    for name, columns in (("y", slice(0, 2)), ("kind", slice(2, 5)), ("size", slice(5, 6))):
        one = model.task(name).checked("here")
        assert one.federation.data_schema.target.name == name and not one.federation.data_schema.also
        torch.testing.assert_close(mlp.with_weights(one.federation, one.weights)(x), whole[:, columns])
        # It comes back from a file, as what it is: one target of a document that was agreed on.
        again = saved.from_bytes(saved.to_bytes(one), "file")
        assert again.federation == one.federation and again.whole == FED.fingerprint
    assert model.task().federation.data_schema.target.name == "y"
    with pytest.raises(ConfigError, match="the federation has no target z; it has y, kind, size"):
        model.task("z")


def test_a_model_of_one_target_is_its_own_task():
    model = SavedModel(federation=federation(), weights=initial_weights(federation()), round=1)
    assert model.task() is model and model.task("y") is model and "whole" not in model.about
    with pytest.raises(ConfigError, match="has no target z; it has y"):
        model.task("z")


def test_what_the_rounds_went_by_is_no_part_of_one_targets_document():
    watched = {"metric": "accuracy"}
    fed = federation(
        **ALSO,
        training__early_stopping=watched,
        training__schedule={"name": "plateau", **watched},
        strategy__schedule={"name": "plateau", **watched},
    )
    alone = fed.alone("size")
    assert federations.from_canonical(alone.canonical) == alone and alone.training.loss == "mse"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"schema__also": [{"name": "y", "classes": [0, 1]}]}, r"schema.also\[0\].name stands twice \(got y\)"),
        ({"schema__also": [{"name": "a", "bounds": [0, 1]}]}, r"schema.also\[0\].name is also a feature \(got a\)"),
        (
            {"schema__also": [{"name": "k", "classes": [0, 1]}, {"name": "k", "bounds": [0, 1]}]},
            r"schema.also\[1\].name stands twice \(got k\)",
        ),
        ({"schema__also": [{"name": "k", "bounds": [1, 0]}]}, r"schema.also\[0\].bounds must rise"),
        ({"schema__also": [{"name": "k", "bounds": [0, 1], "weight": 0}]}, r"schema.also\[0\].weight"),
        (
            {"schema__target": {"name": "y", "classes": [0, 1], "weight": 2.0}},
            r"schema.target.weight is for several targets",
        ),
        ({**ALSO, "training__augmentation": {"mixup": 0.2}}, r"training.augmentation.mixup is for one target"),
        ({**ALSO, "schema__group": {"name": "kind", "groups": ["p"]}}, r"schema.group.name is a target \(got kind\)"),
        ({**ALSO, "training__loss": "mse"}, r"training.loss mse needs a numeric target"),
    ],
)
def test_targets_that_make_no_sense_are_refused(changes, said):
    with pytest.raises(documents.Mistakes, match=said):
        federation(**changes)


def test_more_counts_than_travel_are_refused_where_there_are_evaluations():
    many = {"name": "y", "classes": list(range(60))}
    groups = {"name": "a", "cuts": [i / 20 for i in range(10)]}
    with pytest.raises(documents.Mistakes, match=r"schema.group makes 43,200 counts in each evaluation"):
        federation(schema__target=many, schema__group=groups)
    with pytest.raises(documents.Mistakes, match=r"schema.target makes 40,401 counts in each evaluation"):
        federation(schema__target={"name": "y", "classes": list(range(201))})
    fed = federation(schema__target=many, schema__group=groups, privacy__evaluation={"every": 0})
    assert count_size(fed.data_schema) == fed.data_schema.counts == 12 * 60**2
    most = federation(schema__target={"name": "y", "classes": list(range(200))})
    # Noise gives each as many digits as it may have.
    rng = np.random.default_rng(0)
    noisy = np.rint((1e5 * rng.normal(size=40_000)) / COUNT_UNIT) * COUNT_UNIT
    content = RecordDict({"metrics": MetricRecord({"counts": noisy.tolist()})})
    assert count_size(most.data_schema) == 40_000 and codec.decode(codec.encode(content)) == content


def test_a_value_of_a_class_is_no_marker_of_what_is_missing():
    target = {"name": "y", "classes": {"no": [0], "yes": [1, "1.5"]}, "missing": ["?", "1"]}
    with pytest.raises(documents.Mistakes, match=r"schema.target.missing has a value of class yes"):
        federation(schema__target=target)


def test_a_document_of_one_target_is_the_text_that_it_was():
    text = federation().canonical
    assert not any(f'"{name}":' in text.split('"target":')[1].split("}")[0] for name in ("missing", "weight"))
    assert '"also"' not in text
