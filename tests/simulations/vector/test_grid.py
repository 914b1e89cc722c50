"""Whole runs on the vector grid are held against those on the inline one: bit for bit under privacy, to floats'
rounding without."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict

from client.account.account import Account
from client.app import client_app
from common.document.federation import Federation
from common.model.weights import Weights, initial_weights
from common.wire import records
from common.wire.identity import node_id
from common.wire.records import ARRAYS
from server.folder.folder import RunFolder, load_model
from server.folder.start import StartModel
from server.rounds.admission import Partial
from simulations import engine
from simulations.engine import simulate
from simulations.inline import InlineGrid
from simulations.sites import Sites
from simulations.sources import sites_from_files, sites_from_table
from simulations.vector.grid import VectorGrid
from simulations.vector.train import Trainer
from tests.support import PRIVATE, WHOLE, federation, table

CPU = torch.device("cpu")
CLIENTS = 7


def sites_of(fed: Federation, clients: int = CLIENTS) -> Sites:
    return sites_from_table(fed, 40 * clients, clients=clients, how="dirichlet:1", seed=3, device=CPU)


def run(
    fed: Federation, where: Path, how: str, sites: Sites | None = None, **options: Any
) -> tuple[Weights, dict[str, Any], list[Any]]:
    """The last model, and what was `told`."""
    folder = RunFolder.create(fed, path=where / how)
    if fed.start is not None:
        options["start"] = StartModel(weights=initial_weights(fed, seed=9), about={})
    simulate(fed, sites or sites_of(fed), folder, run="test", engine=how, **options)  # type: ignore[arg-type]
    found = load_model(folder.path)
    for name in fed.frozen_arrays:
        assert np.array_equal(found[name], options["start"].weights[name])
    return found, *told(folder.path)


def told(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """result.json and the events, without what differs by the clock."""
    result = json.loads((folder / "result.json").read_text())
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    for event in (result, *events):
        for name in ("seconds", "time", "times", "waiting"):
            event.pop(name, None)
    return result, events


def same_bits(one: Weights, other: Weights) -> bool:
    return all(one[name].tobytes() == other[name].tobytes() for name in one)


WHOLE_TOO = {"privacy__client": WHOLE["privacy"]["client"]}
DEEP = {"model__hidden": [8, 5]}


def frozen(*layers: int) -> dict[str, Any]:
    return {**DEEP, "start": {"sha256": "0" * 64, "frozen": layers}}


BINARY = {"training__loss": "binary_cross_entropy"}
PAIR = {"first": "a", "height": 1, "width": 2}
EACH = {"strategy__name": "fedmedian"}
# Nothing is so much better, so the rate falls after each evaluation.
STALE = {"name": "plateau", "metric": "accuracy", "patience": 1, "min_change": 0.9}
EVERY_ROUND = {"privacy__evaluation": {"every": 1, "noise": 3.0}}
NUMBER = {"schema__target": {"name": "y", "bounds": [-3, 5]}, "training__loss": "mse"}
SEX = {"schema__group": {"name": "sex", "groups": ["f", "m"], "calibration": True}}  # no feature
AGES = {"schema__group": {"name": "a", "cuts": [-0.5, 0.5], "calibration": True}}
ALSO = {
    "schema__also": [
        {"name": "kind", "classes": ["p", "q", "r"], "optional": True, "weight": 0.5},
        {"name": "size", "bounds": [10, 30], "missing": ["?"], "weight": 2.0},
    ]
}
PRIVATELY: list[dict[str, Any]] = [
    {},
    {"training__optimizer": "adam", "model__activation": "tanh", "model__hidden": [5, 4]},
    {"training__momentum": 0.9, "training__nesterov": True, "model__dropout": 0.3},
    {"strategy__name": "fedprox", "strategy__proximal_mu": 0.5},
    {"strategy__name": "fedadam"},
    NUMBER,
    EACH,
    {"strategy__name": "krum", "strategy__num_malicious_nodes": 1, "strategy__min_clients": 5},
    {"strategy__fraction": 0.6, "strategy__over_selection": 0.4},
    {"wire__dtype": "int8"},
    {"wire__dtype": "bfloat16"},
    {"privacy__row__sampling_rate": 0.3, "privacy__row__count_epsilon": None},
    {"training__local_steps": ..., "training__local_epochs": 2},
    {"privacy__client": {**WHOLE["privacy"]["client"], "adaptive": {}}},
    {"training__schedule": {"name": "cosine", "over": "steps", "warmup": 1}, "training__momentum": 0.5},
    {"training__schedule": STALE, "strategy__schedule": STALE, "strategy__average": 0.8, **EVERY_ROUND},
    {"training__augmentation": {"copies": 3, "jitter": 0.1, "drop": 0.2}, "model__dropout": 0.2},
    {"training__augmentation": {"flip": True, "jitter": 0.1, "copies": 2}, "schema__image": PAIR},
    {**frozen(0), "training__optimizer": "adamw", "training__weight_decay": 0.3},
    {**frozen(1, 2), "training__augmentation": {"copies": 2, "drop": 0.2}, **WHOLE_TOO},
    {**SEX, **EVERY_ROUND},
    {**AGES, **NUMBER, **WHOLE_TOO},
    {**SEX, **BINARY},
    ALSO,
    {**ALSO, **BINARY, **SEX, **EVERY_ROUND, "training__augmentation": {"copies": 2, "drop": 0.2}},
    {**ALSO, "model__dropout": 0.2, "strategy__name": "fedmedian"},
    {**ALSO, **NUMBER, **WHOLE_TOO, "training__optimizer": "adam"},
]


@pytest.mark.parametrize("changes", PRIVATELY, ids=lambda changes: " ".join(changes) or "fedavg")
def test_a_private_run_is_bit_for_bit_that_of_clients_called_one_after_another(tmp_path, changes):
    fed = federation(**PRIVATE, **changes)
    found, result, told = run(fed, tmp_path, "vector")
    expected, its_result, its_events = run(fed, tmp_path, "inline")
    assert same_bits(found, expected)
    assert result == its_result and told == its_events
    assert result["status"] == "completed"


PLAINLY: list[dict[str, Any]] = [
    {},
    NUMBER,
    EACH,
    {"strategy__name": "qfedavg"},
    {"training__optimizer": "adamw", "training__weight_decay": 0.1, "model__activation": "sigmoid"},
    {"training__local_steps": ..., "training__local_epochs": 2, "model__dropout": 0.2},
    {"strategy__fraction": 0.5},
    {"wire__dtype": "bfloat16"},
    WHOLE,
    {"training__schedule": {"name": "cosine", "over": "steps", "warmup": 1}},
    {"training__schedule": STALE, "training__optimizer": "adam", "strategy__average": 0.8},
    {"training__schedule": STALE, "strategy__name": "qfedavg", "strategy__schedule": {"name": "exponential"}},
    {"training__augmentation": {"copies": 3, "jitter": 0.1, "drop": 0.2, "mixup": 0.3}, "model__dropout": 0.2},
    {"training__augmentation": {"mixup": 1.0}, **NUMBER, "training__momentum": 0.5},
    {"training__augmentation": {"mixup": 1.0, "flip": True}, **BINARY, "schema__image": PAIR},
    {**frozen(0), "training__weight_decay": 0.3},
    frozen(1, 2),
    SEX,
    {**AGES, **NUMBER},
    ALSO,
    {**ALSO, **BINARY, "training__momentum": 0.5, "training__augmentation": {"copies": 2, "jitter": 0.1}},
    {**ALSO, **NUMBER, **AGES, "strategy__name": "qfedavg", "training__optimizer": "adam"},
]


def about(value: Any) -> Any:
    """What equals an evaluation whose figures differ by floats' rounding."""
    if isinstance(value, dict):
        return {name: about(its) for name, its in value.items()}
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value


@pytest.mark.parametrize("changes", PLAINLY, ids=lambda changes: " ".join(changes) or "fedavg")
def test_a_run_without_privacy_is_the_same_to_a_hundred_thousandth(tmp_path, changes):
    fed = federation(**changes)
    found, result, told = run(fed, tmp_path, "vector")
    expected, its_result, its_events = run(fed, tmp_path, "inline")
    assert max(float(np.abs(found[name] - expected[name]).max()) for name in found) < 1e-5
    for event, other in zip(told, its_events, strict=True):
        trained, expected_loss = event.pop("train", None), other.pop("train", None)
        if trained and trained["loss"] is not None:
            assert trained["loss"] == pytest.approx(expected_loss["loss"], abs=1e-5)
    for event, other in zip((result, *told), (its_result, *its_events), strict=True):
        rounded = fed.training.loss == "mse" or fed.data_schema.group or fed.data_schema.also
        if rounded and "evaluation" in event:
            assert event.pop("evaluation") == about(other.pop("evaluation"))
        # Else they are counts of predictions, which are the same.
    assert result == its_result and told == its_events


@pytest.mark.parametrize("how", ["vector", "inline"])
def test_a_rate_that_fell_is_what_clients_train_at(tmp_path, how):
    # It falls to half after the second evaluation, so the third round moves the model half as far as it would.
    models = {}
    for name, changes in {"constant": {}, "falling": {"training__schedule": STALE}}.items():
        for rounds in (2, 3):
            fed = federation(training__rounds=rounds, training__local_steps=1, **changes)
            models[name, rounds] = run(fed, tmp_path / f"{name}{rounds}", how)[0]
    for key, before in models["constant", 2].items():
        assert np.array_equal(models["falling", 2][key], before)
        whole, half = (models[name, 3][key] - before for name in ("constant", "falling"))
        assert np.allclose(half, whole / 2, atol=1e-6)
    assert not np.allclose(whole, 0.0, atol=1e-5)


def test_the_size_of_chunks_changes_no_bit_of_a_private_run(tmp_path, monkeypatch):
    fed = federation(**PRIVATE)
    models = []
    for size in (1, 3, CLIENTS):
        monkeypatch.setattr("simulations.vector.train.CHUNK_CLIENTS", size)
        models.append(run(fed, tmp_path / str(size), "vector")[0])
    assert same_bits(models[0], models[1]) and same_bits(models[0], models[2])


def test_a_client_whose_numbers_explode_is_left_out_with_its_reason(tmp_path):
    # One epoch is one step at two of them, and ten at the third, whose numbers grow with each.
    fed = federation(
        training__learning_rate=1e3,
        training__loss="mse",
        training__local_steps=...,
        training__local_epochs=1,
        training__rounds=1,
        schema__target={"name": "y", "bounds": [-1, 1]},
        schema__validation_fraction=0,
    )
    for name, rows in (("a", 8), ("b", 80), ("c", 8)):
        frame = table(rows)
        frame.with_columns(y=frame["a"]).write_csv(tmp_path / f"{name}.csv")

    def sites() -> Sites:
        return sites_from_files(fed, tmp_path, seed=1, device=CPU)

    found, expected = (run(fed, tmp_path, how, sites())[2][1] for how in ("vector", "inline"))
    assert found["clients"] == 2 == expected["clients"]
    (rejection,) = found["rejected"]
    assert rejection["client"] == "b"
    assert rejection["reason"].startswith("array layers.0.weight has")


def test_one_partial_result_answers_for_all_who_were_asked(tmp_path, monkeypatch):
    answers = []

    class Listening(VectorGrid):
        def answers(self, *asked: Any, **how: Any) -> Any:
            for answer in super().answers(*asked, **how):
                answers.append(answer)
                yield answer

    monkeypatch.setattr(engine, "VectorGrid", Listening)
    fed = federation(**PRIVATE)
    run(fed, tmp_path, "vector")
    assert len(answers) == fed.training.rounds
    for answer in answers:
        assert isinstance(answer, Partial) and len(answer.nodes) == CLIENTS == len(answer.statements)


def test_a_client_that_cannot_be_one_of_many_is_trained_alone(tmp_path, monkeypatch):
    fed = federation(**PRIVATE)
    expected, *_ = run(fed, tmp_path, "inline")
    monkeypatch.setattr("simulations.vector.grid.unfit", lambda recipe, rows: "odd" if rows % 2 else "")
    trained = []
    real = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, w, jobs: (trained.append(len(jobs)), real(self, w, jobs))[1])
    said: list[str] = []
    found, *_ = run(fed, tmp_path, "vector", say=said.append)
    assert same_bits(found, expected)
    assert 0 < sum(trained) < fed.training.rounds * CLIENTS
    (line,) = said
    assert line.endswith("is trained by itself, not with others: odd (told for the first such client only)")


def test_a_round_that_is_over_trains_nobody_any_more(tmp_path):
    fed = federation(strategy__min_clients=2, training__rounds=1)
    sites = sites_of(fed)
    grid = VectorGrid(client_app(lambda context: None), sites, run="test")  # type: ignore[arg-type,return-value]
    asked = messages(grid, fed, sites)
    (answer,) = grid.answers(asked, aggregator=Counting, needed=9, compare=True, timeout=-1.0)
    assert isinstance(answer, Partial) and not answer.nodes
    (answer,) = grid.answers(messages(grid, fed, sites), aggregator=Counting, needed=3, compare=True, timeout=60.0)
    assert isinstance(answer, Partial) and len(answer.nodes) == 3


class Counting:
    """An aggregator that only counts."""

    loss = None

    def __init__(self) -> None:
        self.nodes: list[int] = []

    def add_all(self, nodes: list[int], updates: Any) -> None:
        self.nodes += nodes


def messages(grid: InlineGrid, fed: Federation, sites: Sites) -> list[Message]:
    content = RecordDict({ARRAYS: records.from_weights(initial_weights(fed))})
    return [grid.create_message(content, "train", node, "1") for node in sites.nodes]


def test_a_weight_far_above_the_others_is_left_out(monkeypatch):
    fed = federation()
    sites = sites_of(fed)
    grid = VectorGrid(client_app(lambda context: None), sites, run="test")  # type: ignore[arg-type,return-value]
    heavy = node_id(sites[2].name)
    real = Account.charge_update

    def charge(self: Account, run: str, task: str) -> Any:
        recipe = real(self, run, task)
        return replace(recipe, weight=1e9) if self is sites[2].account else recipe

    monkeypatch.setattr(Account, "charge_update", charge)
    for compare in (True, False):
        asked = messages(grid, fed, sites)
        (answer,) = grid.answers(asked, aggregator=Counting, needed=99, compare=compare)
        assert isinstance(answer, Partial)
        assert (heavy in answer.nodes) is not compare
    (rejection,) = next(grid.answers(messages(grid, fed, sites), aggregator=Counting, needed=9, compare=True)).rejected
    assert rejection.node_id == heavy
    assert rejection.reason.startswith("weight 1e+09 is more than 100000 times the median of this round")
