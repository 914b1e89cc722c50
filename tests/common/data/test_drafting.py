"""A draft, pasted into a federation, loads and encodes the table that it was drafted from."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from common.data import drafting, tables
from common.data.encoding import Encoded, encode_table
from common.document import federation as federations
from common.document.federation import Federation
from common.errors import DataError
from tests.support import HEART, document


def pasted(path: Path, draft: str) -> Federation:
    """The small federation with its schema replaced by a draft, read from a file as a user's would be."""
    rest = document(schema=..., training__loss="mse" if "bounds" in draft.split("target:")[1] else "cross_entropy")
    place = path.with_suffix(".yaml")
    place.write_text(draft + "\n" + yaml.safe_dump(rest), encoding="utf-8")
    return federations.load(place)


def encoded(path: Path, **options: Any) -> Encoded:
    """The file, encoded by its own draft."""
    schema = pasted(path, drafting.draft(path, **options)).data_schema
    return encode_table(tables.read(path, schema), schema)


def rows(header: str, *lines: str) -> str:
    """Each line twice, so that its values may be shown."""
    return "\n".join([header, *lines, *lines, ""])


def draft_of(folder: Path, text: str, **options: Any) -> str:
    (folder / "t.csv").write_text(text, encoding="utf-8")
    draft = drafting.draft(folder / "t.csv", **options)
    assert encoded(folder / "t.csv", **options).report.rows > 0
    return draft


def test_the_draft_of_a_small_table(tmp_path):
    text = "age,sex,chol,code,y\n63,m,233,1,0\n37.5,f,?,0,1\n41,f,204,1,0\n41,m,204,0,1\n"
    assert draft_of(tmp_path, text).removeprefix(drafting.WARNING) == (
        "schema:\n"
        "  features:\n"
        "    - {name: age, type: numeric, bounds: [37, 63]}\n"
        "    - {name: sex, type: categorical, categories: [f, m]}\n"
        '    - {name: chol, type: numeric, bounds: [204, 233], missing: ["?"]}\n'
        "    - {name: code, type: categorical, categories: [0, 1]}\n"
        "  target: {name: y, classes: [0, 1]}\n"
        "  validation_fraction: 0.2\n"
    )


def test_the_warning_that_it_was_read_from_the_data_comes_first(tmp_path):
    assert draft_of(tmp_path, rows("a,y", "1,0", "2,1")).startswith("# A first draft, for a human to edit.\n")
    assert "READ FROM THE DATA: they are not private" in drafting.WARNING
    assert all(line.startswith("#") for line in drafting.WARNING.splitlines())


def test_the_target_is_the_last_column_that_is_not_left_out_or_the_one_named(tmp_path):
    text = "a,y,z,row,born\n" + "".join(f"{i % 3},{i % 2},{'xw'[i % 2]},{i},2001-02-0{1 + i}\n" for i in range(6))
    draft = draft_of(tmp_path, text)
    assert "target: {name: z, classes: [w, x]}" in draft
    assert "# left out: column row, which numbers the rows" in draft
    draft = draft_of(tmp_path, text, target="y")
    assert "target: {name: y, classes: [0, 1]}" in draft and "name: z, type: categorical" in draft


def test_a_target_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    (tmp_path / "t.csv").write_text("a,y\n1,0\n")
    with pytest.raises(DataError, match=r"^t.csv: no column num; there are a, y$"):
        drafting.draft(tmp_path / "t.csv", target="num")


@pytest.mark.parametrize("cells, why", [("0", "two different"), ("0\n0", "two different"), ("", "which has no values")])
def test_a_target_of_one_value_is_refused(tmp_path, cells, why):
    (tmp_path / "t.csv").write_text("a,y\n" + "".join(f"1,{cell}\n" for cell in cells.split("\n")))
    with pytest.raises(DataError, match=f"t.csv: column y.* cannot be the target.*|{why}"):
        drafting.draft(tmp_path / "t.csv", target="y")


def test_a_target_of_many_numbers_is_a_number(tmp_path):
    draft = draft_of(tmp_path, "a,y\n" + "".join(f"{i % 7},{i / 2}\n" for i in range(21)))
    assert "target: {name: y, bounds: [0, 10]}" in draft


def test_a_marker_is_no_class_and_rows_without_a_target_are_counted(tmp_path):
    text = rows("a,y", "1,0", "2,1") + "3,?\n4,?\n5,\n"
    (tmp_path / "t.csv").write_text(text)
    draft = drafting.draft(tmp_path / "t.csv")
    assert "  # rows without a target: 3; take them out of the table\n  target: {name: y, classes: [0, 1]}" in draft


@pytest.mark.parametrize("text", ["a,y\n", "a,y\n\n"])
def test_a_table_without_rows_is_refused(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=r"^t.csv: the table has no rows$"):
        drafting.draft(tmp_path / "t.csv")


@pytest.mark.parametrize(
    "cells, bounds",
    [
        ([1234567, 1234568.5, 1234569], "[1234567, 1234569]"),
        ([1e-9, 0.05, 0.1234567892], "[0, 0.13]"),
        ([17, 63.4, 90], "[17, 90]"),
        ([-12345, 0, 98765], "[-20000, 100000]"),
        ([3, 3, 3, 4], "[3, 4]"),
        ([5, 5], "[5, 6]"),
        ([1e300, -1e300, 0], "[-1e+300, 1e+300]"),
    ],
)
def test_bounds_are_rounded_outwards_so_that_no_row_is_clamped(tmp_path, cells, bounds):
    draft = draft_of(tmp_path, "a,b,y\n" + "".join(f"{i % 2},{cell},{i % 2}\n" for i, cell in enumerate(cells * 2)))
    assert f"bounds: {bounds}" in draft or "categories" in draft.split("name: b")[1]
    assert encoded(tmp_path / "t.csv").report.clamped == {}


@pytest.mark.parametrize("marker", ["?", "NaN", "nan", "inf", "", "n/a", "-", "odd", "NA", "None"])
def test_cells_that_are_no_number_in_a_column_of_numbers_are_missing(tmp_path, marker):
    draft = draft_of(tmp_path, f"a,y\n1,0\n2,1\n3,0\n{marker},1\n")
    assert encoded(tmp_path / "t.csv").report.missing == {"a": 1}
    assert marker not in ("inf", "odd") or (marker not in draft and "unfit: missing" in draft)  # it occurs once


def test_empty_cells_among_words_are_missing(tmp_path):
    text = "a,y\nyes,0\nno,1\nyes,0\nno,1\n,0\n"
    assert 'categories: [no, yes], missing: [""]' in draft_of(tmp_path, text)
    assert encoded(tmp_path / "t.csv").report.missing == {"a": 1}


def test_values_that_mean_the_same_are_written_once(tmp_path):
    assert "categories: [1, 2]" in draft_of(tmp_path, "a,y\n1,0\n1.0,1\n1e0,1\n2,1\n2.0,0\n")


@pytest.mark.parametrize("words", ["True False", "true false", "TRUE FALSE"])
def test_truth_values_are_true_and_false(tmp_path, words):
    true, false = words.split()
    draft = draft_of(tmp_path, rows("a,y", f"{true},{true}", f"{false},{false}"))
    assert "categories: [false, true]" in draft and "classes: [false, true]" in draft
    report = encoded(tmp_path / "t.csv").report
    assert report.other == {} and report.classes == {"false": 2, "true": 2}


def test_numbers_with_decimal_commas_and_groups_are_numbers(tmp_path):
    draft = draft_of(tmp_path, "a;b;y\n" + "".join(f"{i},5;1.00{i},5;{i % 2}\n" for i in range(8)))
    assert "{name: a, type: numeric, bounds: [0.5, 7.5]}" in draft
    assert "{name: b, type: numeric, bounds: [1000.5, 1007.5]}" in draft
    draft = draft_of(tmp_path, "a,b,y\n" + "".join(f'x,"1,00{i}",{i % 2}\n' for i in range(0, 8, 3)) + 'x,"1,000",1\n')
    assert "{name: b, type: numeric, bounds: [1000, 1006]}" in draft


def test_codes_with_leading_zeros_are_text(tmp_path):
    assert 'categories: ["01", "02"]' in draft_of(tmp_path, rows("a,y", "01,0", "02,1"))


@pytest.mark.parametrize(
    "date", ["2026-11-{:02}", "{:02}.11.2026", "{}/11/26", "2026-11-{:02} 10:00:00", "2026-11-{:02}T10:00Z", "10:{:02}"]
)
def test_dates_and_times_are_left_out(tmp_path, date):
    draft = draft_of(
        tmp_path, "a,when,y\n" + "".join(f"{i % 3},{date.format(1 + i // 2)},{i % 2}\n" for i in range(20))
    )
    assert "# left out: column when, which holds dates or times; make a number of them" in draft


def test_dates_of_a_typed_table_are_left_out(tmp_path):
    days = pl.date_range(pl.date(2026, 1, 1), pl.date(2026, 1, 8), eager=True)
    pl.DataFrame({"a": [1, 1, 2, 2] * 2, "when": days, "y": [0, 1] * 4}).write_parquet(tmp_path / "t.parquet")
    assert "# left out: column when, which holds dates or times" in drafting.draft(tmp_path / "t.parquet")


def test_identifiers_and_free_text_are_left_out_and_never_shown(tmp_path):
    lines = [f"{i % 3},K-{4711 + i},note {i} on a person,C{i % 60:03},{i % 2}\n" for i in range(180)]
    draft = draft_of(tmp_path, "a,customer,note,site,y\n" + "".join(lines))
    assert "# left out: column customer, which has 180 different texts: an identifier, or free text" in draft
    assert "# left out: column note, which has 180 different texts" in draft
    assert "# left out: column site, which has 60 different texts" in draft
    assert not any(shown in draft for shown in ("K-", "on a person", "C0"))


def test_a_number_that_differs_in_each_row_is_pointed_out(tmp_path):
    lines = [f"{i % 3},{70_000 + 37 * i},{i % 2}\n" for i in range(30)]
    draft = draft_of(tmp_path, "a,number,y\n" + "".join(lines))
    assert "# each row has another: leave the column out if it names a row or a person" in draft


def test_a_value_that_occurs_once_is_not_shown(tmp_path):
    draft = draft_of(tmp_path, rows("job,y", "nurse,0", "clerk,1") + "astronaut,0\n")
    assert "categories: [clerk, nurse]}  # and 1 more, of one row each, which will be counted as other" in draft
    assert "astronaut" not in draft
    assert encoded(tmp_path / "t.csv").report.other == {"job": 1}


def test_a_class_that_occurs_once_is_not_shown(tmp_path):
    (tmp_path / "t.csv").write_text(rows("a,y", "1,well", "2,ill") + "2,leprosy\n")
    draft = drafting.draft(tmp_path / "t.csv")
    assert "classes: [ill, well]" in draft and "leprosy" not in draft


def test_columns_without_a_name_or_values_or_with_a_name_that_stands_twice_are_left_out_and_said(tmp_path):
    draft = draft_of(tmp_path, ",a,note,b,b,y,\n" + "0,1,,2,2,0,\n1,2,,3,3,1,\n" * 2)
    assert draft.count('# left out: column "", which has no name') == 1
    assert '# left out: column " (2)", which has no name' in draft
    assert "# left out: column note, which has no values" in draft
    assert "# left out: column b, whose name stands twice" in draft


def test_a_table_with_no_column_for_a_feature_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text(",dat\n" + "".join(f"{i},{i / 2}\n" for i in range(16)))
    with pytest.raises(
        DataError, match=r'^t.csv: no column is left for a feature, beside the target dat: "", which has'
    ):
        drafting.draft(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("who\n" + "".join(f"p{i}\n" for i in range(60)))
    with pytest.raises(DataError, match=r"^t.csv: no column is left for a target: who, which has 60 different texts"):
        drafting.draft(tmp_path / "t.csv")


def test_columns_of_lists_and_durations_are_left_out(tmp_path):
    frame = pl.DataFrame({"a": [1, 2] * 2, "l": [[1], [2]] * 2, "d": [timedelta(1)] * 4, "y": [0, 1] * 2})
    frame.write_parquet(tmp_path / "t.parquet")
    draft = drafting.draft(tmp_path / "t.parquet")
    assert "# left out: column l, which holds List(Int64)" in draft
    assert "# left out: column d, which holds Duration" in draft
    assert encoded(tmp_path / "t.parquet").x.shape == (4, 3)


def test_booleans_of_parquet_are_encoded_as_drafted(tmp_path):
    frame = pl.DataFrame({"a": [True, False, None] * 2, "y": [True, False, True] * 2})
    frame.write_parquet(tmp_path / "t.parquet")
    drawn = encoded(tmp_path / "t.parquet")
    assert drawn.x[:3].tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]] and drawn.y[:3].tolist() == [1, 0, 1]


def test_the_hearts_drafted_bounds_hold_every_row(tmp_path):
    names = federations.load(HEART / "federation.yaml").data_schema.columns
    assert names is not None
    path = tmp_path / "va.csv"
    path.write_text(",".join(names) + "\n" + (HEART / "va.data").read_text())
    report = encoded(path, target="num").report
    assert report.rows == 200 and report.clamped == {} and report.other == {}


CELL = st.sampled_from(
    ["", "1", "-2.50", "1e5", "007", "nan", "Inf", "yes", "true", "null", "~", "?", "a b"]
) | st.text(st.sampled_from("ab1-.:#{}[],&*!|>%@'\"\\\n é☃e+_"), min_size=1, max_size=5).map(str.strip)
NAME = st.text(st.sampled_from("ab1:#{-?'\" \n"), min_size=1, max_size=5).map(str.strip).filter(bool)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drafts")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@given(
    name=NAME.filter(lambda name: name != "y"),
    cells=st.lists(CELL, min_size=2, max_size=10).filter(any),
)
def test_any_table_is_encoded_by_its_own_draft(folder, suffix, name, cells):
    path = folder / f"t.{suffix}"
    cells = cells * 2  # so that each may be shown
    frame = pl.DataFrame(
        {name: cells, "z": [i % 3 for i in range(len(cells))], "y": [str(i % 2) for i in range(len(cells))]}
    )
    frame.write_parquet(path) if suffix == "parquet" else frame.write_csv(path, quote_style="always")
    report = encoded(path, target="y").report
    assert report.clamped == {} and report.other == {}


@given(cells=st.lists(CELL, min_size=2, max_size=10, unique=True).filter(any))
def test_no_text_that_occurs_once_is_in_a_draft(folder, cells):
    frame = pl.DataFrame({"who": [f"<{cell}>" for cell in cells], "z": 1, "y": [i % 2 for i in range(len(cells))]})
    frame = pl.concat([frame, pl.DataFrame({"who": ["<<>>"] * 40, "z": 1, "y": [0, 1] * 20}, schema=frame.schema)])
    frame.write_parquet(folder / "t.parquet")
    draft = drafting.draft(folder / "t.parquet").removeprefix(drafting.WARNING)
    assert "<" not in draft.replace("<<>>", "")


def test_a_draft_is_text_that_our_documents_read_as_meant(tmp_path):
    (tmp_path / "t.csv").write_text('no,"1",y\n' + "yes,on,0\nno,~,1\n" * 2)
    schema = pasted(tmp_path / "t.csv", drafting.draft(tmp_path / "t.csv")).data_schema
    assert [feature.name for feature in schema.features] == ["no", "1"]
    assert schema.features[0].categories == ("no", "yes") and schema.features[1].categories == ("on", "~")
