"""The trials of docs/toolbox.md are sweeps that run, and their figures are on the page."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulations import fairness, personal
from simulations.results import ROOT
from simulations.sources import Source
from simulations.sweeps.points import grid, parse
from simulations.sweeps.report import gained
from simulations.toolbox import PAGE, TABLES, TRIALS, placed, prepare


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_a_trial_is_of_the_document_as_it_is_and_of_others_and_is_on_the_page(trial):
    settings: set[int] = set()
    columns = 0
    tables = [table for table in TABLES if table.name in trial.tables]
    for table in tables:
        points = grid(ROOT / table.document, parse(trial.grid(table)))
        epsilons = len((trial.epsilons or table.epsilons).split(","))
        columns += epsilons
        assert len(points) % epsilons == 0
        settings.add(len(points) // epsilons)
    (count,) = settings
    assert count > 1
    section = PAGE.read_text().partition(f"<!-- figures: {trial.name} -->\n")[2].partition("<!-- end -->")[0]
    head, _line, first, *rest = section.strip().splitlines()
    assert head.startswith(f"| `{trial.vary.partition('=')[0]}` | {tables[0].name}, no privacy |")
    assert first.count(" % |") == columns and len(rest) == count - 1
    assert all(row.count(" % (") == columns for row in rest)


def test_a_gain_is_that_of_each_seed_over_the_same_seed():
    # Gains of 1, 2 and 3: their mean is 2, and its standard error 1 / sqrt(3).
    assert gained([71.0, 82.0, 93.0], [70.0, 80.0, 90.0], " %") == "82.0 % (+2.0 ± 0.6)"
    base = [70.0, 80.0]
    assert gained(base, base) == "75.0"


def test_figures_are_put_in_their_place_and_nowhere_else():
    page = "a\n<!-- figures: one -->\nold\n<!-- end -->\nb\n<!-- figures: two -->\nold\n<!-- end -->\n"
    assert placed(page, "two", "new") == page.replace("two -->\nold", "two -->\nnew")
    with pytest.raises(LookupError, match="has no place for the figures of three"):
        placed(page, "three", "new")


@pytest.mark.parametrize("name, rows", [("personal", 5), ("fairness", 10)])
def test_what_no_sweep_measures_is_on_the_page_too(name, rows):
    section = PAGE.read_text().partition(f"<!-- figures: {name} -->\n")[2].partition("<!-- end -->")[0]
    assert sum(" ± " in line for line in section.splitlines()) == rows - (2 if name == "fairness" else 0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toolbox")
    prepare(folder)
    return folder


def test_the_digits_are_cut_into_what_is_public_and_the_rest(prepared):
    whole, public, private = ((prepared / f"{n}.csv").read_text().splitlines() for n in ("digits", "public", "private"))
    assert public[0] == private[0] == whole[0] and len(public) == 301
    assert public[1:] + private[1:] == whole[1:]
    assert sorted(path.stem for path in (prepared / "others").iterdir()) == ["hungarian", "switzerland", "va"]


def test_owners_of_a_case_make_their_own_models(prepared, monkeypatch):
    monkeypatch.setattr("client.personal.STEPS", (0, 8))
    few = replace(personal.cases(prepared)[0], owners=1)
    few = replace(few, grid=(*few.grid, "training.rounds=2"))
    found = personal._accuracies((few, prepared, 0))
    assert list(found) == ["federation", "head", "personal", "alone"] and all(0 <= v <= 100 for v in found.values())


def test_how_far_clients_are_apart_is_by_their_own_rows(prepared):
    source = Source(data_dir=prepared / "simulations" / "heart")
    (point,) = grid(ROOT / "simulations/heart/federation.yaml", parse([*fairness.FIXED, "training.rounds=2"]))
    accuracy, worst, deviation = fairness.of_clients(point.federation, source)
    assert 0 <= worst <= accuracy <= 100 and deviation > 0
