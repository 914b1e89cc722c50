"""A sweep's runs are those of the engine by itself, each is done once, and the folder knows what it is of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from common.errors import RunFolderError, WorkerLost
from common.model import mlp, objective
from common.model.scores import scores_of
from server.folder.folder import RunFolder, load_model
from simulations.engine import simulate
from simulations.sources import Source
from simulations.sweeps import runs
from simulations.sweeps.outcomes import Outcome, Result
from simulations.sweeps.points import Point, grid, parse
from simulations.sweeps.runs import How, run_all
from tests.simulations.vector.test_grid import same_bits
from tests.support import PRIVATE, document, table

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def how(tmp_path) -> How:
    table(120, seed=5).write_csv(tmp_path / "table.csv")
    return How(source=Source(data=tmp_path / "table.csv", clients=4), device="cpu", processes=2)


def points(folder: Path, *texts: str, **changes: Any) -> list[Point]:
    (folder / "federation.yaml").write_text(yaml.safe_dump(document(**changes)))
    return grid(folder / "federation.yaml", parse(texts))


def test_runs_are_those_of_the_engine_and_scores_are_of_all_validation_rows(tmp_path, how):
    some = points(tmp_path, "training.learning_rate=0.1,0.5")
    found = {result.point.name: result for result in run_all(some, tmp_path / "sweep", how, seeds=[0, 7])}
    assert sorted(found[some[0].name].outcomes) == [0, 7] and len(found) == 2
    for point in some:
        for seed in (0, 7):
            federation = point.federation.with_seed(seed)
            sites = how.source.sites(federation, device=torch.device("cpu"))
            folder = RunFolder.create(federation, path=tmp_path / "alone" / point.name / str(seed))
            simulate(federation, sites, folder, run=f"{federation.name}-{seed}", engine="vector", workers=1)
            weights = load_model(folder.path)
            assert same_bits(weights, load_model(tmp_path / "sweep" / "runs" / point.name / f"seed-{seed}"))
            # The scores by the plain path, one client after another.
            model, schema = mlp.with_weights(federation, weights), federation.data_schema
            rows = [site.dataset for site in sites]
            counts = sum(
                objective.score(model, own.validation_x, own.validation_y, schema=schema, loss="cross_entropy")
                for own in rows
            )
            told = found[point.name].outcomes[seed].metrics
            expected = scores_of(np.asarray(counts), schema)
            assert told == {name: pytest.approx(expected[name]) for name in ("accuracy", "precision", "recall", "f1")}


def test_a_sweep_that_is_started_again_runs_what_is_missing(tmp_path, how):
    folder, told = tmp_path / "sweep", list[tuple[str, int, bool]]()

    def go(*texts: str, seeds: list[int], of: How = how, **changes: Any) -> list[Result]:
        told.clear()
        some = points(tmp_path, *texts, **changes)
        return [*run_all(some, folder, of, seeds=seeds, done=lambda p, seed, _, now: told.append((p.name, seed, now)))]

    first = go("training.learning_rate=0.1,0.5", seeds=[0, 1])
    assert [now for *_, now in told] == [True] * 4
    (folder / "runs" / first[1].point.name / "seed-1" / "scores.json").unlink()  # as if it had been interrupted
    again = go("training.learning_rate=0.1,0.5,0.7", seeds=[0, 1])
    rates = {result.point.name: result.point.settings["training", "learning_rate"] for result in again}
    redone = first[1].point.settings["training", "learning_rate"]
    assert sorted((rates[name], seed) for name, seed, now in told if now) == sorted([(redone, 1), (0.7, 0), (0.7, 1)])
    outcomes = {r.point.name: {seed: o.metrics for seed, o in r.outcomes.items()} for r in again}
    for result in first:
        assert outcomes[result.point.name] == {seed: o.metrics for seed, o in result.outcomes.items()}
    go("training.learning_rate=0.1", seeds=[0], training__rounds=4)  # another document: its own runs
    assert [now for *_, now in told] == [True]

    table(120, seed=6).write_csv(tmp_path / "table.csv")
    with pytest.raises(RunFolderError, match="other tables"):
        go("training.learning_rate=0.1", seeds=[0])
    with pytest.raises(RunFolderError, match="not the folder of a sweep"):
        list(run_all(points(tmp_path), tmp_path, how, seeds=[0]))


def test_a_point_that_cannot_run_says_why_and_is_tried_again(tmp_path, how):
    folder = tmp_path / "sweep"
    some = points(tmp_path, "privacy.row.epsilon=0.2,8", **PRIVATE)
    for _ in range(2):
        results = {r.point.settings["privacy", "row", "epsilon"]: r for r in run_all(some, folder, how, seeds=[0])}
        assert "4 of 4 clients refuse" in results[0.2].outcomes[0].error and not results[0.2].complete
        assert results[8].complete[0].epsilon["row"] == pytest.approx(8, abs=0.1)
        assert results[0.2].mean("accuracy") is None is results[8].deviation("accuracy")
    assert [path.parent.name for path in folder.glob("runs/*/seed-0")] == [results[8].point.name]


def test_two_sweeps_do_not_share_a_folder(tmp_path, how):
    def nested() -> Iterator[Point]:
        yield from run_all(points(tmp_path), tmp_path / "sweep", how, seeds=[0])  # type: ignore[misc]

    with pytest.raises(RunFolderError, match="another sweep is at work in this folder"):
        list(run_all(nested(), tmp_path / "sweep", how, seeds=[0]))


def _die(job: object) -> Outcome:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_process_that_is_killed_is_said(tmp_path, how, monkeypatch):
    monkeypatch.setattr(runs, "_run", _die)
    with pytest.raises(WorkerLost, match="ended from outside"):
        list(run_all(points(tmp_path), tmp_path / "sweep", how, seeds=[0]))


def test_models_are_scored_on_a_held_out_table_where_one_is_given(tmp_path, how):
    table(60, seed=9).write_csv(tmp_path / "held-out.csv")
    with_table = replace(how, held_out=tmp_path / "held-out.csv")
    (result,) = run_all(points(tmp_path), tmp_path / "sweep", with_table, seeds=[0])
    accuracy = result.outcomes[0].metrics["accuracy"]
    assert accuracy * 60 == pytest.approx(round(accuracy * 60))
    about = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert len(about["held_out"]) == 64
