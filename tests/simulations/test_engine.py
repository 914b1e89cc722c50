from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from client.site import Site
from common.document.federation import Federation
from common.errors import ConfigError, DataError, RunFailed
from common.privacy.plan import plan_for
from server.folder.folder import RunFolder, load_model
from server.rounds.events import RoundEnded
from simulations.engine import simulate
from simulations.sites import Sites
from simulations.sources import sites_from_files, sites_from_table
from tests.support import PRIVATE, federation, table

CPU = torch.device("cpu")
NUMBER = {
    "schema": {
        "features": [{"name": "a", "type": "numeric", "bounds": [-1, 1]}],
        "target": {"name": "y", "bounds": [0, 10]},
        "validation_fraction": 0.25,
    },
    "training__loss": "mse",
}


@pytest.fixture
def source(tmp_path) -> Path:
    table(300).write_csv(tmp_path / "table.csv")
    return tmp_path / "table.csv"


def dealt(
    source: Path | int, *, clients: int | None = 4, how: str = "iid", seed: int = 0, document: Federation | None = None
) -> Sites:
    return sites_from_table(document or federation(), source, clients=clients, how=how, seed=seed, device=CPU)


def rows(site: Site) -> int:
    return len(site.dataset.y) + len(site.dataset.validation_y)


def labels(site: Site) -> torch.Tensor:
    return torch.cat([site.dataset.y, site.dataset.validation_y])


def cells(site: Site) -> list[tuple[float, ...]]:
    """All its rows, sorted."""
    data = site.dataset
    x, y = torch.cat([data.x, data.validation_x]), labels(site)
    return sorted(map(tuple, torch.column_stack([x, y]).tolist()))


@pytest.mark.parametrize(
    "how, clients",
    [
        ("iid", 4),
        ("dirichlet:0.5", 4),
        ("shards:2", 4),
        ("shards:2", 11),
        ("quantity:1.5", 4),
        ("shift:a", 4),
        ("by:c", None),
        ("by:c", 2),
    ],
)
def test_every_row_of_the_table_is_at_one_site(source, how, clients):
    sites = dealt(source, how=how, clients=clients)
    (whole,) = dealt(source, clients=1, document=federation(strategy__min_clients=1))
    assert sorted(row for site in sites for row in cells(site)) == cells(whole)
    assert len(sites) == (clients or 2)


@pytest.mark.parametrize("how", ["iid", "dirichlet:0.5", "shards:2", "quantity:1", "draw:20"])
def test_the_same_seed_makes_the_same_sites_and_another_others(source, how):
    first, again, other = (list(map(cells, dealt(source, how=how, seed=seed))) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_iid_gives_every_client_its_share_and_shards_few_labels(source):
    assert [rows(site) for site in dealt(source, how="iid")] == [75] * 4
    assert [rows(site) for site in dealt(source, how="shards:1")] == [75] * 4
    mixed = [site for site in dealt(source, how="shards:1") if len(labels(site).unique()) > 1]
    assert len(mixed) <= 1  # only the shard that has the border between the two labels in it


def test_a_small_alpha_gives_clients_few_labels(source):
    shares = [labels(site).double().mean().item() for site in dealt(source, how="dirichlet:0.05", seed=3)]
    assert max(shares) > 0.9
    assert min(shares) < 0.2


def test_a_column_makes_one_client_a_value_by_its_name(source):
    frame = pl.read_csv(source)
    sites = dealt(source, how="by:c", clients=None)
    assert [site.name for site in sites] == ["green", "red"]
    assert [rows(site) for site in sites] == [frame["c"].eq(v).sum() for v in ("green", "red")]


def test_clients_are_numbered_so_that_names_sort_as_numbers(source):
    names = [site.name for site in dealt(source, clients=11)]
    assert names == sorted(names)
    assert (names[0], names[-1]) == ("client-00", "client-10")


def test_a_numeric_target_is_dealt_by_its_deciles(tmp_path):
    y = np.arange(200) / 20  # 0 to 9.95, 20 rows in each tenth of the bounds
    pl.DataFrame({"a": np.linspace(-1, 1, 200), "y": y}).sample(fraction=1, shuffle=True, seed=0).write_csv(
        tmp_path / "t.csv"
    )
    sites = dealt(tmp_path / "t.csv", clients=10, how="shards:1", document=federation(**NUMBER))
    spans = [(labels(site).max() - labels(site).min()).item() for site in sites]
    assert max(spans) < 0.1  # of a scaled target in [0, 1]


def test_a_table_can_be_generated():
    sites = dealt(100, clients=3)
    assert sum(map(rows, sites)) == 100


def test_one_site_a_file(tmp_path):
    for number, name in enumerate(("paris", "berlin")):
        table(50 + number, seed=number).write_csv(tmp_path / f"{name}.csv")
    table(60, seed=2).write_parquet(tmp_path / "lyon.parquet")
    (tmp_path / "README.md").write_text("not a table")
    sites = sites_from_files(federation(), tmp_path, seed=0, device=CPU)
    assert {site.name: rows(site) for site in sites} == {"berlin": 51, "lyon": 60, "paris": 50}


def test_two_files_of_one_name_are_refused_and_neither_is_dropped(tmp_path):
    table(50).write_csv(tmp_path / "lyon.csv")
    table(60).write_parquet(tmp_path / "lyon.parquet")
    with pytest.raises(DataError, match=r"lyon\.parquet: another table in this folder is called lyon too"):
        sites_from_files(federation(), tmp_path, seed=0, device=CPU)


def test_a_folder_without_tables_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no tables"):
        sites_from_files(federation(), tmp_path, seed=0, device=CPU)


@pytest.mark.parametrize(
    "how, clients, message",
    [
        (
            "random",
            4,
            "--partition random: not known; it is iid, dirichlet:ALPHA, shards:PER_CLIENT, quantity",
        ),
        ("", 4, "--partition : not known"),
        ("iid:2", 4, "--partition iid:2: not known"),
        ("dirichlet", 4, "--partition dirichlet: not known"),
        ("dirichlet:much", 4, "--partition dirichlet:much: not known"),
        ("dirichlet:0", 4, "dirichlet: alpha must be finite and greater than 0, got 0"),
        ("dirichlet:nan", 4, "dirichlet: alpha must be finite and greater than 0, got nan"),
        ("shards:", 4, "--partition shards:: not known"),
        ("shards:1.5", 4, "--partition shards:1.5: not known"),
        ("shards:²", 4, "--partition shards:²: not known"),
        ("shards:0", 4, "shards: at least 1 a client is needed, got 0"),
        ("shards:99", 4, "300 rows cannot be dealt to 396 shards"),
        ("iid", None, "--clients is needed with --partition iid"),
        ("iid", 0, "at least 1 of clients is needed, got 0"),
        ("iid", 301, "300 rows cannot be dealt to 301 clients"),
        ("by:town", None, "--partition by:town: no such column; there are a, b, c, y"),
        ("by:", None, "--partition by:: no such column"),
        ("by:c", 3, "--partition by:c makes 2 clients, one a value; leave --clients out"),
    ],
)
def test_a_wrong_partition_is_explained(source, how, clients, message):
    with pytest.raises(DataError, match=f"^{re.escape(message)}"):
        dealt(source, how=how, clients=clients)


@pytest.mark.parametrize("number", [0, -5])
def test_no_rows_cannot_be_generated(number):
    with pytest.raises(DataError, match=f"at least 1 row must be generated, got {number}"):
        dealt(number)


def test_cells_that_mean_the_same_are_one_client(tmp_path):
    sites = ["A", "A ", " A", '"A"', "B", "b", "1", "1.0", "true", "True"] * 3
    text = table(30).with_columns(site=pl.Series(sites)).write_csv(quote_style="never")
    (tmp_path / "t.csv").write_text(text)
    dealt_ = dealt(tmp_path / "t.csv", clients=None, how="by:site")
    assert {site.name: rows(site) for site in dealt_} == {"1": 6, "A": 12, "B": 3, "b": 3, "true": 6}


def test_a_client_with_nothing_to_train_on_is_left_out_and_named(tmp_path):
    for name, rows_ in (("big", 60), ("small", 40), ("tiny", 1)):
        table(rows_).write_csv(tmp_path / f"{name}.csv")
    document = federation(schema__validation_fraction=0.9)
    sites = sites_from_files(document, tmp_path, seed=0, device=CPU)
    told: list[tuple[str, str]] = []
    sites.on_refusal = lambda name, reason: told.append((name, reason))
    result = run(document, sites, tmp_path / "run")
    assert result["status"] == "completed" and result["clients"] == ["big", "small"]
    reason = "all 1 rows fell into the validation part; the table is too small to train on"
    assert told == [("tiny", reason)] and sites.refused == {"tiny": reason}


def test_files_whose_names_begin_with_a_dot_are_no_tables(tmp_path):
    for name in ("a", "b"):
        table(20).write_csv(tmp_path / f"{name}.csv")
        (tmp_path / f"._{name}.csv").write_bytes(b"\0\5\x16\7 of another system")
    assert [site.name for site in sites_from_files(federation(), tmp_path, seed=0, device=CPU)] == ["a", "b"]


def test_clients_with_fewer_rows_than_a_batch_train_on_what_there_is(tmp_path):
    document = federation(training__batch_size=64)
    sites = dealt(200, clients=40, document=document)
    assert run(document, sites, tmp_path / "run")["status"] == "completed" and not sites.refused
    rows_ = len(sites[0].dataset.y)
    assert "fewer rows than training.batch_size 64: each step takes all of them" in sites[0].describe()
    one = dealt(200, clients=2, document=document)[0]
    assert rows_ < 64 < len(one.dataset.y) and not any("fewer rows" in line for line in one.describe())


def test_fewer_clients_than_the_federation_needs_are_refused_before_the_run(source):
    with pytest.raises(ConfigError, match=r"strategy\.min_clients is 5, but there are only 4 clients"):
        dealt(source, document=federation(strategy__min_clients=5))


def run(document: Federation, sites: Sites, where: Path, **more: Any) -> dict[str, Any]:
    return simulate(document, sites, RunFolder.create(document, path=where), run="test", **more)


def test_a_simulation_runs_the_sites_and_tells_its_events(source, tmp_path):
    seen: list[dict[str, Any]] = []
    result = run(federation(), dealt(source, how="by:c", clients=None), tmp_path / "run", observe=seen.append)
    assert (result["status"], result["clients"]) == ("completed", ["green", "red"])
    assert [event.KIND for event in seen] == ["start", "round", "round", "round", "end"]


def test_a_simulation_of_a_numeric_target_runs(tmp_path):
    result = run(federation(**NUMBER), dealt(200, document=federation(**NUMBER)), tmp_path / "run")
    assert set(result["evaluation"]) == {"mae", "mse", "rmse", "scaled", "rows", "per_client"}


@pytest.mark.timeout(30)
def test_a_simulation_whose_clients_all_refuse_ends_instead_of_waiting_for_others(tmp_path):
    document = federation(schema__validation_fraction=0.9999)
    with pytest.raises(
        RunFailed, match="0 of the 2 clients that a round needs are there; client-0: refused, client-1: refused"
    ):
        run(document, dealt(40, document=document), tmp_path / "run")
    assert load_model(tmp_path / "run")


def test_private_clients_with_fewer_rows_than_a_batch_take_part(tmp_path):
    document = federation(**PRIVATE, training__batch_size=32)
    assert run(document, dealt(40, document=document), tmp_path / "run")["status"] == "completed"


@pytest.mark.parametrize("changes", [{}, {"privacy__row": {"epsilon": 0.5, "delta": 0.01, "clip": 1.0}}])
def test_a_simulated_client_plans_the_noise_of_a_real_one_whose_account_has_room(source, changes):
    document = federation(**{**PRIVATE, "privacy__evaluation__noise": 20.0, **changes})
    site, *_ = dealt(source, document=document)
    budget = site.account.budget("run")
    assert budget is not None and document.privacy.row is not None
    assert budget.plan == plan_for(document, rows=budget.plan.rows, epsilon=document.privacy.row.epsilon)


def test_simulated_noise_can_be_repeated_and_differs_between_clients(source):
    first, again = ([site.account.noise.normal(4).tolist() for site in dealt(source, seed=3)] for _ in range(2))
    assert first == again
    assert len({tuple(noise) for noise in first}) == len(first)


@pytest.mark.parametrize("how", [{}, NUMBER])
def test_a_run_without_validation_rows_has_no_score(tmp_path, how):
    pl.DataFrame({"a": [0.5] * 12, "b": [0] * 12, "c": ["red"] * 12, "y": [1] * 12}).write_csv(tmp_path / "table.csv")
    document = federation(**how, schema__validation_fraction=0.0001, strategy__min_clients=1)
    sites = dealt(tmp_path / "table.csv", clients=1, document=document)
    folder = RunFolder.create(document, path=tmp_path / "run")
    told = []
    result = simulate(document, sites, folder, run="empty", observe=told.append)
    assert result["evaluation"] == {}
    assert [event.evaluation for event in told if isinstance(event, RoundEnded)] == [{}] * result["rounds"]
