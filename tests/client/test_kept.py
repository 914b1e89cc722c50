"""A client has the model that it gave its data to: the last of each run, whole, whatever else happens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import kept
from client.fetch import _beside
from client.kept import KeptModels
from common.errors import ModelError
from common.inference import saved
from common.inference.saved import SavedModel
from common.model.weights import Weights, initial_weights
from tests.support import federation, saved_model


def keeper(folder: Path) -> KeptModels:
    return KeptModels(folder / "models", federation())


def note(models: KeptModels, complete: int, *, run: str = "run", privacy: dict[str, Any] | None = None) -> Weights:
    weights = initial_weights(federation(), seed=complete)
    models.note(weights, run=run, complete=complete, privacy=lambda: privacy or {})
    return weights


def read(path: Path) -> SavedModel:
    return saved.from_bytes(path.read_bytes(), "it")


def test_the_last_model_that_was_sent_is_kept_with_its_document_and_its_cost(tmp_path):
    models = keeper(tmp_path)
    note(models, 1)
    weights = note(models, 2, privacy={"row": {"epsilon": 1.5}})
    models.flush()
    model = read(kept.newest(tmp_path / "models"))
    assert (model.run, model.round, model.privacy) == ("run", 2, {"row": {"epsilon": 1.5}})
    assert model.federation.fingerprint == federation().fingerprint
    assert all(np.array_equal(model.weights[name], array) for name, array in weights.items())
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["run.safetensors"]


def test_the_first_model_is_written_at_once_and_the_next_a_moment_later(tmp_path, monkeypatch):
    models = keeper(tmp_path)
    note(models, 1)
    note(models, 2)
    assert read(tmp_path / "models" / "run.safetensors").round == 1
    monkeypatch.setattr(kept, "WRITTEN_EVERY_S", 0.0)
    note(models, 3)
    assert read(tmp_path / "models" / "run.safetensors").round == 3


def test_a_model_that_no_round_has_made_is_not_kept(tmp_path):
    models = keeper(tmp_path)
    note(models, 0)
    models.flush()
    assert not (tmp_path / "models").exists()
    with pytest.raises(
        ModelError, match="models: no model yet; a client keeps one once a run's first round is complete"
    ):
        kept.newest(tmp_path / "models")


def test_another_run_leaves_the_models_of_those_before(tmp_path):
    models = keeper(tmp_path)
    for run in ("one", "two", "a/run:with a name that is no file's", "../two"):
        note(models, 1, run=run)
        models.flush()
    found = {read(p).run for p in (tmp_path / "models").iterdir()}
    assert found == {"one", "two", "a/run:with a name that is no file's", "../two"}
    assert [p.name for p in tmp_path.iterdir()] == ["models"]
    assert read(kept.newest(tmp_path / "models")).run == "../two"


def test_a_folder_that_cannot_be_written_is_said_once_and_ends_nothing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(kept, "WRITTEN_EVERY_S", 0.0)
    (tmp_path / "models").write_text("a file")
    models = keeper(tmp_path)
    for complete in (1, 2, 3):
        note(models, complete)
    models.flush()
    (said,) = caplog.messages
    assert "the model cannot be kept: " in said and said.endswith("training goes on without it")


def test_what_a_client_stated_itself_stands_in_the_servers_model():
    model = replace(saved_model(), privacy={"run": "run", "row": {"epsilon": 2.0, "per_client": {}}})
    own = {"ada": {"epsilon": 1.0}}
    assert kept.with_own(model, own).privacy == {"run": "run", "row": {"epsilon": 2.0, "per_client": own}}
    without = replace(saved_model(), privacy={"run": "run", "row": None})
    assert kept.with_own(without, own).privacy == without.privacy


def test_a_fetched_model_never_takes_the_place_of_a_later_one():
    earlier, later = replace(saved_model(), round=2), replace(saved_model(), round=3)
    assert _beside(later, earlier) is later
    assert _beside(earlier, later).round == 3


def test_what_we_stated_stays_beside_a_fetched_model():
    own = {"ada": {"epsilon": 1.0}}
    ours = replace(saved_model(), round=2, privacy={"run": "run", "row": {"epsilon": 2.0, "per_client": own}})
    going_on = replace(saved_model(), round=3)  # whose run has stated nothing yet
    assert _beside(ours, going_on).privacy == ours.privacy
    ended = replace(going_on, privacy={"run": "run", "row": {"epsilon": 3.0, "per_client": {}}})
    assert _beside(ours, ended).privacy["row"] == {"epsilon": 3.0, "per_client": own}
