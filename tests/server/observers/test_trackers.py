"""Runs in TensorBoard and MLflow, read back by their own readers."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run as RunOfMlflow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util.tensor_util import make_ndarray
from typer.testing import CliRunner, Result

import cloister
from server.folder.folder import RunFolder
from server.observers.trackers import tracking
from server.observers.trackers.mlflow import MlflowRun
from server.observers.trackers.tracker import named, params_of
from server.observers.trackers.tracking import Kind, live
from server.rounds.events import Ended, RoundEnded, Started
from tests.server.folder.test_checkpoint import Fleet, Killed, begin, resume
from tests.server.report.runs import completed, rounds, written
from tests.support import PRIVATE, WHOLE, document, federation, table

KINDS = pytest.mark.parametrize("kind", ["tensorboard", "mlflow"])
Scalars = dict[tuple[str, int], tuple[float, int]]  # (name, step) -> value and time in ms


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch) -> str:
    """Where `mlflow` writes."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    return f"file:{tmp_path / 'store'}"


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cloister.app, [str(a) for a in arguments])


def only_run(uri: str) -> RunOfMlflow:
    client = MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    return found


def of_mlflow(uri: str) -> Scalars:
    found, client = only_run(uri), MlflowClient(uri)
    points = [point for key in found.data.metrics for point in client.get_metric_history(found.info.run_id, key)]
    assert len({(p.key, p.step) for p in points}) == len(points), "a figure is there twice"
    return {(p.key, p.step): (p.value, p.timestamp) for p in points}


def of_tensorboard(folder: Path) -> Scalars:
    found = EventAccumulator(str(folder)).Reload()
    points = [(tag, point) for tag in found.Tags()["scalars"] for point in found.Scalars(tag)]
    assert len({(tag, p.step) for tag, p in points}) == len(points), "a figure is there twice"
    return {(tag, p.step): (p.value, round(p.wall_time * 1000)) for tag, p in points}


def tracked(kind: Kind, store: str, folder: Path) -> Scalars:
    return of_tensorboard(folder) if kind == "tensorboard" else of_mlflow(store)


@KINDS
def test_a_run_is_read_back_with_its_figures_at_their_rounds_and_times(tmp_path, store, kind):
    completed(tmp_path / "run")
    done = run("track", tmp_path / "run", "--to", kind)
    assert done.exit_code == 0, done.output
    found = tracked(kind, store, tmp_path / "run/tensorboard")
    # As the helper has it: 0.5 of epsilon a round; right on (40 + 50 n / 3 + 90) of 200 rows; at 1e9 + n seconds.
    for n in (1, 2, 3):
        assert found["epsilon/row", n] == (pytest.approx(0.5 * n), (10**9 + n) * 1000)
        assert found["evaluation/accuracy", n][0] == pytest.approx((130 + 50 * n / 3) / 200)
        assert found["evaluation/per_client/ben/accuracy", n][0] == pytest.approx(0.6)
        assert (found["round/clients", n][0], found["round/asked", n][0], found["seconds/transfer", n][0]) == (
            2.0,
            3.0,
            pytest.approx(0.2),
        )
    assert [found["round/rejected", n][0] for n in (1, 2, 3)] == [0.0, 1.0, 0.0]
    assert not any(name.startswith("train/") for name, _ in found)  # a private run tells no loss


def test_mlflow_has_the_document_and_how_the_run_ended_but_nobody_s_name(tmp_path, store):
    completed(tmp_path / "run")
    done = run("track", tmp_path / "run", "--to", "mlflow")
    assert done.output == f"run small-1 of experiment small at {store}\n"
    found = only_run(store)
    assert (found.info.run_name, found.info.status, found.info.start_time, found.info.end_time) == (
        "small-1",
        "FINISHED",
        10**12,
        2 * 10**12,
    )
    params = found.data.params
    assert (params["training.learning_rate"], params["model.hidden"], params["privacy.row.epsilon"]) == (
        "0.1",
        "[8]",
        "4.0",
    )
    assert params["fingerprint"] == federation(**PRIVATE).fingerprint
    assert found.data.tags == {"cloister.run": "small-1", "cloister.status": "completed", "mlflow.runName": "small-1"}


def test_tensorboard_has_the_document_as_hyperparameters_and_no_machine_s_name(tmp_path):
    completed(tmp_path / "run")
    run("track", tmp_path / "run", "--to", "tensorboard")
    found = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    told = HParamsPluginData.FromString(content).session_start_info.hparams
    assert (told["training.learning_rate"].number_value, told["model.hidden"].string_value) == (0.1, "[8]")
    assert make_ndarray(found.Tensors("status")[0].tensor_proto).tolist() == b"completed"
    (file,) = (tmp_path / "run/tensorboard").iterdir()
    assert file.name.removeprefix("events.out.tfevents.").isdigit()


@pytest.mark.parametrize(("status", "said"), [("failed", "FAILED"), ("stopped", "KILLED"), (None, "RUNNING")])
def test_a_run_that_did_not_end_well_is_no_finished_one(tmp_path, store, status, said):
    end = [Ended(status=status, time=2e9)] if status else []
    written(tmp_path / "run", federation(), [Started(run="r", rounds=3, time=1e9), *rounds(federation()), *end])
    run("track", tmp_path / "run", "--to", "mlflow")
    assert only_run(store).info.status == said


def served(path: Path, kind: Kind, **changes: Any) -> None:
    """A run that is tracked as it goes, dies in its fourth round, and goes on, tracked again."""
    fed, warnings = federation(training__rounds=5, **changes), []

    def observer(past: Iterator[Any]) -> Callable[[Any], None]:
        (found,) = live([kind, kind], fed, path, past=past, warn=warnings.append)
        return found

    with pytest.raises(Killed):
        begin(path, fed, Fleet(die=lambda what, number, node: number == 4), observe=observer(iter(())))
    resume(path, Fleet(), observe=observer(RunFolder(path).events()))
    assert warnings == []


def replayed(path: Path, kind: Kind, into: Path) -> Scalars:
    """The same run, written anew from its folder."""
    where = ["--uri", f"file:{into}"] if kind == "mlflow" else ["--into", into]
    done = run("track", path, "--to", kind, *where)
    assert done.exit_code == 0, done.output
    return tracked(kind, f"file:{into}", into / "run")


@KINDS
@pytest.mark.parametrize("changes", [{}, WHOLE], ids=["plain", "privacy.client"])
def test_a_run_tracked_as_it_goes_is_the_same_as_one_replayed_from_its_folder(tmp_path, store, kind, changes):
    served(tmp_path / "run", kind, **changes)
    found = tracked(kind, store, tmp_path / "run/tensorboard")
    assert {step for _, step in found} == {1, 2, 3, 4, 5}
    assert found == replayed(tmp_path / "run", kind, tmp_path / "again")


@KINDS
def test_a_run_that_goes_on_tracked_is_tracked_from_its_first_round(tmp_path, store, kind):
    path, fed, warnings = tmp_path / "run", federation(), []
    with pytest.raises(Killed):
        begin(path, fed, Fleet(die=lambda what, number, node: number == 3))
    (observer,) = live([kind], fed, path, past=RunFolder(path).events(), warn=warnings.append)
    resume(path, Fleet(), observe=observer)
    found = tracked(kind, store, path / "tensorboard")
    assert {step for _, step in found} == {1, 2, 3} and warnings == []
    assert found == replayed(path, kind, tmp_path / "again")


def test_simulate_tracks_as_it_goes(tmp_path, store, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("federation.yaml").write_text(yaml.safe_dump(document()))
    table().write_csv("table.csv")
    how = ["--data", "table.csv", "--clients", 2, "--out", "run", "--device", "cpu", "--quiet", "--no-report"]
    done = run("simulate", "federation.yaml", *how, "--track", "tensorboard", "--track", "mlflow")
    assert done.exit_code == 0, done.output
    both = of_tensorboard(Path("run/tensorboard")), of_mlflow(store)
    assert both[0].keys() == both[1].keys() and {step for _, step in both[0]} == {1, 2, 3}
    assert only_run(store).info.status == "FINISHED"


@pytest.mark.parametrize("changes", [PRIVATE, WHOLE], ids=["privacy.row", "privacy.client"])
def test_nothing_is_tracked_that_the_run_folder_does_not_hold(tmp_path, store, changes):
    path = tmp_path / "run"
    if changes is WHOLE:
        served(path, "mlflow", **changes)
    else:
        completed(path)
        run("track", path, "--to", "mlflow")
    told: set[float] = set()

    def number(text: str) -> float:
        told.add(float(text))
        return float(text)

    for line in (path / "events.jsonl").read_text().splitlines():
        rejected = json.loads(line, parse_int=number, parse_float=number).get("rejected", ())
        told.add(float(len(rejected)))
    found = of_mlflow(store)
    assert found and {value for value, _ in found.values()} <= told
    hidden = {"seconds/clients", "seconds/transfer", "seconds/aggregation", "train/loss"}
    assert not hidden & {name for name, _ in found} or changes is PRIVATE


@KINDS
def test_a_run_that_is_tracked_again_gets_only_what_is_missing(tmp_path, store, kind):
    fed = federation()
    three = rounds(fed)
    path = written(tmp_path / "run", fed, [Started(run="run", rounds=3, time=1e9), *three[:2]]).path
    first = replayed(path, kind, tmp_path / "again")
    assert {step for _, step in first} == {1, 2}
    for event in (three[2], Ended(status="completed", time=2e9)):
        RunFolder(path).record(event)
    again = replayed(path, kind, tmp_path / "again")  # and no figure is there twice: see the readers
    assert {step for _, step in again} == {1, 2, 3} and first.items() <= again.items()
    assert replayed(path, kind, tmp_path / "again") == again == replayed(path, kind, tmp_path / "other")


@KINDS
def test_a_round_that_failed_is_there_with_what_it_cost_and_without_scores(tmp_path, store, kind):
    failed = RoundEnded(round=2, rounds=3, failed="no quorum", privacy={"row": {"epsilon": 2.5}}, time=1e9 + 2)
    events = [Started(run="run", rounds=3, time=1e9), rounds(federation(), count=1)[0], failed]
    written(tmp_path / "run", federation(), events)
    found = replayed(tmp_path / "run", kind, tmp_path / "again")
    assert {name: value for (name, step), (value, _) in found.items() if step == 2} == {
        "round/failed": 1.0,
        "round/clients": 0.0,
        "round/asked": 0.0,
        "round/rejected": 0.0,
        "seconds/round": 0.0,
        "seconds/waiting": 0.0,
        "epsilon/row": 2.5,
    }


@KINDS
def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(tmp_path, monkeypatch, kind):
    path, fed, warnings = tmp_path / "run", federation(), []
    if kind == "mlflow":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")  # where nobody listens
    else:
        monkeypatch.setattr(tracking, "FOLDER", "events.jsonl")  # a file, in which nothing can be written
    (observer,) = live([kind], fed, path, past=(), warn=warnings.append)
    assert begin(path, fed, Fleet(), observe=observer)["status"] == "completed"
    (warning,) = warnings
    assert warning.startswith(f"{kind}: ") and "secret" not in warning and "\n" not in warning
    assert warning.endswith(f"the run goes on untracked, `cloister track {path}` adds what is missing")


def test_a_disk_that_fills_up_is_one_warning_and_what_is_missing_is_added_later(tmp_path):
    path, fed, warnings = tmp_path / "run", federation(), []
    (observer,) = live(["tensorboard"], fed, path, past=(), warn=warnings.append)

    def fill(event: Any) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if isinstance(event, RoundEnded) and event.round == 2:  # ... whose record is cut in the middle
            (file,) = (path / "tensorboard").iterdir()
            resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 100, before[1]))
        try:
            observer(event)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert begin(path, fed, Fleet(), observe=fill)["status"] == "completed"
    assert [w for w in warnings if "tensorboard: cannot be written: File too large" in w] == warnings != []
    assert {step for _, step in of_tensorboard(path / "tensorboard")} == {1}
    assert run("track", path, "--to", "tensorboard").exit_code == 0
    assert of_tensorboard(path / "tensorboard") == replayed(path, "tensorboard", tmp_path / "again")


@KINDS
def test_a_tracker_that_cannot_be_written_ends_the_verb_with_one_line(tmp_path, kind):
    completed(tmp_path / "run")
    (tmp_path / "file").touch()
    where = ["--uri", "http://me:secret@127.0.0.1:9"] if kind == "mlflow" else ["--into", tmp_path / "file"]
    done = run("track", tmp_path / "run", "--to", kind, *where)
    assert (done.exit_code, done.output.count("error: "), done.output.count("\n")) == (2, 1, 1)
    assert "secret" not in done.output
    assert ("cannot be tracked" if kind == "mlflow" else "cannot be written: Not a directory") in done.output


@KINDS
def test_a_tracker_that_is_not_installed_is_told_before_anything_is_run(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "federation.yaml").touch()
    for verb in (
        ["track", completed(tmp_path / "run").path, "--to", kind],
        ["simulate", tmp_path / "federation.yaml", "--track", kind],
        ["serve", tmp_path / "federation.yaml", "--insecure", "--track", kind],
    ):
        done = run(*verb)
        assert (done.exit_code, done.output) == (2, f"error: this needs {kind}: pip install 'cloister[{kind}]'\n")


def test_mlflow_has_to_be_told_where_and_options_go_with_their_tracker(tmp_path, monkeypatch):
    completed(tmp_path / "run")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    done = run("track", tmp_path / "run", "--to", "mlflow")
    assert done.exit_code == 2 and done.output.startswith("error: mlflow: say where: set MLFLOW_TRACKING_URI, as http:")
    for mixed in (("mlflow", "--into", tmp_path), ("tensorboard", "--uri", "file:x")):
        done = run("track", tmp_path / "run", "--to", *mixed)
        assert done.exit_code == 2 and "--into belongs to --to tensorboard, and --uri to --to mlflow" in done.output


def test_a_run_that_has_not_begun_has_nothing_to_track(tmp_path):
    written(tmp_path / "run", federation(), [])
    done = run("track", tmp_path / "run", "--to", "tensorboard")
    assert (done.exit_code, done.output) == (
        2,
        f"error: {tmp_path / 'run'}: this run has not begun: there is nothing to track\n",
    )


def test_names_of_columns_and_classes_stay_apart_and_are_taken_by_mlflow(store):
    parts = ["<50K", ">50K", "-3c-50K", "a-b", "a/b", "..", ".", "", "Größe (cm)", "x" * 300, "x" * 299 + "y", "a b_c"]
    names = [named("evaluation", part) for part in parts]
    assert len(set(names)) == len(parts)
    assert (names[0], names[3], names[-1]) == ("evaluation/-3c-50K", "evaluation/a-b", "evaluation/a b_c")
    MlflowRun(store, experiment="small", run="r", began=1.0).scalars(dict.fromkeys(names, 2.0), step=1, time=1.0)
    assert of_mlflow(store).keys() == {(name, 1) for name in names}


def test_params_hold_every_setting_of_a_document():
    params = params_of(federation(**PRIVATE))
    assert params["name"] == "small" and params["privacy.client"] == "null" and params["training.nesterov"] is False
    features = json.loads(str(params["schema.features"]))
    assert [feature["name"] for feature in features] == ["a", "b", "c"]
