"""Table, account and machine against a federation, and the whole examination."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from client.account.entries import Entry
from client.account.ledger import Ledger
from client.doctor import account, machine, table
from client.doctor.examination import examine
from client.settings import load_client_file
from client.site import split_key
from common.document import federation as federations
from common.errors import LedgerError
from common.findings import State, is_ready
from tests.client.account.test_ledger import entry
from tests.client.doctor.support import POLICY, client_file, drained, of, settings_in
from tests.client.doctor.test_link import made
from tests.server.sessions.test_grid import FEDERATION, serving
from tests.support import PRIVATE, document, federation
from tests.support import table as rows_of

PRIVATE_FEDERATION = federation(**PRIVATE)


def accounted(folder: Path, asked=PRIVATE_FEDERATION, **changes: Any):
    """What is found of an account, with a table that fits."""
    settings = settings_in(folder, **changes)
    _, dataset = drained(table.look(settings, asked))
    return list(account.look(settings, folder / "client.yaml", asked, dataset))


# The table


def test_a_table_that_fits_is_told_in_its_parts_and_with_what_was_not_taken_as_it_stands(tmp_path):
    settings = settings_in(tmp_path)
    frame = rows_of(200)
    frame[0, "a"] = 9.0
    frame.write_csv(tmp_path / "ada.csv")
    found = list(table.look(settings, PRIVATE_FEDERATION))
    assert found[0].said.startswith("200 rows fit the schema: ")
    assert {f.state for f in found} == {State.OK}
    assert "cells outside their bounds, clamped: a 1" in [f.said for f in found]


def test_a_column_that_is_mostly_clamped_and_rows_that_are_left_out_are_warnings(tmp_path):
    settings = settings_in(tmp_path)
    frame = rows_of(200).with_columns(a=pl.col("a") + 5).cast({"b": pl.String})
    frame[3, "b"] = "many"
    frame.write_csv(tmp_path / "ada.csv")
    clamped, left_out = of(table.look(settings, PRIVATE_FEDERATION), State.WARNING)
    assert "column a: 200 of 200 cells are outside its bounds" in clamped
    assert "left out: 1 row that does not fit the schema" in left_out and "many" in left_out


def test_a_table_without_a_column_is_wrong_and_says_which(tmp_path):
    settings = settings_in(tmp_path)
    rows_of(50).drop("b").write_csv(tmp_path / "ada.csv")
    found = list(table.look(settings, PRIVATE_FEDERATION))
    (wrong,) = of(found, State.WRONG)
    assert "the table lacks b; it has a, c, y" in wrong and "mend the table, or ask whoever coordinates" in wrong


def test_a_split_key_that_is_damaged_is_wrong(tmp_path):
    settings = settings_in(tmp_path)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "split.key").write_bytes(b"short")
    (wrong,) = of(table.look(settings, PRIVATE_FEDERATION), State.WRONG)
    assert "not a split key of 32 bytes" in wrong


def test_rows_are_dealt_as_the_runs_deal_them_once_there_is_a_key(tmp_path):
    settings = settings_in(tmp_path)
    split_key(tmp_path / "state")
    parts = {next(iter(table.look(settings, PRIVATE_FEDERATION))).said for _ in range(3)}
    assert len(parts) == 1


# The account


def test_a_policy_that_allows_less_is_wrong_in_each_point(tmp_path):
    found = accounted(tmp_path, policy={**POLICY, "max_rounds": 1, "max_clip": 1e-3, "releases": ["evaluation"]})
    wrong = [line for line in of(found, State.WRONG) if line.startswith("policy: ")]
    assert [line.split()[1] for line in wrong] == [
        "policy.max_clip:",
        "policy.max_rounds:",
        "policy.releases:",
        "policy.releases:",
    ]


def test_a_plan_is_made_and_confirmed_and_nothing_is_written(tmp_path):
    found = accounted(tmp_path)
    assert is_ready(found)
    plans = [f.said for f in found if f.what == "plan"]
    assert "costs a row at most epsilon" in plans[0] and "a second accountant confirms the plan" in plans[1]
    assert not (tmp_path / "state").exists()


def test_a_budget_that_is_spent_is_wrong_by_its_numbers(tmp_path):
    ledger = Ledger(tmp_path / "state" / "ada.ledger")
    ledger.charge(entry(noise_multiplier=0.6, sampling_rate=1.0, steps=4))
    ledger.close()
    found = accounted(tmp_path)
    assert any("of 8 left" in line and "the federation asks for 4" in line for line in of(found, State.WARNING))
    (wrong,) = of(found, State.WRONG)
    assert "policy.epsilon" in wrong and "`cloister budget` says what it was spent on" in wrong


def test_a_ledger_that_was_cut_off_is_wrong(tmp_path):
    ledger = Ledger(tmp_path / "state" / "ada.ledger")
    ledger.charge(entry())
    ledger.close()
    (tmp_path / "state" / "ada.head").unlink()
    (wrong,) = of(accounted(tmp_path), State.WRONG)
    assert "ada.head: is missing" in wrong


def test_a_copy_of_a_ledger_has_its_entries_and_takes_charges_that_it_does_not(tmp_path):
    path = tmp_path / "a.ledger"
    assert Ledger.copy_of(path).entries() == []
    ledger = Ledger(path, authority="theirs")
    ledger.charge(entry())
    copy = Ledger.copy_of(path, authority="theirs")  # while the ledger is in use
    copy.charge(entry())
    assert (copy.entries()[0], copy.count(), copy.rounds(), ledger.count()) == (ledger.entries()[0], 2, 2, 1)
    ledger.close()
    copy.close()
    path.write_bytes(b"no database" * 100)
    with pytest.raises(LedgerError, match="cannot be read as a ledger"):
        Ledger.copy_of(path)


@pytest.mark.parametrize(
    "approved, state, said",
    [
        ("ask", State.WARNING, "not given yet -> `cloister join` shows the document"),
        (["0" * 64], State.WRONG, f"add {PRIVATE_FEDERATION.fingerprint} to policy.approved"),
        ([PRIVATE_FEDERATION.fingerprint], State.OK, "you have said yes"),
    ],
)
def test_whether_the_owner_has_approved_is_told(tmp_path, approved, state, said):
    found = accounted(tmp_path, policy={**POLICY, "approved": approved})
    assert any(line.startswith("approval: ") and said in line for line in of(found, state))


def test_without_privacy_the_plan_says_so(tmp_path):
    found = accounted(tmp_path, federation(), policy={**POLICY, "without_privacy": True})
    assert any("rounds without differential privacy: updates can reveal rows" in f.said for f in found)


def test_documents_that_did_not_fit_are_counted_against_the_policy(tmp_path):
    ledger = Ledger(tmp_path / "state" / "ada.ledger")
    refused: dict[str, Any] = {"task": "", "run": "", "content": "", "split": "", "federation": "f"}
    for _ in range(3):
        ledger.charge(Entry(part="train", attempt=1, mechanism="refusal", **refused))
    ledger.close()
    assert any("3 documents did not fit this table" in line for line in of(accounted(tmp_path), State.WARNING))


# The machine


def test_a_device_that_is_not_here_is_wrong(tmp_path):
    (wrong,) = of(machine.look(settings_in(tmp_path, device="cuda:7"), PRIVATE_FEDERATION), State.WRONG)
    assert "device cuda:7 is not here" in wrong


def test_a_file_where_the_state_folder_should_be_is_wrong(tmp_path):
    settings = settings_in(tmp_path)
    (tmp_path / "state").write_text("")
    (wrong,) = of(machine.look(settings, None), State.WRONG)
    assert "state is a file -> name a folder" in wrong


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_state_folder_that_others_can_read_is_a_warning(tmp_path):
    settings = settings_in(tmp_path)
    (tmp_path / "state").mkdir(mode=0o755)
    (warning,) = of(machine.look(settings, None), State.WARNING)
    assert "open to others than its owner -> run `chmod 700" in warning


def test_a_disk_with_too_little_room_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "LEAST_ROOM", 1 << 60)
    (wrong,) = of(machine.look(settings_in(tmp_path), PRIVATE_FEDERATION), State.WRONG)
    assert "GB free, and a run needs up to 1,152,921,504.6 GB -> make room" in wrong


# All of it


def contents(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_the_whole_examination_of_a_client_that_is_ready_changes_nothing(tmp_path):
    certs = made(tmp_path / "certs")
    with serving(certs) as grid:
        policy = {**POLICY, "without_privacy": True}
        path = client_file(tmp_path / "ada", server=f"127.0.0.1:{grid.port}", certs=certs, policy=policy)
        before = contents(tmp_path)
        found = list(examine(path))
    assert is_ready(found), of(found, State.WRONG)
    assert contents(tmp_path) == before
    order = list(dict.fromkeys(f.what for f in found))
    expected = ["client file", "server", "TLS", "federation", "clock", "device", "state", "disk", "table", "policy"]
    assert order == [*expected, "ledger", "budget", "plan"]


def test_without_a_server_the_owners_copy_is_what_the_table_is_examined_by(tmp_path):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(document(**PRIVATE)))
    found = list(examine(client_file(tmp_path, federation="own.yaml")))
    assert [line.split(":")[0] for line in of(found, State.WRONG)] == ["server"]
    assert any(line.startswith("your copy: the rest is examined by it") for line in of(found, State.WARNING))
    assert any(f.what == "plan" for f in found)


def test_a_copy_that_is_not_the_servers_document_is_wrong(tmp_path):
    certs = made(tmp_path / "certs")
    (tmp_path / "ada").mkdir()
    (tmp_path / "ada" / "own.yaml").write_text(yaml.safe_dump(document(training__rounds=77)))
    with serving(certs) as grid:
        changes = {"federation": "own.yaml", "policy": {**POLICY, "without_privacy": True}}
        found = list(examine(client_file(tmp_path / "ada", server=f"127.0.0.1:{grid.port}", certs=certs, **changes)))
    (wrong,) = of(found, State.WRONG)
    assert wrong.startswith("your copy: ") and "is not the server's document" in wrong
    assert FEDERATION.fingerprint not in wrong


def test_with_neither_a_server_nor_a_copy_what_can_be_examined_is(tmp_path):
    found = list(examine(client_file(tmp_path)))
    assert any(line.startswith("table: not examined") for line in of(found, State.WARNING))
    assert [f.what for f in found][-2:] == ["ledger", "budget"]


def test_each_mistake_in_a_client_file_is_a_finding(tmp_path):
    path = client_file(tmp_path, server="nowhere", state=7)
    wrong = of(examine(path), State.WRONG)
    assert len(wrong) == 2 and all(line.endswith("docs/client-file.md has every key") for line in wrong)


def plan_in(folder: Path, document: Path) -> list[str]:
    """What of a client file, with its table, is wrong for a federation: policy, budget and plan."""
    settings = load_client_file(folder / "client.yaml").model_copy(update={"tls": None})
    asked = federations.load(document)
    _, dataset = drained(table.look(settings, asked))
    return of(account.look(settings, folder / "client.yaml", asked, dataset), State.WRONG)
