"""`join --strict`: the owner's table against the owner's copy of the document, before any server is heard."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
import yaml

from client.settings import load_client_file
from cloister.check import check_file, check_table
from cloister.join import join
from common.errors import DataError
from tests.support import PRIVATE, document, federation, table


@pytest.fixture
def client(tmp_path: Path) -> Path:
    table().write_csv(tmp_path / "ada.csv")
    (tmp_path / "federation.yaml").write_text(yaml.safe_dump(document(**PRIVATE)))
    settings = {
        "server": "127.0.0.1:1",
        "tls": None,
        "name": "ada",
        "data": {"path": "ada.csv", "name": "ada"},
        "federation": "federation.yaml",
        "state": "state",
        "policy": {"epsilon": 8.0, "delta": 1e-3},
    }
    (tmp_path / "client.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "client.yaml"


def test_a_table_that_fits_is_said_to(client):
    said = check_table(load_client_file(client), client)
    assert said[0] == f"all 200 rows fit federation small, fingerprint {federation(**PRIVATE).fingerprint}"
    assert said[1:] == ["classes: 0 91, 1 109"]
    assert check_file(client)[-2:] == said
    assert not (client.parent / "state").exists()


def test_check_and_strict_tell_what_cannot_be_in_a_typed_column(client):
    table().with_columns(c=1).write_parquet(client.parent / "ada.parquet")
    client.write_text(client.read_text().replace("ada.csv", "ada.parquet"))
    for checked in (lambda: check_file(client), lambda: check_table(load_client_file(client), client)):
        with pytest.raises(DataError, match=r"ada\.parquet: column c holds Int32, so no category can be in it"):
            checked()


def test_a_table_that_does_not_fit_ends_it_before_a_server_is_sought_and_nothing_is_noted(client, capsys):
    path = client.parent / "ada.csv"
    path.write_text(path.read_text().replace("red", "blue", 1).replace("\n0.", "\nx0.", 1))
    with pytest.raises(typer.Exit):
        join(client, wait=0.0, strict=True)
    assert re.search(
        r"ada\.csv: 1 cell does not fit the schema:\n  line \d+: a: expected a number", capsys.readouterr().err
    )
    assert not list((client.parent / "state").glob("*.ledger"))


def test_strict_needs_the_owners_copy_of_the_document(client, capsys):
    client.write_text(client.read_text().replace("federation: federation.yaml\n", ""))
    with pytest.raises(typer.Exit):
        join(client, wait=0.0, strict=True)
    assert re.search(r"client\.yaml: federation is missing; --strict checks the table against", capsys.readouterr().err)
