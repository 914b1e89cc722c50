from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import numpy as safetensors

from common.document import federation as federations
from common.errors import RunFolderError
from common.inference import saved
from server.folder.folder import RunFolder, load_model, model_for_clients
from server.rounds.events import RoundEnded, Started
from tests.support import PRIVATE, federation, saved_model

STATE = {
    "layers.1.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "layers.0.bias": np.array([np.pi], np.float32),
    "a": np.zeros((0, 2), np.float32),
}


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder.create(federation(), path=tmp_path / "run")


def test_a_folder_holds_the_document_with_the_same_fingerprint(tmp_path):
    document = federation(**PRIVATE, training__learning_rate=1e-5)
    folder = RunFolder.create(document, path=tmp_path / "deep" / "run")
    copy = federations.load(folder.path / "federation.yaml")
    assert copy.fingerprint == document.fingerprint
    assert "delta: 0.001" in (folder.path / "federation.yaml").read_text()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_exists_is_refused_and_untouched(tmp_path, kind):
    path = tmp_path / "run"
    kept = path
    if kind == "folder":
        path.mkdir()
        kept = path / "model.safetensors"
    kept.write_text("precious")
    with pytest.raises(RunFolderError, match=r"run: exists already; name another folder, or move it away"):
        RunFolder.create(federation(), path=path)
    assert kept.read_text() == "precious"
    assert sum(1 for _ in tmp_path.rglob("*")) == (2 if kind == "folder" else 1)


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"run: cannot be made: Not a directory"):
        RunFolder.create(federation(), path=tmp_path / "file" / "run")


def test_folders_made_within_one_second_have_different_names(tmp_path):
    paths = [RunFolder.create(federation(), root=tmp_path / "runs").path for _ in range(5)]
    assert len(set(paths)) == 5
    assert all("small" in path.name and path.parent == tmp_path / "runs" for path in paths)


def test_events_are_lines_in_the_order_they_came(folder):
    for number in range(3):
        folder.record(RoundEnded(round=number, rounds=3, failed="two\nlines, é"))
    lines = (folder.path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2]
    assert json.loads(lines[0])["failed"] == "two\nlines, é"


def test_a_model_is_loaded_as_it_was_saved_in_its_order(folder):
    folder.save_model(STATE, server_round=7)
    loaded = load_model(folder.path)
    assert list(loaded) == list(STATE)
    for name, array in STATE.items():
        assert (loaded[name].dtype, loaded[name].tolist()) == (array.dtype, array.tolist())


def test_any_safetensors_reader_can_read_the_model(folder):
    folder.save_model({"w": STATE["layers.1.weight"].T}, server_round=7)
    read = safetensors.load_file(folder.path / "model.safetensors")
    assert read["w"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_later_model_replaces_the_earlier_whole(folder):
    folder.save_model(STATE, server_round=1)
    folder.save_model({"w": np.ones(2, np.float32)}, server_round=2)
    assert list(load_model(folder.path)) == ["w"]


@pytest.mark.parametrize("crash_in", ["fsync", "rename"])
def test_a_crash_while_writing_leaves_the_old_file_whole(folder, monkeypatch, crash_in):
    folder.save_model(STATE, server_round=1)
    folder.write_json("result.json", {"status": "completed"})

    def crash(*args: object) -> None:
        raise KeyboardInterrupt("power cut")

    monkeypatch.setattr(*((os, "fsync") if crash_in == "fsync" else (Path, "replace")), crash)
    for write in (
        lambda: folder.save_model({"w": np.ones(2, np.float32)}, server_round=2),
        lambda: folder.write_json("result.json", {"status": "failed"}),
    ):
        with pytest.raises(KeyboardInterrupt, match="power cut"):
            write()
    assert list(load_model(folder.path)) == list(STATE)
    assert json.loads((folder.path / "result.json").read_text()) == {"status": "completed"}
    monkeypatch.undo()
    folder.write_json("result.json", {"status": "failed"})  # what the crash left is in nobody's way
    assert json.loads((folder.path / "result.json").read_text()) == {"status": "failed"}


def test_nothing_but_finished_files_is_left(folder):
    folder.save_model(STATE, server_round=1)
    folder.write_json("result.json", {})
    assert sorted(p.name for p in folder.path.iterdir()) == ["federation.yaml", "model.safetensors", "result.json"]


def test_a_full_disk_is_an_error_of_ours(folder, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match=r"result\.json: cannot be written: No space left on device"):
        folder.write_json("result.json", {})
    assert not (folder.path / "result.json").exists()


def test_a_client_is_given_the_model_without_what_the_others_stated(tmp_path):
    model = saved_model(**PRIVATE)
    folder = RunFolder.create(model.federation, path=tmp_path / "run")
    folder.record(Started(run="small-1", rounds=3))
    folder.save_model(model.weights, server_round=3)
    given = saved.from_bytes(model_for_clients(folder.path), "it")
    assert (given.run, given.round, given.privacy) == ("small-1", 3, {})
    stated = {"run": "small-1", "row": {"epsilon": 2.0, "per_client": {"ada": {"epsilon": 1.0}}}, "client": None}
    folder.write_json("privacy.json", stated)
    row = saved.from_bytes(model_for_clients(folder.path), "it").privacy["row"]
    withheld = "each client's own figures are the client's to tell"
    assert row == {"epsilon": 2.0, "per_client": {}, "withheld": withheld}


def test_a_folder_without_a_model_says_so(tmp_path):
    with pytest.raises(
        RunFolderError, match=r"model\.safetensors: there is none; a run has a model once its first round"
    ):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "data",
    [b"", b"rubbish that is long enough", safetensors.save({"w": np.zeros(2)})],
    ids=["nothing", "rubbish", "another program's"],
)
def test_a_damaged_model_says_so(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(RunFolderError, match=r"model\.safetensors: not the model of a run, or damaged"):
        load_model(tmp_path)


def test_a_model_that_was_cut_off_says_so(folder):
    folder.save_model(STATE, server_round=1)
    path = folder.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(RunFolderError, match="not the model of a run, or damaged"):
        load_model(folder.path)
