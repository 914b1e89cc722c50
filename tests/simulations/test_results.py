"""The studies of docs/results.md are sweeps that run, and the page is of them; the digits are the right table."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from sklearn.datasets import load_digits

from common.document import federation as federations
from simulations import digits
from simulations.results import PAGE, ROOT, STUDIES, picture_of
from simulations.sources import Source
from simulations.sweeps.points import grid, parse


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_a_study_is_of_no_privacy_and_three_epsilons_and_is_on_the_page(study):
    points = grid(ROOT / study.document, parse(study.grid))
    units = [(p.federation.privacy.row, p.federation.privacy.client) for p in points]
    own = [row if "rows" in study.name else client for row, client in units]
    assert [unit.epsilon if unit else None for unit in own] == [None, None, 8, 8, 4, 4, 1, 1]
    assert all(row is None or client is None for row, client in units)
    page = PAGE.read_text()
    assert f"```console\n$ {study.shown}\n```\n" in page
    section = page.partition(f"## {study.title}\n")[2].partition("\n## ")[0]
    assert section.count("| 5 |") == 8  # no run of any point has failed
    assert f"({picture_of(study)})" in section and (PAGE.parent / picture_of(study)).exists()


def test_the_digits_are_a_table_that_a_hundred_clients_share(tmp_path):
    digits.write(tmp_path / "digits.csv")
    table, theirs = pl.read_csv(tmp_path / "digits.csv"), load_digits()
    assert table["digit"].to_list() == theirs.target.tolist()
    assert (table.drop("digit").to_numpy() == theirs.data).all()
    federation = federations.load(ROOT / "simulations" / "digits.yaml")
    source = Source(data=tmp_path / "digits.csv", clients=100, partition="dirichlet:0.5")
    sites = source.sites(federation, device=torch.device("cpu"))
    assert len(sites) == 100 and sum(site.dataset.rows + site.dataset.validation_rows for site in sites) == 1797
    assert torch.equal((sites.tables[0].x + 1) * 8, torch.from_numpy(theirs.data).float())
