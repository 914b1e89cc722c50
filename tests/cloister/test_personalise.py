from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

import cloister
from client import kept, personal
from client.settings import load_client_file
from common.inference import saved
from tests.support import PRIVATE, saved_model, table

MODEL = saved_model(**PRIVATE)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cloister.app, ["personalise", *map(str, arguments)])


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A client file of an owner who keeps a model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(personal, "STEPS", (0, 16))
    monkeypatch.setattr(personal, "RATES", (0.02,))
    monkeypatch.setattr(personal, "PULLS", (0.1,))
    table(120).write_csv("table.csv")
    value: dict[str, Any] = {
        "server": "127.0.0.1:1",
        "tls": None,
        "data": {"path": "table.csv", "name": "ada"},
        "device": "cpu",
        "state": "state",
        "policy": {"epsilon": 8.0, "delta": 1e-3},
    }
    Path("ada.yaml").write_text(yaml.safe_dump(value))
    kept.keep(load_client_file(Path("ada.yaml")).models, MODEL)
    return tmp_path / "ada.yaml"


def test_four_models_are_compared_and_the_best_of_ones_own_is_kept(client):
    done = run(client)
    assert done.exit_code == 0, done.output
    for kind in personal.KINDS:
        assert kind in done.output
    assert "rows the federation's model is right and your own alone is wrong" in done.output
    assert "it was trained on your rows without noise: do not give it away" in done.output
    (path,) = (client.parent / "state" / "ada.personal").iterdir()
    assert str(path) in done.output
    model = saved.from_bytes(path.read_bytes(), str(path))
    assert (model.run, model.privacy) == (MODEL.run, {"personal": personal.NOTE})
    assert path.stat().st_mode & 0o077 == 0
    # It is a model like any other, and nothing was charged for it.
    predicted = CliRunner().invoke(cloister.app, ["predict", str(path), "table.csv", "-o", "out.csv"])
    assert predicted.exit_code == 0 and "predictions for 120 rows" in predicted.output
    assert not (client.parent / "state" / "ada.ledger").exists()


def test_a_program_is_told_all_of_it(client):
    told = json.loads(run(client, "--json", "-o", "own.safetensors").output)
    assert list(told["models"]) == list(personal.KINDS)
    assert told["rows"] + told["validation_rows"] == 120
    assert 0 <= told["models"]["alone"]["accuracy"] <= 1 and told["models"]["federation"]["steps"] == 0
    assert told["kept"] == "own.safetensors" and Path("own.safetensors").stat().st_mode & 0o077 == 0
    assert told["best"] in ("head", "personal", "alone") and told["verdict"].endswith(".")


def test_another_model_can_be_given(client):
    other = saved_model(seed=3, **PRIVATE)
    Path("other.safetensors").write_bytes(saved.to_bytes(other))
    one, two = (json.loads(run(client, *more, "--json", "-o", name, "--force").output) for more, name in (
        ((), "a.safetensors"), (("other.safetensors",), "b.safetensors"),
    ))  # fmt: skip
    assert one["models"]["federation"] != two["models"]["federation"]
    assert one["models"]["alone"] == two["models"]["alone"]


def test_what_cannot_be_done_is_one_clear_line(client):
    Path("own.safetensors").write_text("mine")
    done = run(client, "-o", "own.safetensors")
    assert (done.exit_code, Path("own.safetensors").read_text()) == (2, "mine")
    assert "own.safetensors: is there already; --force replaces it" in done.output
    table(8).write_csv("table.csv")
    done = run(client)
    assert done.exit_code == 2 and "to say anything, at least 10 and 1 are needed" in done.output
    for path in (client.parent / "state" / "ada.models").iterdir():
        path.unlink()
    done = run(client)
    assert done.exit_code == 2 and "no model yet" in done.output


def test_of_several_targets_one_is_personalised_where_it_is_said(client):
    also = [{"name": "size", "bounds": [-1, 1], "missing": ["?"]}]
    model = saved_model(**PRIVATE, schema__also=also)
    Path("several.safetensors").write_bytes(saved.to_bytes(model))
    rows = table(120)
    rows.with_columns(size=rows["a"].cast(str).scatter(range(0, 120, 4), "?")).write_csv("table.csv")
    refused = run(client, "several.safetensors", "--target", "size")
    assert refused.exit_code == 2 and "--target: say with -o where the model goes" in refused.output
    assert not (client.parent / "state" / "ada.personal").exists()
    done = run(client, "several.safetensors", "--target", "size", "-o", "size.safetensors", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["rows"] + told["validation_rows"] == 90  # those that have it
    made = saved.from_bytes(Path("size.safetensors").read_bytes(), "it")
    assert made.federation.data_schema.target.name == "size" and made.whole == model.federation.fingerprint
