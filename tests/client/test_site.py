from __future__ import annotations

import os
from pathlib import Path

import polars as pl
import pytest

from client.account.policy import Policy
from client.settings import ClientFile, DataFile, TLSFiles, load_client_file
from client.site import Site, open_site, split_key
from common.certificates import authority
from common.document.federation import Federation
from common.errors import ConfigError, DataError, Refusal
from tests.support import PRIVATE, federation, table


def test_a_split_key_is_made_once_and_readable_by_its_owner_alone(tmp_path):
    key = split_key(tmp_path / "state")
    assert len(key) == 32
    assert split_key(tmp_path / "state") == key
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["split.key"]
    assert (tmp_path / "state" / "split.key").stat().st_mode & 0o077 == 0
    assert split_key(tmp_path / "other") != key


def test_two_clients_that_first_start_in_one_folder_at_once_share_a_key(tmp_path, monkeypatch):
    link = os.link

    def late(fresh: Path, path: Path) -> None:
        path.write_bytes(b"k" * 32)  # the other one was first
        link(fresh, path)

    monkeypatch.setattr(os, "link", late)
    assert split_key(tmp_path) == b"k" * 32
    assert [p.name for p in tmp_path.iterdir()] == ["split.key"]


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_damaged_key_is_refused_and_not_replaced(tmp_path, size):
    (tmp_path / "split.key").write_bytes(b"k" * size)
    with pytest.raises(DataError, match="not a split key of 32 bytes; restore it"):
        split_key(tmp_path)
    assert (tmp_path / "split.key").stat().st_size == size


CLIENT = """
server: localhost:4433
tls: null
name: ada
data: {{path: ada.csv, name: ada}}
state: state
{arithmetic}
policy: {{epsilon: 4.0, delta: 1.0e-3{policy}}}
"""


@pytest.mark.parametrize(
    "arithmetic, policy, found",
    [("", "", "exact"), ("arithmetic: exact", "", "exact"), ("arithmetic: opacus", ", arithmetic: any", "opacus")],
)
def test_arithmetic_is_exact_unless_the_owner_says_otherwise_twice(tmp_path, arithmetic, policy, found):
    (tmp_path / "ada.yaml").write_text(CLIENT.format(arithmetic=arithmetic, policy=policy))
    assert load_client_file(tmp_path / "ada.yaml").arithmetic == found


def test_floating_point_that_the_policy_does_not_allow_is_a_mistake_of_the_client_file(tmp_path):
    (tmp_path / "ada.yaml").write_text(CLIENT.format(arithmetic="arithmetic: opacus", policy=""))
    with pytest.raises(ConfigError, match=r"ada\.yaml:7: arithmetic opacus is floating point, which can tell more"):
        load_client_file(tmp_path / "ada.yaml")


def test_charges_name_the_authority_by_its_key_and_another_ones_do_not_count(tmp_path):
    table().write_csv(tmp_path / "ada.csv")
    charged = []
    for whose in ("one", "two", "one"):
        certs = tmp_path / whose
        if not certs.exists():
            authority.create_authority(certs)
            authority.create_client(certs, "ada")
        files = TLSFiles(ca=f"{certs}/ca.pem", certificate=f"{certs}/ada.pem", key=f"{certs}/ada.key")
        settings = ClientFile(
            server="localhost:1",
            tls=files,
            data=DataFile(path=str(tmp_path / "ada.csv"), name="ada"),
            device="cpu",
            state=str(tmp_path / "state"),
            policy=Policy(epsilon=8.0, delta=1e-3, without_privacy=True, max_rounds=2),
        )
        site = open_site(settings, federation(training__rounds=2), name="ada")
        site.account.charge_update(f"run-{len(charged)}", "task")
        charged.append((site.account.books.ledger.entries()[-1].authority, site.account.books.ledger.rounds()))
        if len(charged) == 3:
            with pytest.raises(Refusal, match=r"^policy\.max_rounds: asked 3, allowed 2$"):
                site.account.charge_update("another run", "task")
        site.account.close()
    keys = [key for key, _ in charged]
    assert keys[0] == keys[2] != keys[1] and all(len(key) == 64 for key in keys)
    assert [rounds for _, rounds in charged] == [1, 1, 2]


def opened(folder: Path, frame: pl.DataFrame, fed: Federation) -> Site:
    """A client of plain text, with this table."""
    frame.write_csv(folder / "ada.csv")
    settings = ClientFile(
        server="localhost:1",
        tls=None,
        name="ada",
        data=DataFile(path=str(folder / "ada.csv"), name="ada"),
        device="cpu",
        state=str(folder / "state"),
        policy=Policy(epsilon=8.0, delta=1e-3, without_privacy=True),
    )
    return open_site(settings, fed, name="ada")


def test_a_table_with_no_row_to_train_on_is_refused_and_its_size_is_not_told(tmp_path):
    site = opened(tmp_path, table(3), federation(schema__validation_fraction=0.9999))
    with pytest.raises(Refusal, match=r"^all 3 rows fell into the validation part; the table is too small") as refusal:
        site.account.budget("run")
    assert refusal.value.public == "it has no rows to train on"
    site.account.close()


def test_a_private_table_with_no_row_to_train_on_is_planned_like_any_other(tmp_path):
    site = opened(tmp_path, table(3), federation(**PRIVATE, schema__validation_fraction=0.9999))
    assert len(site.dataset.y) == 0 and site.account.budget("run") is not None
    site.account.close()


def test_the_share_that_is_validated_on_is_told_to_the_owner(tmp_path):
    site = opened(tmp_path, table(200), federation())
    rows = len(site.dataset.validation_y)
    assert f"200 rows: {200 - rows} to train on, {rows} to validate on ({rows / 2:.1f}% for 25.0%)" in site.describe()
    site.account.close()


def open_with_id(folder: Path, column: str, fed: Federation) -> int:
    """Opens the site, and returns how many refusals its ledger has then."""
    settings = ClientFile(
        server="localhost:1",
        tls=None,
        name="ada",
        data=DataFile(path=str(folder / "ada.csv"), name="ada", id=column),
        device="cpu",
        state=str(folder / "state"),
        policy=Policy(epsilon=8.0, delta=1e-3, without_privacy=True),
    )
    site = open_site(settings, fed, name="ada")
    refusals = sum(e.mechanism == "refusal" for e in site.account.books.ledger.entries())
    site.account.close()
    return refusals


def test_a_wrong_data_id_is_the_owners_mistake_and_no_refusal_of_a_document(tmp_path):
    table().with_columns(patient=pl.int_range(200)).write_csv(tmp_path / "ada.csv")
    for _ in range(4):  # one more than policy.refusals
        with pytest.raises(
            ConfigError, match=r"^data\.id: ada\.csv has no column patiant; it has a, b, c, y, patient$"
        ):
            open_with_id(tmp_path, "patiant", federation(**PRIVATE))
    assert open_with_id(tmp_path, "patient", federation(**PRIVATE)) == 0


def test_a_document_that_names_the_columns_of_a_file_without_a_header_may_not_fit_its_data_id(tmp_path):
    table().with_columns(patient=pl.int_range(200)).write_csv(tmp_path / "ada.csv", include_header=False)
    names = ["a", "b", "c", "y"]
    with pytest.raises(DataError, match=r"the table lacks the column patient, which data\.id names"):
        open_with_id(tmp_path, "patient", federation(**PRIVATE, schema__columns=[*names, "other"]))
    assert open_with_id(tmp_path, "patient", federation(**PRIVATE, schema__columns=[*names, "patient"])) == 1
