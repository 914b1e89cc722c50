"""A draft, pasted into a federation, loads and encodes the table that it was drafted from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from common import drafting, tables
from common import federation as federations
from common.encoding import Encoded, encode
from common.errors import DataError
from common.federation import Federation
from tests.support import HEART, document


def pasted(path: Path, draft: str) -> Federation:
    """The small federation with its schema replaced by a draft, read from a file as a user's would be."""
    rest = document(schema=..., training__loss="mse" if "target: {name: y, bounds" in draft else "cross_entropy")
    place = path.with_suffix(".yaml")
    place.write_text(draft + "\n" + yaml.safe_dump(rest), encoding="utf-8")
    return federations.load(place)


def encoded(path: Path, **options: Any) -> Encoded:
    """The file, encoded by its own draft."""
    schema = pasted(path, drafting.draft(path, **options)).data_schema
    table = tables.read(path, schema)
    return encode(table.frame, schema, first_line=table.first_line, source=table.source)


def draft_of(folder: Path, text: str, **options: Any) -> str:
    (folder / "t.csv").write_text(text, encoding="utf-8")
    draft = drafting.draft(folder / "t.csv", **options)
    assert encoded(folder / "t.csv", **options).report.rows > 0
    return draft


def test_the_draft_of_a_small_table(tmp_path):
    text = "age,sex,chol,code,y\n63,m,233,1,0\n37.5,f,?,0,1\n41,f,204,1,0\n"
    assert draft_of(tmp_path, text).removeprefix(drafting.WARNING) == (
        "schema:\n"
        "  features:\n"
        "    - {name: age, type: numeric, bounds: [37.5, 63]}\n"
        "    - {name: sex, type: categorical, categories: [f, m]}\n"
        '    - {name: chol, type: categorical, categories: [204, 233], missing: ["?"]}\n'
        "    - {name: code, type: categorical, categories: [0, 1]}\n"
        "  target: {name: y, classes: [0, 1]}\n"
        "  validation_fraction: 0.2\n"
    )


def test_the_warning_that_it_was_read_from_the_data_comes_first(tmp_path):
    assert draft_of(tmp_path, "a,y\n1,0\n2,1\n").startswith("# A first draft, for a human to edit.\n")
    assert "READ FROM THE DATA: they are not private" in drafting.WARNING
    assert all(line.startswith("#") for line in drafting.WARNING.splitlines())


def test_the_target_is_the_last_column_or_the_one_named(tmp_path):
    text = "a,y,z\n1,0,x\n2,1,w\n"
    assert "target: {name: z, classes: [w, x]}" in draft_of(tmp_path, text)
    draft = draft_of(tmp_path, text, target="y")
    assert "target: {name: y, classes: [0, 1]}" in draft and "name: z, type: categorical" in draft


def test_a_target_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    (tmp_path / "t.csv").write_text("a,y\n1,0\n")
    with pytest.raises(DataError, match=r"^t.csv: no column num; there are a, y$"):
        drafting.draft(tmp_path / "t.csv", target="num")


@pytest.mark.parametrize("cells", ["0", "", "0\n0"])
def test_a_target_of_one_value_is_refused(tmp_path, cells):
    (tmp_path / "t.csv").write_text("a,y\n" + "".join(f"1,{cell}\n" for cell in cells.split("\n")))
    with pytest.raises(
        DataError, match=r"t.csv: column y cannot be the target: it needs at least two different values"
    ):
        drafting.draft(tmp_path / "t.csv")


def test_a_target_of_many_numbers_is_a_number(tmp_path):
    draft = draft_of(tmp_path, "a,y\n" + "".join(f"{i},{i / 2}\n" for i in range(21)))
    assert "target: {name: y, bounds: [0, 10]}" in draft


@pytest.mark.parametrize("text", ["a,y\n", "a,y\n\n"])
def test_a_table_without_rows_is_refused(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=r"^t.csv: the table has no rows$"):
        drafting.draft(tmp_path / "t.csv")


def test_bounds_are_written_in_full_so_that_no_row_is_clamped(tmp_path):
    draft = draft_of(tmp_path, "a,b,y\n1234567,0.1234567891,0\n1234568,0.1234567892,1\n1234569,1e-9,0\n")
    assert "[1234567, 1234569]" in draft and "[1e-09, 0.1234567892]" in draft
    assert encoded(tmp_path / "t.csv").report.clamped == {}


@pytest.mark.parametrize("marker", ["?", "NaN", "nan", "inf", "", "n/a", "-"])
def test_cells_that_are_no_number_in_a_column_of_numbers_are_markers(tmp_path, marker):
    draft_of(tmp_path, f"a,y\n1,0\n2,1\n3,0\n{marker},1\n")
    assert encoded(tmp_path / "t.csv").report.missing == {"a": 1}


def test_empty_cells_among_words_are_missing(tmp_path):
    assert 'categories: [no, yes], missing: [""]' in draft_of(tmp_path, "a,y\nyes,0\nno,1\n,0\n")
    assert encoded(tmp_path / "t.csv").report.missing == {"a": 1}


def test_values_that_mean_the_same_are_written_once(tmp_path):
    assert "categories: [1, 2]" in draft_of(tmp_path, "a,y\n1,0\n1.0,1\n01,0\n2,1\n")


def test_more_categories_than_a_human_would_list_are_cut_and_said(tmp_path):
    draft = draft_of(tmp_path, "who,y\n" + "".join(f"p{i:02},{i % 2}\n" for i in range(23)))
    assert "p19]}  # and 3 more; leave the column out if it names a person" in draft
    assert encoded(tmp_path / "t.csv").report.other == {"who": 3}


def test_columns_without_a_name_or_values_are_left_out_and_said(tmp_path):
    draft = draft_of(tmp_path, ",a,note,y\n0,1,,0\n1,2,,1\n")
    assert '# left out: column "", which has no name' in draft
    assert "# left out: column note, which has no values" in draft


def test_columns_of_lists_are_left_out(tmp_path):
    pl.DataFrame({"a": [1, 2], "l": [[1], [2]], "y": [0, 1]}).write_parquet(tmp_path / "t.parquet")
    assert "# left out: column l, which has no values" in drafting.draft(tmp_path / "t.parquet")
    assert encoded(tmp_path / "t.parquet").x.shape == (2, 3)


def test_booleans_of_parquet_are_encoded_as_drafted(tmp_path):
    frame = pl.DataFrame({"a": [True, False, None], "y": [True, False, True]})
    frame.write_parquet(tmp_path / "t.parquet")
    drawn = encoded(tmp_path / "t.parquet")
    assert drawn.x.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]] and drawn.y.tolist() == [1, 0, 1]


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
    frame = pl.DataFrame({name: cells, "y": [str(i % 2) for i in range(len(cells))]})
    frame.write_parquet(path) if suffix == "parquet" else frame.write_csv(path, quote_style="always")
    report = encoded(path).report
    assert report.clamped == {} and report.other == {}


def test_a_draft_is_text_that_our_documents_read_as_meant(tmp_path):
    (tmp_path / "t.csv").write_text('no,"1",y\nyes,on,0\nno,2026-11-23,1\n')
    schema = pasted(tmp_path / "t.csv", drafting.draft(tmp_path / "t.csv")).data_schema
    assert [feature.name for feature in schema.features] == ["no", "1"]
    assert schema.features[0].categories == ("no", "yes") and schema.features[1].categories == ("2026-11-23", "on")
