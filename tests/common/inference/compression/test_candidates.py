"""What `cloister compress` chooses from: each file does what its figures say, and the choice keeps to them."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from sklearn.metrics import accuracy_score, mean_absolute_error

from common.data import tables
from common.data.encoding import encode
from common.inference.compression import smaller
from common.inference.compression.candidates import (
    Candidate,
    Measured,
    candidates,
    choose,
    hidden_of,
    measure,
    narrower,
    predictor_of,
    shell,
)
from common.inference.compression.public_rows import generated, of_table
from common.inference.onnx_model import to_onnx
from common.inference.onnx_predictor import OnnxPredictor
from common.inference.predictor import TorchPredictor
from common.inference.probes import compare
from common.inference.saved import SavedModel
from tests.support import saved_model, table

NUMBER = {"schema__target": {"name": "y", "bounds": [0, 4]}, "training__loss": "mse"}
FEATURES = [
    {"name": "a", "type": "numeric", "bounds": [-1, 1], "missing": ["?"]},
    {"name": "b", "type": "numeric", "bounds": [-1, 1]},
    {"name": "c", "type": "categorical", "categories": ["red", "green"], "optional": True},
]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(smaller, "PRUNING_STEPS", 10)
    monkeypatch.setattr(smaller, "DISTILLING_STEPS", 100)


def teacher(**changes: object) -> SavedModel:
    # Wide enough that a packed matrix is smaller than a whole one.
    model = saved_model(**{"model": {"hidden": [40, 24]}, "schema__features": FEATURES, **changes})
    for array in model.weights.values():
        array *= 3
    if model.federation.training.loss == "cross_entropy":
        list(model.weights.values())[-1][:] = [0.5, -0.5]  # so that both classes are said
    return model


@pytest.mark.parametrize("changes", [{}, {"training__loss": "binary_cross_entropy"}, NUMBER])
def test_every_file_does_what_its_weights_do(changes):
    model = teacher(**changes)
    tried = list(candidates(model, generated(model.federation.data_schema, seed=0, rows=400), seed=0))
    assert [c.name for c in tried[::2]] == [
        "original",
        "pruned 50 %",
        "pruned 80 %",
        "pruned 90 %",
        "pruned 95 %",
        "distilled 20-12",
        "distilled 10-6",
        "distilled 5-3",
        "distilled 24",
    ]
    for candidate in tried:
        found = compare(predictor_of(model, candidate), OnnxPredictor(candidate.data, "it"))
        assert found.largest < 1e-5, candidate.name
    for one, other in zip(tried[::2], tried[1::2], strict=True):
        assert (one.int8, other.int8) == (False, True)
        if one.parameters > 300:  # else the nodes that make float32 of int8 take more than it saves
            assert len(other.data) < len(one.data), one.name
        for name, array in one.weights.items():
            step = np.abs(array).max() / 127 if array.ndim == 2 else 0
            assert np.abs(other.weights[name] - array).max() <= step / 2 * (1 + 1e-5)
    assert len(tried[4].data) < len(tried[2].data) < len(tried[0].data)


def test_the_original_stays_as_it_was():
    model = teacher()
    first = next(candidates(model, generated(model.federation.data_schema, seed=0, rows=400), seed=0))
    assert compare(TorchPredictor(model), OnnxPredictor(first.data, "it")).largest < 1e-6
    assert first.parameters == sum(array.size for array in model.weights.values())


def test_a_file_says_how_it_was_made_and_keeps_the_privacy_statement():
    model = teacher()
    tried = list(candidates(model, generated(model.federation.data_schema, seed=5, rows=400), seed=5))
    held = {p.key: p.value for p in onnx.load_from_string(tried[-1].data).metadata_props}
    about = json.loads(held.pop("compression"))
    privacy = about.pop("privacy")
    assert about == {
        "method": "distilled",
        "hidden": [24],
        "sparsity": 0.0,
        "weights": "int8",
        "rows": "320 rows generated from the schema",
        "seed": 5,
    }
    made = "made of the released model and of rows that were generated (post-processing)"
    assert privacy == f"{made}: the privacy statement holds as it is"
    assert held == {p.key: p.value for p in onnx.load_from_string(to_onnx(model)).metadata_props}


def test_a_file_that_a_table_chose_says_so_and_calls_no_rows_public_by_itself():
    model = teacher()
    rows = of_table(tables.of_frame(table(60)), model.federation.data_schema, seed=0)
    about = [
        json.loads(metadata["compression"])["privacy"]
        for made in (next(candidates(model, rows, seed=0, judged=judged)) for judged in (False, True))
        for metadata in [{p.key: p.value for p in onnx.load_from_string(made.data).metadata_props}]
    ]
    assert all("rows that whoever made it called public" in said for said in about)
    assert [said.endswith("of whose rows the choice tells a little") for said in about] == [False, True]


def test_a_seed_gives_one_file():
    model = teacher()
    rows = generated(model.federation.data_schema, seed=0, rows=400)
    one, other = ([c.data for c in candidates(model, rows, seed=0)] for _ in range(2))
    assert one == other


@pytest.mark.parametrize("changes, figure", [({}, "accuracy"), (NUMBER, "mae")])
def test_figures_are_of_the_file_itself(changes, figure):
    model = teacher(**changes)
    schema = model.federation.data_schema
    rows = generated(schema, seed=0, rows=400)
    tried = list(candidates(model, rows, seed=0))
    frame = table(80)
    measured = measure(tried, rows, tables.of_frame(frame))
    truth = encode(frame, schema)
    for each in measured:
        outputs = predictor_of(model, each.candidate).of_inputs(truth.x)
        if figure == "accuracy":
            assert each.scores == {"accuracy": pytest.approx(accuracy_score(truth.y, outputs.argmax(axis=1)))}
            assert each.lost == pytest.approx(measured[0].scores[figure] - each.scores[figure])
        else:
            assert each.scores == {"mae": pytest.approx(mean_absolute_error(4 * truth.y, outputs[:, 0]), rel=1e-4)}
            assert each.lost == pytest.approx(each.scores[figure] / measured[0].scores[figure] - 1)
        assert each.size == len(each.candidate.data)
        assert 0 < each.row_s < 1 and 0 < each.thousand_s < 10


@pytest.mark.parametrize("changes", [{}, NUMBER])
def test_without_a_table_the_distance_to_the_original_is_what_counts(changes):
    model = teacher(**changes)
    schema = model.federation.data_schema
    rows = generated(schema, seed=0, rows=400)
    measured = measure(list(candidates(model, rows, seed=0)), rows, None)
    x = encode_without_target(rows.apart, model)
    wanted = TorchPredictor(model).of_inputs(x)
    assert measured[0].apart == 0
    for each in measured[2:]:
        outputs = predictor_of(model, each.candidate).of_inputs(x)
        if changes:
            apart = np.abs(outputs - wanted).mean() / 4  # the bounds are 0 and 4
        else:
            apart = np.mean(outputs.argmax(axis=1) != wanted.argmax(axis=1))
        assert each.lost == each.apart == pytest.approx(apart, abs=1e-5) and each.scores == {}
    assert max(each.apart for each in measured) > 0


def encode_without_target(rows: tables.Table, model: SavedModel) -> np.ndarray:
    from common.data.encoding import RowEncoder

    return next(RowEncoder(rows, model.federation.data_schema, with_target=False).blocks()).x


def made(size: int, lost: float) -> Measured:
    candidate = Candidate(method="pruned", weights={}, sparsity=0.5, int8=False, data=b"x" * size)
    return Measured(candidate=candidate, row_s=1, thousand_s=1, scores={}, apart=lost, lost=lost)


@pytest.mark.parametrize(
    "target, chosen",
    [
        (None, (70, 0.01)),  # the smallest that loses at most a hundredth
        (100, (90, -0.02)),  # the best that fits, be it better than the original
        (75, (70, 0.01)),
        (69, (60, 0.2)),
        (60, (50, 0.2)),  # of equals the smaller
        (50, (50, 0.2)),
        (49, None),
    ],
)
def test_the_choice_keeps_to_the_size_or_to_the_loss(target, chosen):
    measured = [made(100, 0.0), made(90, -0.02), made(70, 0.01), made(65, 0.0101), made(60, 0.2), made(50, 0.2)]
    if target in (69, 60):
        measured.pop(3)
    if target == 69:
        measured.pop(-1)
    found = choose(measured, target_size=target)
    assert (None if found is None else (found.size, found.lost)) == chosen


def test_smaller_perceptrons_are_narrower_and_none_stands_twice():
    assert narrower([64, 32]) == [(32, 16), (16, 8), (8, 4), (32,)]
    assert narrower([2]) == [(1,)]
    assert narrower([1]) == [] and narrower([]) == []
    assert hidden_of(saved_model(model={"hidden": [7, 5]}).weights) == [7, 5]
    assert hidden_of(saved_model(model={"hidden": []}).weights) == []


def test_a_linear_model_is_pruned_and_rounded_and_has_nothing_to_distil():
    model = teacher(model={"hidden": []})
    tried = list(candidates(model, generated(model.federation.data_schema, seed=0, rows=400), seed=0))
    assert len(tried) == 10 and {c.method for c in tried} == {"original", "pruned"}


def test_what_a_file_holds_beside_weights_is_told():
    model = teacher()
    first = next(candidates(model, generated(model.federation.data_schema, seed=0, rows=400), seed=0))
    held = sum(len(p.key) + len(p.value) for p in onnx.load_from_string(first.data).metadata_props)
    assert held < shell(model, first) < len(first.data) - 4 * first.parameters + 1
