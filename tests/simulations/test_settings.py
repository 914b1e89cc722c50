"""The section "Settings that work": what it compares, and that it and the rest of the page leave each other alone."""

from __future__ import annotations

import re

import pytest

from common.document import federation as federations
from common.document.documents import validate
from common.document.federation import Federation
from common.privacy.suggestion import FOUND_ON, HELD_BACK, suggest
from simulations import settings
from simulations.results import PAGE, SETTINGS, settings_of, without_settings
from simulations.settings import EPSILONS, Row, Table, cases, measured, section, tables
from simulations.small import document
from simulations.sources import Source

OWN = "# Results\n\nwords\n"


def small(**changes: object) -> Table:
    schema = document()["schema"]
    source = Source(generate=120, clients=3)
    return Table(**{"name": "iris", "schema": schema, "clients": 3, "rows": 120, "source": source, **changes})


def test_every_table_is_one_that_the_rules_were_found_on_or_that_was_held_back(tmp_path):
    found = [*tables(tmp_path)]
    assert {table.name for table in found} == {*FOUND_ON, *HELD_BACK}
    assert not {*FOUND_ON} & {*HELD_BACK}
    for table in found:
        for epsilon in EPSILONS[:2] if table.unit == "row" else EPSILONS[1:2]:
            fed = validate(table.document(epsilon), Federation)
            assert (fed.privacy.row is not None) == (epsilon is not None and table.unit == "row")
            assert fed.training.learning_rate == 0.1 and fed.training.batch_size == 32 and fed.training.rounds == 50


def test_the_page_has_a_row_for_every_case_and_says_where_the_suggestion_is_worse(tmp_path):
    text = settings_of(PAGE.read_text())
    rows = [line.split(" | ") for line in text.splitlines() if re.match(r"\| .*, \d+ clients of \d", line)]
    assert len(rows) == len([*cases(tmp_path)])
    worse = [row for row in rows if float(row[2]) < float(row[3]) - 3.0]
    said = (
        " ".join(text.split()).partition("It is worse than that for")[2].partition("It is worse than the newcomer")[0]
    )
    assert len(re.findall(r"\([^()]*: -\d", said)) == len(worse)
    assert all(f"{name} (held back)" in text for name in HELD_BACK)
    assert "does not know is your rows" in text


def test_each_program_leaves_the_other_s_part_of_the_page_alone(tmp_path, monkeypatch):
    page = tmp_path / "results.md"
    page.write_text(OWN)
    monkeypatch.setattr(settings, "PAGE", page)
    monkeypatch.setattr(settings, "cases", lambda folder: iter([]))
    settings.main()
    once = page.read_text()
    settings.main()
    assert page.read_text() == once and once.startswith(f"{OWN}\n{SETTINGS}\n## Settings that work\n")
    assert without_settings(once) == OWN and OWN + settings_of(once) == once
    assert settings_of(OWN) == "" and without_settings(OWN) == OWN


def test_a_case_is_measured_with_the_suggestion_the_grid_and_the_newcomer(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "SEEDS", 1)
    tried: list[Federation] = []

    def score(fed: Federation, table: Table) -> float:
        tried.append(fed)
        return float(len(tried))

    monkeypatch.setattr(settings, "score", score)
    table = small()
    row = measured(table, 4.0, tmp_path)
    newcomer = federations.load(tmp_path / "federation.yaml")
    assert tried[-1] == newcomer and newcomer.training.rounds == 50
    wanted = suggest(newcomer, rows=40, clients=3).changes
    assert tried[0] == federations.load(tmp_path / "federation.yaml", changes=wanted)
    assert row.suggested == 1.0 and row.best == len(tried) - 1 and row.newcomer == len(tried)


@pytest.mark.parametrize("numeric", [False, True])
def test_a_score_is_accuracy_or_explained_variance(numeric, monkeypatch):
    monkeypatch.setattr(settings, "SEEDS", 1)
    schema = document()["schema"]
    if numeric:
        schema["target"] = {"name": "y", "bounds": [0, 8]}
    value = small(schema=schema).document(None)
    value["training"] |= {"learning_rate": 0.3, "local_steps": 5}
    good = settings.score(validate(value, Federation), small(schema=schema))
    value["training"] |= {"learning_rate": 1e-9}
    nothing = settings.score(validate(value, Federation), small(schema=schema))
    assert nothing < 70 < good <= 100 if not numeric else nothing < 5 < 40 < good < 100


def test_what_is_worse_is_named_with_how_much():
    row = Row(table=small(), epsilon=1.0, suggested=70.0, best=80.0, newcomer=71.5)
    text = " ".join(" ".join(section([row])).split())
    assert "In 0 of 1 rows the suggestion is within 3 points" in text
    assert "worse than that for iris (row, 1: -10.0)" in text
    assert "worse than the newcomer's for iris (row, 1: -1.5)" in text
    assert "| iris (held back), 3 clients of 40 | row, 1 | 70.0 | 80.0 | 71.5 |" in text
