"""The agreed document: what it refuses, and by what it is known."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from client.settings import load_client_file
from common.document import documents
from common.document import federation as federations
from common.document.federation import Federation
from common.errors import ConfigError
from tests.support import PRIVATE, ROOT, WHOLE, document, federation

SHIPPED = sorted((ROOT / "simulations").rglob("*.yaml"))


def problem_of(**changes: Any) -> str:
    with pytest.raises(documents.Mistakes, match=r"^\w") as caught:
        federation(**changes)
    return str(caught.value)


def test_there_are_shipped_documents():
    assert len(SHIPPED) >= 6


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_document_loads(path):
    if "server" in yaml.safe_load(path.read_text()):
        assert Path(load_client_file(path).data.path).exists()
    else:
        assert federations.load(path).training.rounds > 0


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"training__rounds": 0}, "training.rounds must be at least 1 (got 0)"),
        ({"training__local_epochs": 1}, "training.local_steps or local_epochs: give exactly one of them"),
        ({"training__local_steps": ...}, "training.local_steps or local_epochs: give exactly one of them"),
        ({"training__learning_rate": 0}, "training.learning_rate must be greater than 0 (got 0)"),
        ({"training__nesterov": True}, "training.nesterov needs momentum greater than 0"),
        (
            {"training__optimizer": "adam", "training__momentum": 0.9},
            "training.momentum belongs to optimizer sgd (optimizer is adam)",
        ),
        (
            {"model__hidden": [20_000, 20_000]},
            "model.hidden make 400,180,002 parameters, some 24 GiB at each client; at most 134,217,728 are accepted",
        ),
        (
            {"training__local_steps": 10**9, "training__batch_size": 10**6},
            "training.local_steps of batch 1000000 on 66 parameters are 4.0e+17 operations in each round, 458 days",
        ),
        ({"training__seed": 2**63}, "training.seed must be less than 9223372036854775808"),
        ({"training__loss": "mse"}, "training.loss mse needs a numeric target; for classes use cross_entropy"),
        (
            {"schema__target": {"name": "y", "bounds": [0, 1]}},
            "training.loss cross_entropy needs a target with classes; for a numeric target use mse",
        ),
        (
            {"schema__target": {"name": "y", "classes": [0, 1, 2]}, "training__loss": "binary_cross_entropy"},
            "training.loss binary_cross_entropy needs exactly 2 classes (the schema has 3)",
        ),
        ({"privacy__row": {"epsilon": 0, "delta": 0.1, "clip": 1}}, "privacy.row.epsilon must be greater than 0 (got"),
        ({"privacy__row": {"epsilon": 1, "delta": 0, "clip": 1}}, "privacy.row.delta must be greater than 0 (got 0)"),
        ({"privacy__row": {"epsilon": 1, "delta": 0.1, "clip": 0}}, "privacy.row.clip must be at least 1e-06 (got 0)"),
        (
            {"privacy": {"row": {"epsilon": 0.1, "delta": 0.1, "clip": 1}, "evaluation": {"noise": 1}}},
            "privacy.row.count_epsilon must be at most half of epsilon, 0.05 (got 0.1)",
        ),
        (
            {**PRIVATE, "privacy__row__sampling_rate": 0.1},
            "privacy.row.sampling_rate or count_epsilon: give exactly one",
        ),
        ({**PRIVATE, "privacy__row__count_epsilon": None}, "privacy.row.sampling_rate or count_epsilon: give exactly"),
        (
            {"privacy__row": {"epsilon": 1, "delta": 0.1, "clip": 1}},
            "privacy.evaluation.noise must be greater than 0: with privacy.row no count leaves without noise",
        ),
        ({**PRIVATE, "privacy__evaluation__noise": 2e6}, "privacy.evaluation.noise must be at most 1000000 (got 2"),
        (
            {**PRIVATE, "privacy__evaluation__noise": 0.001},
            "privacy.evaluation.noise must be at least 0.01, which hides next to nothing as it is (got 0.001)",
        ),
        (
            {"privacy__evaluation": {"noise": 1}},
            "privacy.evaluation.noise needs privacy.row or privacy.client, whose epsilon and delta it is accounted aga",
        ),
        (
            {**PRIVATE, "schema__validation_fraction": 0},
            "schema.validation_fraction is 0, so there is nothing to evaluate; set privacy.evaluation.every to 0",
        ),
        (
            {"privacy__client": {"epsilon": 1, "delta": 0.1, "clip": 1, "clients": 9}},
            "privacy.evaluation.noise must be greater than 0: with privacy.client no count leaves without noise",
        ),
        ({**WHOLE, "privacy__client__delta": 0.2}, "privacy.client.delta must be at most 1 / clients, 0.111111"),
        ({**WHOLE, "strategy__name": "krum", "strategy__min_clients": 3}, "strategy.name privacy.client needs a strat"),
        (
            {
                **WHOLE,
                "privacy__client__weight_cap": 9,
                "privacy__row": {"epsilon": 1, "delta": 0.1, "clip": 1, "count_epsilon": None, "sampling_rate": 0.1},
            },
            "privacy.client.weight_cap needs row counts, and with privacy.row.sampling_rate none are told",
        ),
        ({**WHOLE, "strategy__min_clients": 10}, "strategy.min_clients must be at most privacy.client.clients, 9"),
        ({**PRIVATE, "strategy": {"name": "qfedavg"}}, "strategy.name qfedavg needs each client's exact loss"),
        ({**PRIVATE, "strategy": {"name": "agnostic"}}, "strategy.name agnostic needs each client's exact loss"),
        ({**WHOLE, "strategy": {"name": "agnostic"}}, "strategy.name privacy.client needs a strategy of a mean"),
        ({"strategy": {"name": "fedtrimmedavg", "beta": 0.5}}, "strategy.beta must be less than 0.5 (got 0.5)"),
        (
            {"strategy": {"name": "multikrum", "min_clients": 3, "num_nodes_to_select": 4}},
            "strategy.num_nodes_to_select must be at most min_clients, 3",
        ),
        ({"schema__target": {"name": "a", "classes": [0, 1]}}, "schema.target.name is also a feature (got a)"),
        ({"schema__columns": ["a", "b", "c"]}, "schema.columns lacks y"),
        ({"wire__dtype": "float16"}, "wire.dtype must be one of 'float32', 'bfloat16' or 'int8' (got float16"),
    ],
)
def test_impossible_values_are_refused_with_the_reason(changes, expected):
    assert problem_of(**changes).startswith(expected)


@pytest.mark.parametrize(
    "name, byzantine, least",
    [("krum", 0, 3), ("krum", 2, 7), ("multikrum", 1, 5), ("bulyan", 0, 3), ("bulyan", 1, 7), ("bulyan", 2, 11)],
)
def test_byzantine_strategies_need_enough_clients(name, byzantine, least):
    # n >= 2f + 3 for Krum, n >= 4f + 3 for Bulyan, worked out by hand in the table above.
    enough = {"name": name, "num_malicious_nodes": byzantine, "min_clients": least}
    assert federation(strategy=enough).strategy.min_clients == least
    problem = problem_of(strategy=enough | {"min_clients": least - 1})
    assert problem.startswith("strategy.min_clients must be at least ")
    assert f"+ 3 = {least} for {name} (got {least - 1})" in problem


def test_contradictions_in_different_parts_are_told_together():
    problem = problem_of(training__loss="mse", training__local_epochs=1, strategy={"name": "krum", "min_clients": 2})
    assert problem.count("; ") == 3  # three mistakes, one of which holds a semicolon itself
    assert "training.local_steps" in problem and "training.loss" in problem and "strategy.min_clients" in problem


@pytest.mark.parametrize(
    "every, rounds, fraction, expected",
    [(1, 3, 0.2, (1, 2, 3)), (2, 5, 0.2, (2, 4, 5)), (9, 3, 0.2, (3,)), (0, 3, 0.2, ()), (1, 3, 0.0, ())],
)
def test_clients_evaluate_every_so_often_and_at_the_end(every, rounds, fraction, expected):
    small = federation(
        privacy__evaluation={"every": every}, training__rounds=rounds, schema__validation_fraction=fraction
    )
    assert small.evaluation_rounds == expected


@pytest.mark.parametrize("loss, outputs", [("cross_entropy", 2), ("binary_cross_entropy", 1)])
def test_binary_cross_entropy_needs_one_output(loss, outputs):
    # a and b are one input each; c is red, green or other.
    assert federation(training__loss=loss, model__hidden=[8, 4]).layer_sizes == (5, 8, 4, outputs)


def reordered(value: Any) -> Any:
    """The same mapping with its keys the other way round, at every depth; classes keep their order, which counts."""
    if isinstance(value, dict):
        return {k: v if k == "classes" else reordered(v) for k, v in reversed(value.items())}
    return [reordered(item) for item in value] if isinstance(value, list) else value


DEFAULTS = {
    "model__activation": "relu",
    "model__dropout": 0,
    "training__local_epochs": None,
    "training__optimizer": "sgd",
    "training__momentum": 0.0,
    "training__nesterov": False,
    "training__weight_decay": 0,
    "training__loss": "cross_entropy",
    "training__seed": 0,
    "strategy__fraction": 1,
    "strategy__max_failed_rounds": 3,
    "privacy__client": None,
    "privacy__evaluation": {"every": 1, "noise": 0},
    "wire": {"dtype": "float32"},
    "schema__columns": None,
    "schema__target": {"name": "y", "classes": {"0": [0], "1": [1]}},
}

CHANGED = {
    "name": "smaller",
    "schema__features": document()["schema"]["features"][::-1],
    "schema__target": {"name": "y", "classes": [1, 0]},
    "schema__validation_fraction": 0.26,
    "schema__columns": ["a", "b", "c", "y"],
    "model__hidden": [8, 8],
    "model__activation": "tanh",
    "model__dropout": 0.1,
    "training__rounds": 4,
    "training__local_steps": 3,
    "training__batch_size": 9,
    "training__optimizer": "adam",
    "training__learning_rate": 0.1 + 2**-56,
    "training__momentum": 0.5,
    "training__weight_decay": 1e-9,
    "training__loss": "binary_cross_entropy",
    "training__seed": 1,
    "strategy__name": "fedprox",
    "strategy__fraction": 0.5,
    "strategy__min_clients": 3,
    "strategy__round_timeout": 31,
    "strategy__max_failed_rounds": 2,
    "privacy": PRIVATE["privacy"],
    "privacy__evaluation": {"every": 2},
    "wire": {"dtype": "bfloat16"},
    "wire__dtype": "int8",
}


def test_the_fingerprint_does_not_depend_on_the_order_of_keys():
    assert documents.validate(reordered(document()), Federation).fingerprint == federation().fingerprint


@pytest.mark.parametrize("key", DEFAULTS)
def test_a_default_written_out_is_the_same_document(key):
    assert federation(**{key: DEFAULTS[key]}).fingerprint == federation().fingerprint


def test_every_changed_value_changes_the_fingerprint():
    prints = [federation().fingerprint, *(federation(**{key: value}).fingerprint for key, value in CHANGED.items())]
    assert len(set(prints)) == len(prints)


def test_a_columns_rule_for_what_does_not_fit_is_in_the_fingerprint_unless_it_is_the_usual_one():
    usual, *others = (
        federation(schema__features=[{"name": "a", "type": "numeric", "bounds": [-1, 1], **rule}])
        for rule in ({}, {"unfit": "left_out"}, {"unfit": "missing"})
    )
    assert "unfit" not in usual.canonical  # as it was written before there was such a rule
    assert [other.fingerprint == usual.fingerprint for other in others] == [True, False]
    assert federations.from_canonical(others[1].canonical) == others[1]


def test_the_fingerprint_is_the_sha_256_of_the_canonical_text():
    small = federation(**PRIVATE)
    assert small.fingerprint == hashlib.sha256(small.canonical.encode()).hexdigest()
    assert json.loads(small.canonical)["privacy"]["row"] == {
        "epsilon": 4.0,
        "delta": 0.001,
        "clip": 1.0,
        "count_epsilon": 0.1,
        "sampling_rate": None,
    }


NAMES = st.text(min_size=1, max_size=8)
NUMBERS = st.floats(-1e6, 1e6) | st.integers(-(10**6), 10**6)


@given(
    labels=st.lists(NAMES, min_size=2, max_size=6, unique=True),
    epsilon=st.floats(0.2, 1e6),
    low=NUMBERS,
    width=st.floats(0.01, 1e6),
    markers=st.lists(NUMBERS | NAMES, max_size=3),
    strategy=st.sampled_from(["fedavg", "fedadam", "fedprox", "fedmedian"]),
)
def test_the_canonical_text_reads_back_as_the_same_document(labels, epsilon, low, width, markers, strategy):
    sent = federation(
        schema__features=[{"name": "a", "type": "numeric", "bounds": [low, low + width], "missing": markers}],
        schema__target={"name": "y\n", "classes": {label: [i] for i, label in enumerate(labels)}},
        privacy={"row": {"epsilon": epsilon, "delta": 1e-3, "clip": 1}, "evaluation": {"noise": 3}},
        strategy__name=strategy,
    )
    read = federations.from_canonical(sent.canonical)
    assert read == sent and read.fingerprint == sent.fingerprint
    assert list(read.data_schema.target.classes) == labels


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "Expecting value"),
        ("null", r"must be a mapping \(got nothing\)"),
        ("[" * 5000, "maximum recursion depth"),
        ("1" * 5000, "Exceeds the limit"),
        ('{"name": "\\ud800"}', "invalid JSON"),
        ('{"nane": "a"}', "name is missing; .*nane is an unknown key; did you mean name?"),
    ],
)
def test_a_document_that_a_peer_made_up_is_a_mistake_and_no_crash(text, expected):
    with pytest.raises(ConfigError, match=f"^the server's federation document is not valid: .*{expected}"):
        federations.from_canonical(text)


@pytest.mark.parametrize("token", ["NaN", "Infinity", "1e999"])
def test_a_peer_cannot_send_what_is_no_finite_number(token):
    text = federation().canonical.replace('"learning_rate":0.1', f'"learning_rate":{token}')
    assert token in text
    with pytest.raises(ConfigError, match=r"training.learning_rate must be a finite number"):
        federations.from_canonical(text)


# Steps


def test_local_steps_are_taken_as_they_are():
    assert federation(training__local_steps=7).training.steps(0.01) == 7


@pytest.mark.parametrize("epochs, rate, steps", [(1, 0.1, 10), (3, 0.1, 30), (1, 0.3, 4), (2, 0.3, 7), (5, 1.0, 5)])
def test_an_epoch_is_as_many_steps_as_batches_fill_the_table(epochs, rate, steps):
    assert federation(training__local_steps=..., training__local_epochs=epochs).training.steps(rate) == steps


@example(126, 1974, 3)  # 3 / (126 / 1974) comes out a little above 47
@given(st.integers(1, 300), st.integers(1, 3000), st.integers(1, 5))
def test_rounding_errors_add_no_step(batch, rows, epochs):
    exact = -(-epochs * rows // batch) if batch <= rows else epochs
    training = federation(training__local_steps=..., training__local_epochs=epochs).training
    assert training.steps(min(1.0, batch / rows)) == exact


def test_a_layer_that_is_too_wide_for_exact_products_is_a_mistake_where_rows_are_private(monkeypatch):
    monkeypatch.setattr(federations, "WIDEST", 4)
    said = r"schema\.features make 5 inputs; with privacy\.row a layer may have at most 4, beyond"
    with pytest.raises(documents.Mistakes, match=said):
        federation(**PRIVATE, model__hidden=[4])
    federation(model__hidden=[4])
    monkeypatch.setattr(federations, "WIDEST", 5)
    federation(**PRIVATE, model__hidden=[5])
