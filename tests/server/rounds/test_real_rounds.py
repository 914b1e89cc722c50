"""Whole runs of real clients in this process: what they learn, and what they leave in the run folder."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

from common.data.encoding import encode
from common.document.federation import Federation
from common.errors import RunFolderError
from common.model import mlp
from common.wire.records import COUNTS, LOSS, METRICS, WEIGHT
from server.folder.folder import RunFolder, load_model, read_run
from server.observers.scoring import HeldOut
from simulations import engine
from simulations.engine import simulate
from simulations.inline import InlineGrid
from simulations.sources import sites_from_table
from tests.support import PRIVATE, WHOLE, federation, recomputed, table

CPU = torch.device("cpu")
SCHEMA = federation().data_schema


def run(
    document: Federation, where: Path, *, clients: int = 3, rows: int = 240, **how: Any
) -> tuple[dict[str, Any], RunFolder]:
    """Simulates `document` on the shared table; returns result.json and the folder."""
    where.mkdir(parents=True, exist_ok=True)
    source = where / "table.csv"
    table(rows).write_csv(source)
    sites = sites_from_table(document, source, clients=clients, how="iid", seed=document.training.seed, device=CPU)
    folder = RunFolder.create(document, path=where / "run")
    simulate(document, sites, folder, run="test", held_out=HeldOut(document, source), **how)
    return json.loads((folder.path / "result.json").read_text()), folder


def events(folder: RunFolder, kind: str = "round") -> list[dict[str, Any]]:
    lines = (folder.path / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


LEARNS = {"training__local_steps": 20, "training__learning_rate": 0.5}


@pytest.fixture(scope="module")
def private(tmp_path_factory) -> tuple[dict[str, Any], RunFolder]:
    """A private run. Tests only read it."""
    return run(federation(**PRIVATE), tmp_path_factory.mktemp("private"))


def test_three_rounds_train_and_improve(tmp_path):
    result, folder = run(federation(**LEARNS), tmp_path)
    losses = [event["train"]["loss"] for event in events(folder)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 1.3 * losses[-1]
    # y is the sign of a + b, blurred: about half the rows each, and about 9 in 10 can be told.
    assert events(folder)[-1]["held_out"]["accuracy"] > 0.85
    assert result["evaluation"]["accuracy"] > 0.8


@pytest.mark.parametrize("privacy", [{}, PRIVATE], ids=["plain", "private"])
def test_a_seed_gives_the_same_model_to_the_last_bit_whatever_else_draws_random_numbers(tmp_path, privacy):
    def model(seed: int, name: str) -> list[bytes]:
        random.seed(name)  # Flower's strategies draw from Python's own generator
        np.random.seed(len(name))
        torch.manual_seed(len(name))
        document = federation(**privacy, training__seed=seed, training__rounds=2, strategy__fraction=0.7)
        state = load_model(run(document, tmp_path / name, clients=5)[1].path)
        return [array.tobytes() for array in state.values()]

    first = model(3, "first")
    assert model(3, "again") == first
    assert model(4, "other") != first


def test_every_event_of_a_round_follows_the_contract(tmp_path):
    _, folder = run(federation(**LEARNS, privacy__evaluation={"every": 2}), tmp_path)
    rounds = events(folder)
    assert [event["round"] for event in rounds] == [1, 2, 3]
    for event in rounds:
        assert event["clients"] == event["asked"] == 3
        assert event["rounds"] == 3
        assert event["seconds"] > 0
        assert event["waiting"] >= 0
        assert event["members"] == ["client-0", "client-1", "client-2"]
        parts = {"clients", "transfer", "aggregation"} | ({"evaluation"} if "evaluation" in event else set())
        assert set(event["times"]) == parts
        assert sum(event["times"].values()) == pytest.approx(event["seconds"])
        assert set(event["train"]) == {"loss"}
        assert event["rejected"] == []
        assert "privacy" not in event
    assert ["evaluation" in event for event in rounds] == [False, True, True]
    told = {"accuracy", "precision", "recall", "f1", "per_class", "rows", "confusion", "per_client"}
    assert set(rounds[-1]["evaluation"]) == told
    assert list(rounds[-1]["evaluation"]["per_client"]) == ["client-0", "client-1", "client-2"]


COLOURS = {"name": "c", "groups": ["red", "green"], "calibration": True}


def test_evaluations_tell_groups_and_clients_apart_exactly_without_privacy(tmp_path):
    document = federation(**LEARNS, schema__group=COLOURS, schema__validation_fraction=0.5, training__rounds=1)
    result, folder = run(document, tmp_path, rows=600)
    rows = table(600)
    logits = mlp.with_weights(document, load_model(folder.path))(torch.from_numpy(encode(rows, SCHEMA).x))
    right = (logits.argmax(1).numpy() == rows["y"].to_numpy()).astype(float)
    sure = torch.softmax(logits, 1).amax(1).detach().numpy()
    groups = result["held_out"]["by"]["c"]["groups"]
    for name in ("red", "green"):
        its = (rows["c"] == name).to_numpy()
        assert groups[name]["rows"] == its.sum()
        assert groups[name]["accuracy"] == pytest.approx(right[its].mean())
        assert groups[name]["overconfidence"] == pytest.approx(float((sure - right)[its].mean()), abs=1e-4)
        ones = its & (rows["y"] == 1).to_numpy()
        assert groups[name]["recall"]["1"] == pytest.approx(right[ones].mean())
    assert groups["(other)"]["rows"] == 0
    of_clients = result["evaluation"]
    assert set(of_clients["by"]["c"]["gaps"]) == {"accuracy", "overconfidence", "recall of 0", "recall of 1"}
    each = [own["accuracy"] for own in of_clients["per_client"].values()]
    gap = of_clients["gaps_between_clients"]["accuracy"]
    assert gap["gap"] == pytest.approx(max(each) - min(each))
    assert of_clients["per_client"][gap["worst"]]["accuracy"] == min(each)


@pytest.mark.parametrize("privacy", [PRIVATE, WHOLE], ids=["row", "client"])
def test_with_privacy_gaps_come_with_their_noise_and_none_names_a_client_that_may_not_be_told(tmp_path, privacy):
    quiet = {**privacy["privacy"], "evaluation": {"every": 3, "noise": 0.6 if privacy is WHOLE else 0.9}}
    document = federation(privacy=quiet, schema__group=COLOURS, schema__validation_fraction=0.5)
    if privacy is WHOLE:
        document = federation(
            privacy={**quiet, "client": {**quiet["client"], "epsilon": 60.0, "clients": 40}},
            schema__group=COLOURS,
        )
    result, _ = run(document, tmp_path, clients=3 if privacy is PRIVATE else 25, rows=1800)
    evaluation = result["evaluation"]
    gap = evaluation["by"]["c"]["gaps"]["accuracy"]
    # Two groups of confusion matrices, each cell with this noise; a figure's is larger than a cell's over all rows.
    assert gap["noise"] > evaluation["count_noise"] / evaluation["rows"] > 0
    assert evaluation["count_noise"] == pytest.approx(math.sqrt(2) * (0.6 if privacy is WHOLE else 0.9 * math.sqrt(3)))
    assert ("gaps_between_clients" in evaluation) == (privacy is PRIVATE)


def test_a_run_begins_and_ends_with_an_event(private):
    document, (_, folder) = federation(**PRIVATE), private
    (start,), (end,) = events(folder, "start"), events(folder, "end")
    assert (start["run"], start["federation"], start["rounds"]) == ("test", document.fingerprint, 3)
    assert (end["status"], end["reason"]) == ("completed", "")
    lines = [json.loads(line) for line in (folder.path / "events.jsonl").read_text().splitlines()]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_the_result_follows_the_contract(private):
    result, folder = private
    told = {"status", "reason", "rounds", "clients", "refused", "seconds", "evaluation", "held_out", "privacy"}
    assert set(result) == told
    assert (result["status"], result["rounds"], result["refused"]) == ("completed", 3, {})
    standing = read_run(folder.path).standing
    assert (standing.state, standing.round, standing.rounds) == ("completed", 3, 3)
    assert (standing.evaluation, standing.held_out) == (result["evaluation"], result["held_out"])
    assert result["held_out"] == events(folder)[-1]["held_out"]
    assert result["clients"] == ["client-0", "client-1", "client-2"]
    told = {"accuracy", "precision", "recall", "f1", "per_class", "rows", "confusion", "per_client", "count_noise"}
    assert set(result["evaluation"]) == told
    # Three clients, each with noise 3 in every count; one row changes one count by 1.
    assert result["evaluation"]["count_noise"] == pytest.approx(3 * math.sqrt(3))
    row = result["privacy"]["row"]
    assert row["delta"] == 1e-3
    assert sorted(row["per_client"]) == result["clients"]
    assert max(row["per_client"].values()) < 3.7  # three rounds; the spare attempt was planned and not used
    assert 3.9 < row["epsilon"] <= 4.0  # whatever of the plan was used
    assert result["privacy"]["client"] is None


@pytest.mark.parametrize(
    "changes, noise",
    [
        (WHOLE, 3.0),  # the server's own, once, however many clients there are
        ({"privacy": {**WHOLE["privacy"], "row": PRIVATE["privacy"]["row"]}}, 3.0),
    ],
    ids=["client", "both"],
)
def test_under_client_privacy_nothing_of_one_clients_reply_is_told(tmp_path, changes, noise):
    result, folder = run(federation(**changes), tmp_path)
    for event in events(folder):
        assert "times" not in event
        assert event["members"] == ["client-0", "client-1", "client-2"]  # who was there
    assert "per_client" not in result["evaluation"] and "spread" not in result["evaluation"]
    assert result["evaluation"]["count_noise"] == noise


def test_of_many_clients_figures_are_told_as_quantiles_and_no_names(tmp_path):
    document = federation(training__rounds=1, strategy__min_clients=120)
    result, folder = run(document, tmp_path, clients=120, rows=3000)
    (event,) = events(folder)
    assert event["clients"] == 120 and "members" not in event
    spread = result["evaluation"]["spread"]
    assert not {"per_client", "gaps_between_clients"} & set(result["evaluation"]) and len(spread) == 7
    assert 0 <= spread[0] <= spread[3] <= spread[6] <= 1 and spread == sorted(spread)


def test_a_run_folder_is_read_whole(private, tmp_path):
    result, folder = private
    record = read_run(folder.path)
    assert (record.run, record.federation.name) == ("test", "small")
    assert [event.round for event in record.rounds] == [1, 2, 3]
    assert record.rounds[-1].members == ("client-0", "client-1", "client-2")
    assert (record.result, record.explanation, record.refused) == (result, {}, ())
    assert record.privacy["run"] == "test" and record.started > 1e9
    path = RunFolder.create(federation(), path=tmp_path / "fresh").path
    with pytest.raises(RunFolderError, match=r"never began: it has no events\.jsonl"):
        read_run(path)
    (path / "events.jsonl").touch()
    fresh = read_run(path)
    assert (fresh.run, fresh.started, fresh.rounds, fresh.result, fresh.privacy) == ("", 0.0, (), {}, {})
    (fresh.path / "result.json").write_text("[]")
    with pytest.raises(RunFolderError, match=r"result.json: damaged"):
        read_run(fresh.path)


def test_a_run_without_privacy_says_so(tmp_path):
    result, folder = run(federation(training__rounds=1), tmp_path)
    assert result["privacy"] == {"row": None, "client": None}
    assert json.loads((folder.path / "privacy.json").read_text())["row"] is None


def test_a_private_run_never_tells_a_loss_and_tells_what_was_spent_so_far(private):
    result, folder = private
    assert [event["train"] for event in events(folder)] == [{"loss": None}] * 3
    spent = [event["privacy"]["row"]["epsilon"] for event in events(folder)]
    assert 0 < spent[0] < spent[1] < spent[2] == max(result["privacy"]["row"]["per_client"].values())


@pytest.mark.parametrize(
    "privacy, training_metrics", [({}, {WEIGHT, LOSS}), (PRIVATE, {WEIGHT})], ids=["plain", "private"]
)
def test_clients_send_these_metrics_and_no_other(tmp_path, monkeypatch, privacy, training_metrics):
    sent: dict[str, set[frozenset[str]]] = {"train": set(), "evaluate": set()}

    class Listening(InlineGrid):
        def stream(self, messages: Any, *, timeout: float | None = None) -> Iterator[Message]:
            for reply in super().stream(messages, timeout=timeout):
                sent[reply.metadata.message_type].add(frozenset(reply.content.metric_records[METRICS]))
                yield reply

    monkeypatch.setattr(engine, "InlineGrid", Listening)
    run(federation(**privacy, training__rounds=1), tmp_path, engine="inline")
    assert sent == {"train": {frozenset(training_metrics)}, "evaluate": {frozenset({WEIGHT, COUNTS})}}


def test_epsilon_can_be_recomputed_from_the_privacy_statement_alone(private):
    result, folder = private
    row = json.loads((folder.path / "privacy.json").read_text())["row"]
    assert sorted(row["per_client"]) == result["clients"]
    for client in row["per_client"].values():
        assert client["epsilon"] == pytest.approx(recomputed(client), rel=0.01)
        _, updates, counts = client["released"]
    assert (updates["steps"], counts["steps"]) == (3 * 2, 1)  # 3 rounds of 2 steps, one evaluation


def test_only_what_was_released_stands_in_the_statement(tmp_path):
    row = {"epsilon": 4.0, "delta": 1e-3, "clip": 1.0, "count_epsilon": None, "sampling_rate": 0.1}
    quiet = federation(privacy={"row": row, "evaluation": {"every": 0}})
    _, folder = run(quiet, tmp_path)
    for client in json.loads((folder.path / "privacy.json").read_text())["row"]["per_client"].values():
        (updates,) = client["released"]  # no row count, no evaluations
        assert updates["sampling_rate"] == 0.1
        assert client["epsilon"] == pytest.approx(recomputed(client), rel=0.01)


def test_the_saved_model_is_in_the_order_of_the_layers(private):
    _, folder = private
    names = ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"]
    assert list(load_model(folder.path)) == names
    assert {array.dtype for array in load_model(folder.path).values()} == {np.dtype("float32")}


def test_a_second_run_finds_the_budgets_spent_and_ends_well(tmp_path):
    document = federation(**PRIVATE)
    table(240).write_csv(tmp_path / "table.csv")
    sites = sites_from_table(document, tmp_path / "table.csv", clients=3, how="iid", seed=0, device=CPU)
    first = simulate(document, sites, RunFolder.create(document, path=tmp_path / "1"), run="first")
    second = simulate(document, sites, RunFolder.create(document, path=tmp_path / "2"), run="second")
    assert (first["status"], second["status"], second["rounds"]) == ("completed", "budget_exhausted", 0)
    assert list(load_model(tmp_path / "2"))
