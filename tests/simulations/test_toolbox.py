"""The trials of docs/toolbox.md are sweeps that run, and their figures are on the page."""

from __future__ import annotations

import pytest

from simulations.results import ROOT
from simulations.sweeps.points import grid, parse
from simulations.toolbox import PAGE, TABLES, TRIALS, cell, placed


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
    assert cell({0: 71.0, 1: 82.0, 2: 93.0}, {0: 70.0, 1: 80.0, 2: 90.0}) == "82.0 % (+2.0 ± 0.6)"
    base = {0: 70.0, 1: 80.0}
    assert cell(base, base) == "75.0 %"


def test_figures_are_put_in_their_place_and_nowhere_else():
    page = "a\n<!-- figures: one -->\nold\n<!-- end -->\nb\n<!-- figures: two -->\nold\n<!-- end -->\n"
    assert placed(page, "two", "new") == page.replace("two -->\nold", "two -->\nnew")
    with pytest.raises(LookupError, match="has no place for the figures of three"):
        placed(page, "three", "new")
