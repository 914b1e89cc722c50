"""Files become columns of cells; where they cannot, the owner is told the file, the line and the reason."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.data import csv_files, tables, text_files
from common.data.encoding import encode, encode_table
from common.data.tables import AS_IT_SEEMS, FileFormat, Table
from common.document import documents
from common.document.schema import Schema
from common.errors import DataError

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


def read(
    folder: Path,
    content: str | bytes,
    contents: dict[str, Any] = PLAIN,
    *,
    name: str = "t.csv",
    form: FileFormat = AS_IT_SEEMS,
) -> Table:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tables.read(path, schema(contents), form)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
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
        ("a,b,y\n1,x,0\n\n3,x\n", "every line must have 3 fields; line 4 has 2"),
        ('a,b,y\n1,5" pipe,0\n2,y\n', "every line must have 3 fields; line 3 has 2"),
        ('a,b,y\n1,"x\nx",0\n2,"y"\n', "every line must have 3 fields; line 4 has 2"),
        ("a,b,y\n" + "1\n" * 12, "line 11 has 1, and 2 more"),
    ],
)
def test_ragged_rows_are_told_by_line_and_never_filled(tmp_path, text, expected):
    with pytest.raises(DataError, match=f"^t.csv: .*{expected}$"):
        _ = read(tmp_path, text).frame


def test_ragged_rows_without_a_header_count_from_the_first_line(tmp_path):
    with pytest.raises(DataError, match=r"every line must have 4 fields; line 2 has 3$"):
        _ = read(tmp_path, "1,x,n,0\n2,y,1\n", WITH_COLUMNS).frame


@pytest.mark.parametrize("rows, line", [('1,"0\n2,1\n', 2), ('5" pipe,0\n1,1\n2,"0\n3,1\n', 4), ('1,"a"\n2,"0\n', 3)])
def test_a_quote_that_is_never_closed_is_told_by_its_line(tmp_path, rows, line):
    with pytest.raises(
        DataError, match=f"^t.csv: line {line}: a quote that begins a cell here is never closed, or not"
    ):
        _ = read(tmp_path, "a,y\n" + rows).frame


@pytest.mark.parametrize("odd", ["", '9,5" pipe,0\n'])
def test_a_quote_that_is_not_closed_is_given_up_before_it_takes_the_whole_file(tmp_path, monkeypatch, odd):
    monkeypatch.setattr(text_files, "PIECE", 500)
    monkeypatch.setattr(csv_files, "LONGEST_ROW", 3_000)
    table = read(tmp_path, f'a,b,y\n1,x,0\n{odd}2,"x,1\n' + "3,x,0\n" * 10_000)
    with pytest.raises(DataError, match=rf"^t.csv: line {4 if odd else 3}: a quote that begins a cell here is never"):
        for block in table.blocks():
            assert block.frame.height < 10


def test_a_first_row_that_never_ends_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"^t.csv: line 1: the first row never ends; is there a quote that is not clos"):
        read(tmp_path, '"a,y\n' + "1,0\n" * 50_000)


@pytest.mark.parametrize("cell", ['5" pipe', 'a"b', 'a "b" c', "it's", 'x"'])
def test_a_quote_that_begins_no_cell_is_text(tmp_path, cell):
    table = read(tmp_path, f'a,b,y\n1,{cell},0\n2,"q, ""r""\ns",1\n3,x,0\n')
    assert table.frame["b"].to_list() == [cell, 'q, "r"\ns', "x"]
    assert [line for block in table.blocks() for line in block.lines] == [2, 3, 5]


def test_text_after_a_closing_quote_belongs_to_the_cell(tmp_path):
    table = read(tmp_path, 'a,b,y\n1,"x, "y,0\n2,"q"r,1\n')
    assert table.frame["b"].to_list() == ["x, y", "qr"]


def test_blanks_around_quotes_are_no_part_of_a_cell(tmp_path):
    table = read(tmp_path, 'a, "b" ,y\n1, "x" ,0\n2 ,  "y, z", 1\n')
    assert table.frame.rows() == [("1", "x", "0"), ("2", "y, z", "1")]


def test_a_cell_may_be_as_long_as_a_book(tmp_path):
    for book in ("b" * 400_000, '"' + "b, " * 200_000 + '"'):
        assert read(tmp_path, f"a,b,y\n1,{book},0\n").frame["b"].to_list() == [book.strip('"').strip()]


def test_a_line_that_names_the_separator_is_no_row(tmp_path):
    table = read(tmp_path, "sep=;\r\na;b,b;y\r\n0,5;x;0\r\n")
    assert table.columns == ["a", "b,b", "y"] and table.first_line == 3
    assert table.frame.rows() == [("0,5", "x", "0")]


def test_the_separator_is_the_one_that_finds_the_names(tmp_path):
    assert read(tmp_path, "a;b,c,d,e;y\n1;x;0\n").columns == ["a", "b,c,d,e", "y"]


def test_the_separator_of_a_file_without_a_header_cuts_it_into_the_columns(tmp_path):
    table = read(tmp_path, "0,5;x, y, z;n;0\n1,5;x, y;m;1\n", WITH_COLUMNS)
    assert table.frame["a"].to_list() == ["0,5", "1,5"]


@pytest.mark.parametrize("text", ["a b y\n1 x 0\n2 y 1\n", " a  b y\n 1   x 0 \n2 y     1\n"])
def test_blanks_separate_where_nothing_else_does(tmp_path, text):
    table = read(tmp_path, text)
    assert (table.columns, table.frame.rows()) == (["a", "b", "y"], [("1", "x", "0"), ("2", "y", "1")])


def test_blanks_in_names_and_cells_do_not_separate_where_something_else_does(tmp_path):
    (tmp_path / "t.csv").write_text("a b,c d\n1 2,3 4\n5 6,7 8\n")
    assert tables.read_any(tmp_path / "t.csv").columns == ["a b", "c d"]


def test_blank_lines_are_no_rows_and_are_counted_as_lines(tmp_path):
    table = read(tmp_path, "\na,y\n1,0\n\n2,1\n   \n3,0\n\n")
    assert table.frame.rows() == [("1", "0"), ("2", "1"), ("3", "0")]
    assert [line for block in table.blocks() for line in block.lines] == [3, 5, 7]


@pytest.mark.parametrize("end", ["", ";;;;\n" * 3, ";;\n", "\n;;;;\n\n"])
def test_empty_columns_and_rows_at_the_end_as_excel_leaves_them_are_none(tmp_path, end):
    table = read(tmp_path, "a;b;y;;\n1;x;0;;\n2;;1;;\n" + end)
    assert table.frame.select("a", "b", "y").fill_null("").rows() == [("1", "x", "0"), ("2", "", "1")]


def test_a_row_may_lack_the_columns_without_a_name_at_its_end(tmp_path):
    # Excel writes them for the first sixteen rows only.
    table = read(tmp_path, "a;y;;\n1;0;;\n2;1\n3;0;\n")
    assert table.frame["y"].to_list() == ["0", "1", "0"]


def test_a_row_may_have_more_empty_fields_than_the_header(tmp_path):
    assert read(tmp_path, "a;y\n1;0;\n2;1;;\n").frame.rows() == [("1", "0"), ("2", "1")]


def test_an_empty_row_between_others_is_a_row(tmp_path):
    table = read(tmp_path, "a,y\n1,0\n,\n2,1\n")
    assert table.frame.fill_null("").rows() == [("1", "0"), ("", ""), ("2", "1")]


def test_a_file_larger_than_a_piece_is_read_as_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "PIECE", 7)
    monkeypatch.setattr(csv_files, "SLOW_ROWS", 2)
    text = 'a,b,y\r\n1,é,0\r\n\r\n2,"x,\r\n""y",1\r\n3,,0\r\n,,\r\n4,z,1\r\n,,\r\n,,\r\n'
    for odd in ("", '9,5" é,0\r\n,,\r\n8,"q\r\n",1\r\n,,\r\n'):
        table = read(tmp_path, text + odd)
        rows = [("1", "é", "0"), ("2", 'x,\n"y', "1"), ("3", "", "0"), ("", "", ""), ("4", "z", "1")]
        lines = [2, 4, 6, 7, 8]
        if odd:
            rows += [("", "", ""), ("", "", ""), ("9", '5" é', "0"), ("", "", ""), ("8", "q", "1")]
            lines += [9, 10, 11, 12, 13]
        assert table.frame.fill_null("").rows() == rows
        assert [line for block in table.blocks() for line in block.lines] == lines


def test_rows_that_are_left_out_of_many_blocks_leave_the_others_as_they_are(tmp_path, monkeypatch):
    lines = [f"{i},{'x' if i % 5 == 3 else 'z'},{2 if i % 7 == 2 else i % 2}" for i in range(40)]
    table = read(tmp_path, "a,b,y\n" + "\n".join(lines) + "\n")
    whole = encode_table(table, schema(PLAIN), leave_out=True)
    fits = [i for i in range(40) if i % 7 != 2]
    assert whole.kept.tolist() == fits
    assert whole.y.tolist() == [i % 2 for i in fits]
    assert whole.x[:, 0].tolist() == [np.float32(2 * (min(i, 10) / 10) - 1) for i in fits]
    monkeypatch.setattr(text_files, "PIECE", 37)
    assert len(list(table.blocks())) > 5
    pieces = encode_table(table, schema(PLAIN), leave_out=True)
    for field in ("x", "y", "kept"):
        assert np.array_equal(getattr(pieces, field), getattr(whole, field))
    assert pieces.report == whole.report
    assert pieces.report.unfit[0] == "line 4: y: unknown class '2'; the schema knows 0, 1"


def test_a_file_that_grows_while_it_is_read_is_an_error_and_not_a_crash(tmp_path):
    table = read(tmp_path, "a,y\n1,0\n")
    with (tmp_path / "t.csv").open("a") as file:
        file.write("2,1\n" * 10)
    with pytest.raises(DataError, match=r"^t.csv: the file grew while it was read; start again$"):
        encode_table(table, schema(PLAIN))


# What a cell with a comma means


SEMICOLONS = "a;y\n0,5;0\n2.5;1\n1.234;0\n1.234,5;1\n12;0\n"


@pytest.mark.parametrize(
    "decimal, numbers", [(None, [0.5, 2.5, 1.234, 1234.5, 12]), (",", [0.5, 2.5, 1234, 1234.5, 12])]
)
def test_a_decimal_comma_is_read_where_semicolons_separate(tmp_path, decimal, numbers):
    contents = PLAIN | {"features": [PLAIN["features"][0] | {"bounds": [-2000, 2000]}]}
    table = read(tmp_path, SEMICOLONS, contents, form=FileFormat(decimal=decimal))
    assert encode_table(table, schema(contents)).x[:, 0].tolist() == [np.float32(n / 2000) for n in numbers]


def test_a_point_between_groups_is_none_of_decimals_where_a_comma_is_declared(tmp_path):
    contents = PLAIN | {"features": [PLAIN["features"][0] | {"bounds": [0, 2000]}]}
    for decimal, number in ((",", 1234), (None, 1.234)):
        table = read(tmp_path, "a;y\n1.234;0\n", contents, form=FileFormat(decimal=decimal))
        assert encode_table(table, schema(contents)).x[0, 0] == np.float32(2 * (number / 2000) - 1)


def test_a_decimal_comma_is_no_number_where_a_point_is_declared_and_the_error_quotes_it(tmp_path):
    table = read(tmp_path, SEMICOLONS, form=FileFormat(decimal="."))
    with pytest.raises(DataError, match="line 2: a: expected a number, found '0,5'"):
        encode_table(table, schema(PLAIN))


# Encodings

GROSS = "größe;a;y\nKöln;1;0\nZürich;2;1\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "utf-32"])
def test_a_file_with_its_mark_is_read_in_its_encoding(tmp_path, encoding):
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    table = read(tmp_path, mark + GROSS.replace("\n", "\r\n").encode(encoding))
    assert table.frame.rows() == [("Köln", "1", "0"), ("Zürich", "2", "1")]
    assert table.columns == ["größe", "a", "y"]


@pytest.mark.parametrize("encoding", ["latin-1", "windows-1252", "cp850", "utf-16-le"])
def test_a_file_is_read_in_the_encoding_that_its_owner_declares(tmp_path, encoding):
    table = read(tmp_path, GROSS.encode(encoding), form=FileFormat(encoding))
    assert table.frame.rows() == [("Köln", "1", "0"), ("Zürich", "2", "1")]


@pytest.mark.parametrize(
    "encoding, text, seems",
    [
        ("latin-1", GROSS, "windows-1252"),
        ("cp1250", "a;jméno;y\n1;Žižka;0\n2;Řehoř;1\n3;Štěpán;0\n", "windows-1250"),
        ("cp1251", "a;имя;y\n1;Иван Петров;0\n2;Пётр Казань;1\n", "windows-1251"),
    ],
)
def test_an_encoding_that_is_not_declared_is_named_with_the_line_and_the_remedies(tmp_path, encoding, text, seems):
    with pytest.raises(DataError) as caught:
        _ = read(tmp_path, text.encode(encoding)).frame
    said = str(caught.value)
    assert re.match(rf"t.csv: line 1: byte 0x[89a-f][0-9a-f] is no utf-8 text; it seems to be {seems}\. ", said)
    assert f"`encoding: {seems}` below `data:` in the client file, --encoding {seems} for simulate" in said
    assert f"iconv -f {seems.upper()} -t UTF-8 t.csv > utf8-t.csv" in said


def test_a_byte_that_is_no_text_is_told_by_its_line_wherever_the_pieces_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "PIECE", 5)
    with pytest.raises(DataError, match=r"^t.csv: line 3: byte 0xff is no utf-8 text"):
        _ = read(tmp_path, b"a,y\n1,0\n\xff,0\n2,1\n").frame


def test_a_file_that_is_cut_off_in_a_character_is_said_to_be(tmp_path):
    with pytest.raises(
        DataError, match=r"^t.csv: line 2: the file ends in the middle of a character; is it cut off\?$"
    ):
        _ = read(tmp_path, "a,y\n1,é".encode()[:-1]).frame


def test_a_file_in_another_encoding_than_declared_is_told(tmp_path):
    with pytest.raises(
        DataError, match=r"^t.csv: line 2: byte 0xe9 is no ascii text. Without `encoding`, UTF-8 is read"
    ):
        _ = read(tmp_path, "a,y\n1é,0\n".encode("latin-1"), form=FileFormat("ascii")).frame


def test_utf_16_without_its_mark_is_guessed(tmp_path):
    with pytest.raises(DataError, match=r"holds the character NUL.*if it is UTF-16 without its mark, say so: `enc"):
        read(tmp_path, "a,y\n1,0\n".encode("utf-16-le"))


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


def test_what_is_no_parquet_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"^t.pq: cannot be read as Parquet: "):
        read(tmp_path, b"a,y\n1,0\n", name="t.pq")


def test_a_column_that_is_used_and_stands_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"^t.csv: line 1: column names must differ, found a twice$"):
        read(tmp_path, "a,y,a\n1,0,2\n")


def test_columns_that_nothing_asks_for_may_have_one_name_or_none(tmp_path):
    table = read(tmp_path, "a,note,y,note,,\n1,p,0,q,,r\n")
    assert table.columns == ["a", "note", "y", "note (2)", "", " (2)"]
    assert table.frame.row(0, named=True) == {"a": "1", "note": "p", "y": "0", "note (2)": "q", "": None, " (2)": "r"}


@pytest.mark.parametrize("header", ["A,b,y", "a ,b,Y", "A,B,Y", '"A" , b,y'])
def test_a_header_in_another_case_is_a_header_and_the_near_name_is_said(tmp_path, header):
    table = read(tmp_path, header + "\n1,x,0\n")
    assert table.first_line == 2
    with pytest.raises(DataError, match=r"^t.csv: the table lacks .*(a \(did you mean A\?\)|y \(did you mean Y\?\))"):
        encode_table(table, schema(PLAIN))


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
    assert list(table.types.values()) == table.frame.dtypes
    assert table.first_line == 1 and table.source == "t.PQ"


def test_parquet_is_read_in_blocks_and_without_columns_that_hold_no_cells(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BLOCK_CELLS", 8)
    frame = pl.DataFrame({"a": range(20), "y": [0, 1] * 10})
    odd = frame.with_columns(
        stay=pl.duration(days=pl.col("a")), codes=pl.concat_list("a"), raw=pl.lit(b"x"), both=pl.struct("a", "y")
    )
    odd.write_parquet(tmp_path / "t.parquet", row_group_size=6)
    table = tables.read(tmp_path / "t.parquet", schema(PLAIN))
    assert [block.frame.height for block in table.blocks()] == [4] * 5
    assert [line for block in table.blocks() for line in block.lines] == list(range(1, 21))
    assert table.frame.equals(frame)


def test_offending_cells_are_told_by_their_line_in_the_file(tmp_path):
    table = read(tmp_path, 'a,note,y\n1,"two\nlines",0\nbad,,0\n3,,2\n')
    with pytest.raises(DataError, match="line 4: a: expected a number, found 'bad'\n  line 5: y: unknown class '2'"):
        encode(table.frame, schema(PLAIN), first_line=table.first_line, source=table.source)


CELL = st.text(st.sampled_from("ab1;,\t\"\n' é|"), max_size=5).map(str.strip)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


ROWS = st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=8).filter(lambda rows: any(rows[-1]))


@given(cells=ROWS, separator=st.sampled_from(",;\t|"))
def test_what_is_written_is_read(folder, cells, separator):
    frame = pl.DataFrame(cells, schema=["a", "b", "y"], orient="row")
    frame.write_csv(folder / "t.csv", separator=separator, quote_style="always")
    assert tables.read(folder / "t.csv", schema(PLAIN)).frame.fill_null("").rows() == cells


@given(body=st.text(st.sampled_from('ab1," \n'), max_size=24), piece=st.integers(1, 30))
def test_whatever_text_is_read_as_pythons_csv_reads_it(folder, body, piece):
    (folder / "t.csv").write_text("a,b,y\n" + body)
    lines = body.replace("\n", "\n\0").split("\0")
    try:
        rows = list(csv.reader(lines, skipinitialspace=True, strict=True))
    except csv.Error:
        return  # a quote that is never closed, or one that csv takes as text without `strict`
    rows = [[cell.strip() for cell in row] for row in rows if any(map(str.strip, row)) or len(row) > 1]
    if any((len(row) > 3 and any(row[3:])) or len(row) < 3 for row in rows):
        return
    expected = [tuple(row[:3]) for row in rows]
    while expected and not any(expected[-1]):
        expected.pop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "PIECE", piece)
        found = tables.read(folder / "t.csv", schema(PLAIN)).frame.fill_null("").rows()
    assert found == expected


@pytest.mark.parametrize("cells", [1, 4, 7, 1000])
def test_a_table_in_memory_comes_in_blocks_whose_rows_know_their_lines(monkeypatch, cells):
    monkeypatch.setattr(tables, "BLOCK_CELLS", cells)
    frame = pl.DataFrame({"a": ["1", "two\nlines", "3", "4", "5"], "b": ["x", "y", "z\n\n", "u", "v"]})
    blocks = [*tables.of_frame(frame, first_line=2).blocks()]
    assert pl.concat([block.frame for block in blocks])["b"].to_list() == ["x", "y", "z", "u", "v"]  # tidied
    assert np.concatenate([block.lines for block in blocks]).tolist() == [2, 3, 5, 8, 9]
    assert max(block.frame.height for block in blocks) == min(max(1, cells // 2), 5)
    assert [block.frame.height for block in tables.of_frame(frame.clear()).blocks()] == [0]
