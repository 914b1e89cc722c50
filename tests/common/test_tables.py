"""Files become columns of cells; where they cannot, the owner is told the file, the line and the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import documents, tables
from common.encoding import encode
from common.errors import DataError
from common.schema import Schema
from common.tables import Table

PLAIN: dict[str, Any] = {
    "features": [
        {"name": "a", "type": "numeric", "bounds": [0, 10]},
        {"name": "b", "type": "categorical", "categories": ["x", "y"], "optional": True},
    ],
    "target": {"name": "y", "classes": [0, 1]},
}
WITH_COLUMNS = PLAIN | {"columns": ["a", "b", "note", "y"]}


def schema(contents: dict[str, Any]) -> Schema:
    return documents.validate(contents, Schema)


def read(folder: Path, content: str | bytes, contents: dict[str, Any] = PLAIN, *, name: str = "t.csv") -> Table:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tables.read(path, schema(contents))


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_header_names_the_columns_whatever_separates_them(tmp_path, separator, end):
    text = end.join(["a,note,y", "1,,0", "2,two,1", ""]).replace(",", separator)
    table = read(tmp_path, text)
    assert table.frame.columns == ["a", "note", "y"]
    assert table.frame.fill_null("").rows() == [("1", "", "0"), ("2", "two", "1")]
    assert table.first_line == 2 and table.source == "t.csv"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_without_a_header_the_schema_names_the_columns(tmp_path, separator):
    table = read(tmp_path, "1,x,n,0\n2,y,m,1\n".replace(",", separator), WITH_COLUMNS)
    assert table.frame.rows(named=True) == [
        {"a": "1", "b": "x", "note": "n", "y": "0"},
        {"a": "2", "b": "y", "note": "m", "y": "1"},
    ]
    assert table.first_line == 1


def test_a_cell_that_is_called_like_a_column_makes_no_header(tmp_path):
    table = read(tmp_path, "1,x,y,0\n2,y,m,1\n", WITH_COLUMNS)
    assert table.frame["note"].to_list() == ["y", "m"] and table.first_line == 1


def test_a_header_counts_also_where_the_schema_names_columns(tmp_path):
    table = read(tmp_path, "y,note,b,a\n0,n,x,1\n", WITH_COLUMNS)
    assert table.frame.rows(named=True) == [{"y": "0", "note": "n", "b": "x", "a": "1"}] and table.first_line == 2


def test_cells_stay_text(tmp_path):
    assert read(tmp_path, "a,y\n007,1e5\ntrue,\n").frame.dtypes == [pl.String, pl.String]
    assert read(tmp_path, "a,y\n007,1e5\n").frame.rows() == [("007", "1e5")]


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    assert read(tmp_path, b"\xef\xbb\xbfa,y\n1,0\n").frame.columns == ["a", "y"]


def test_names_are_trimmed(tmp_path):
    assert read(tmp_path, "a , y\n1,0\n").frame.columns == ["a", "y"]


def test_quoted_fields_may_hold_separators_quotes_and_line_breaks(tmp_path):
    table = read(tmp_path, 'a,"b",y\n1,"x, ""x""\nx",0\n2,y,1\n')
    assert table.frame.rows() == [("1", 'x, "x"\nx', "0"), ("2", "y", "1")]


def test_separators_inside_quotes_do_not_vote(tmp_path):
    assert read(tmp_path, '"n, o, t, e";a;y\nn;1;0\n').frame.columns == ["n, o, t, e", "a", "y"]


def test_a_header_may_take_several_lines(tmp_path):
    table = read(tmp_path, 'a,"blood\npressure",y\n1,2,0\n3,4,1\n')
    assert table.frame.columns == ["a", "blood\npressure", "y"] and table.frame.height == 2
    assert table.first_line == 3


def test_the_last_line_may_lack_its_end_or_be_followed_by_blank_ones(tmp_path):
    rows = [("1", "0"), ("2", "1")]
    for end in ("", "\n", "\n\n\n", "\r\n\r\n"):
        assert read(tmp_path, "a,y\n1,0\n2,1" + end).frame.rows() == rows


def test_a_last_column_may_be_empty_in_a_table_of_tabs(tmp_path):
    assert read(tmp_path, "a\ty\tz\n1\t0\t\n2\t1\t\n").frame.height == 2


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a,b,y\n1,x,0\n2,y\n3,x,1\n", "every line must have 3 fields; line 3 has 2"),
        ("a,b,y\n1,x,0\n2,y,0,9\n3\n", "every line must have 3 fields; line 3 has 4, line 4 has 1"),
        ("a,b,y\n1,x,0\n\n3,x,1\n", "every line must have 3 fields; line 3 has 0"),
        ('a,b,y\n1,"x\nx",0\n2,"y"\n', "every line must have 3 fields; line 4 has 2"),
        ("a,b,y\n" + "1\n" * 12, "line 11 has 1, and 2 more"),
    ],
)
def test_ragged_rows_are_told_by_line_and_never_filled(tmp_path, text, expected):
    with pytest.raises(DataError, match=f"^t.csv: .*{expected}$"):
        read(tmp_path, text)


def test_ragged_rows_without_a_header_count_from_the_first_line(tmp_path):
    with pytest.raises(DataError, match=r"every line must have 4 fields; line 2 has 3$"):
        read(tmp_path, "1,x,n,0\n2,y,1\n", WITH_COLUMNS)


@pytest.mark.parametrize(
    "rows, reason",
    [
        ('1,"0\n2,1\n', "line 3: unexpected end of data"),
        ('1,0\n"1"x,0\n', "line 3: ',' expected after '\"'"),
        ('"' + "1" * 200_000 + '",0\n', "line 2: field larger than field limit"),
    ],
)
def test_broken_quotes_are_refused(tmp_path, rows, reason):
    with pytest.raises(DataError, match=f"^t.csv: not a table of 2 columns separated by ',': {reason}"):
        read(tmp_path, "a,y\n" + rows)


def test_a_quote_inside_a_cell_is_refused_if_polars_cannot_read_it(tmp_path):
    with pytest.raises(DataError, match=r"^t.csv: not a table of 2 columns separated by ',': CSV malformed"):
        read(tmp_path, 'a,y\n1,a"b\n2,3\n')


def test_a_first_line_that_never_ends_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"^t.csv: line 1: .*field limit.*is there a quote that is not closed\?$"):
        read(tmp_path, '"' + "a,y\n" * 50_000)


@pytest.mark.parametrize("text", ["a,y\n", "a,y", "a,y\n\n\n"])
def test_a_header_alone_is_a_table_without_rows(tmp_path, text):
    table = read(tmp_path, text)
    assert table.frame.shape == (0, 2)
    with pytest.raises(DataError, match=r"^t.csv: the table has no rows$"):
        encode(table.frame, schema(PLAIN), source=table.source)


@pytest.mark.parametrize("text", ["", "\n\n", "  \n", "\ufeff"])
def test_an_empty_file_is_said_to_be_empty(tmp_path, text):
    with pytest.raises(DataError, match=r"^t.csv: the file is empty$"):
        read(tmp_path, text)


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_file_that_is_not_there_is_said_so(tmp_path, name):
    with pytest.raises(DataError, match=f"{name}: no such file$"):
        tables.read(tmp_path / name, schema(PLAIN))
    with pytest.raises(DataError, match=f"{name}: no such file$"):
        tables.read_any(tmp_path / name)


def test_what_is_no_text_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"^t.csv: cannot be read as UTF-8 text: .*byte 0xff"):
        read(tmp_path, b"a,y\n\xff,0\n")


def test_what_is_no_parquet_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"^t.pq: cannot be read as Parquet: "):
        read(tmp_path, b"a,y\n1,0\n", name="t.pq")


def test_a_column_that_stands_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"^t.csv: line 1: column names must differ, found a, y, a$"):
        read(tmp_path, "a,y,a\n1,0,2\n")
    with pytest.raises(DataError, match=r"^t.csv: line 1: column names must differ, found a, y, a$"):
        tables.read_any(tmp_path / "t.csv")


def test_a_file_without_any_known_name_needs_columns_in_the_schema(tmp_path):
    with pytest.raises(DataError, match="the first line does not name a, y; a file without a header needs `columns`"):
        read(tmp_path, "1,x,0\n")


def test_a_file_of_another_width_is_told_both_ways_out(tmp_path):
    with pytest.raises(
        DataError, match=r"neither names a, y nor has the 4 fields of the schema's `columns` \(it has 3"
    ):
        read(tmp_path, "1,x,0\n", WITH_COLUMNS)


@pytest.mark.parametrize("contents", [PLAIN, WITH_COLUMNS])
def test_a_header_with_a_misspelt_name_is_a_header(tmp_path, contents):
    table = read(tmp_path, "aa,b,y\n1,x,0\n", contents)
    with pytest.raises(DataError, match=r"^t.csv: the table lacks a \(did you mean aa\?\)"):
        encode(table.frame, schema(contents), source=table.source)


def test_parquet_keeps_its_types(tmp_path):
    frame = pl.DataFrame({"a": [1.5, None], "b": ["x", "y"], "y": [0, 1]})
    frame.write_parquet(tmp_path / "t.PQ")
    table = tables.read(tmp_path / "t.PQ", schema(PLAIN))
    assert table.frame.equals(frame) and table.frame.dtypes == [pl.Float64, pl.String, pl.Int64]
    assert table.first_line == 1 and table.source == "t.PQ"


def test_offending_cells_are_told_by_their_line_in_the_file(tmp_path):
    table = read(tmp_path, 'a,note,y\n1,"two\nlines",0\nbad,,0\n3,,2\n')
    with pytest.raises(DataError, match="line 4: a: expected a number, found 'bad'\n  line 5: y: unknown class '2'"):
        encode(table.frame, schema(PLAIN), first_line=table.first_line, source=table.source)


CELL = st.text(st.sampled_from("ab1;,\t\"\n' é"), max_size=5).map(str.strip)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@given(cells=st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=8), separator=st.sampled_from(",;\t"))
def test_what_is_written_is_read(folder, cells, separator):
    frame = pl.DataFrame(cells, schema=["a", "b", "y"], orient="row")
    frame.write_csv(folder / "t.csv", separator=separator, quote_style="always")
    assert tables.read(folder / "t.csv", schema(PLAIN)).frame.fill_null("").rows() == cells
    assert tables.read_any(folder / "t.csv").fill_null("").rows() == cells
