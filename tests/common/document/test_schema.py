"""Encoding is declared: it looks at one cell at a time, and never at the data to decide how."""

from __future__ import annotations

import math
import re
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from common.data import tables
from common.data.cells import Cells, tidy
from common.data.encoding import Encoded, check_values, encode
from common.document import documents
from common.document.schema import Schema
from common.document.values import agree
from common.errors import DataError

AGE = {"name": "age", "type": "numeric", "bounds": [20, 100]}
CHOL = {"name": "chol", "type": "numeric", "bounds": [0, 10], "missing": [0, "?"]}
CP = {"name": "cp", "type": "categorical", "categories": [1, 2, "none"], "missing": ["?"]}
SICK = {"name": "sick", "classes": {"no": [0], "yes": [1, 2]}}
COST = {"name": "cost", "bounds": [100, 300]}


def schema(*features: dict[str, Any], target: dict[str, Any] = SICK, **more: Any) -> Schema:
    return documents.validate({"features": list(features), "target": target, **more}, Schema)


def column(feature: dict[str, Any], cells: list[Any]) -> Encoded:
    """One feature encoded, beside a target that alternates."""
    frame = pl.DataFrame({feature["name"]: cells, "sick": [i % 2 for i in range(len(cells))]}, strict=False)
    return encode(frame, schema(feature))


def target(declared: dict[str, Any], cells: list[Any]) -> Encoded:
    frame = pl.DataFrame({"age": [50] * len(cells), declared["name"]: cells}, strict=False)
    return encode(frame, schema(AGE, target=declared))


def test_a_number_is_scaled_from_its_bounds_to_minus_one_and_one():
    # 20 -> -1, 60 -> 0, 80 -> 0.5, 100 -> 1
    assert_array_equal(column(AGE, [20, 60, 80, 100]).x, [[-1], [0], [0.5], [1]])


def test_a_number_outside_its_bounds_is_clamped_and_counted():
    encoded = column(AGE, [19.9, 20, 101, 1e300])
    assert_array_equal(encoded.x, [[-1], [-1], [1], [1]])
    assert encoded.report.clamped == {"age": 3}


@pytest.mark.parametrize("marker", ["?", "0", "0.0", "", " ? ", None, "-0"])
def test_a_missing_number_is_the_middle_and_flagged(marker):
    encoded = column(CHOL, ["2.5", marker])
    assert_array_equal(encoded.x, [[-0.5, 0], [0, 1]])
    assert encoded.report.missing == {"chol": 1} and encoded.report.clamped == {}


def test_categories_are_one_hot_with_a_place_for_others_and_none_for_missing():
    encoded = column(CP, ["1", "2", "none", "3", "None", "?", ""])
    assert_array_equal(
        encoded.x,
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]],
    )
    assert encoded.report.other == {"cp": 2} and encoded.report.missing == {"cp": 2}


def test_a_number_that_is_none_counts_as_missing_where_the_schema_says_so():
    encoded = column(AGE | {"unfit": "missing"}, ["60", "old", "inf", "", "101"])
    assert_array_equal(encoded.x, [[0, 0], [0, 1], [0, 1], [0, 1], [1, 0]])
    assert (encoded.report.missing, encoded.report.unfit_missing) == ({"age": 3}, {"age": 2})
    assert encoded.report.clamped == {"age": 1}
    assert encoded.report.left_out == 0
    assert "cells that do not fit, counted as missing: age 2" in encoded.report.lines()


def test_a_category_that_is_none_counts_as_missing_where_the_schema_says_so():
    encoded = column(CP | {"unfit": "missing"}, ["1", "9", "?", "2"])
    assert_array_equal(encoded.x, [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]])
    assert (encoded.report.missing, encoded.report.unfit_missing, encoded.report.other) == ({"cp": 2}, {"cp": 1}, {})


def test_a_row_with_a_category_that_is_none_is_left_out_where_the_schema_says_so():
    frame = pl.DataFrame({"cp": ["1", "9", "?", "2"], "sick": ["0", "0", "1", "2"]})
    strict = schema(CP | {"unfit": "left_out"})
    with pytest.raises(
        DataError, match=r"1 cell does not fit the schema:\n  line 2: cp: expected one of 1, 2, none, f"
    ):
        encode(frame, strict)
    encoded = encode(frame, strict, leave_out=True)
    assert_array_equal(encoded.x, [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]])
    assert (encoded.kept.tolist(), encoded.report.left_out, encoded.report.other) == ([0, 2, 3], 1, {})


def test_a_category_that_is_also_a_marker_is_missing():
    encoded = column(CP | {"missing": [2]}, ["1", "2"])
    assert_array_equal(encoded.x, [[1, 0, 0, 0], [0, 0, 0, 0]])
    assert encoded.report.missing == {"cp": 1}


@pytest.mark.parametrize("declared", [1, 1.0])
@pytest.mark.parametrize("cell", ["1", "1.0", " 1 ", "1e0", "01", 1, 1.0])
def test_numbers_agree_however_they_are_spelt(declared, cell):
    feature = {"name": "cp", "type": "categorical", "categories": [declared, 2]}
    assert_array_equal(column(feature, [cell]).x, [[1, 0, 0]])
    assert target({"name": "y", "classes": {"a": [0], "b": [declared]}}, [cell]).y == [1]


@pytest.mark.parametrize("cell, hot", [("01", 0), ("1", 1), ("1.0", 1), ("1e0", 1), (1.0, 1), ("001", 2)])
def test_a_number_in_quotes_is_that_number_unless_leading_zeros_make_it_a_code(cell, hot):
    feature = {"name": "code", "type": "categorical", "categories": ["01", "1"]}
    assert column(feature, [cell]).x.argmax() == hot


@pytest.mark.parametrize(
    "cells", [[True, False], ["true", "false"], ["True", "False"], ["TRUE", "FALSE "], [1, 0], ["1.0", "0"]], ids=str
)
@pytest.mark.parametrize("declared", [[False, True], ["false", "true"], ["False", "True"], [0, 1], ["0", "1"]], ids=str)
def test_true_and_false_are_one_and_zero_however_they_are_spelled(declared, cells):
    feature = {"name": "ill", "type": "categorical", "categories": declared}
    assert_array_equal(column(feature, cells).x, [[0, 1, 0], [1, 0, 0]])
    assert_array_equal(target({"name": "y", "classes": declared}, cells).y, [1, 0])
    assert_array_equal(column(AGE | {"name": "ill", "bounds": [0, 1]}, cells).x, [[1], [-1]])


WORDS = "0 1 1.0 01 001 +1 -1 1e0 1e5 1E5 100000 true True FALSE x nan 1. 1.50 .5 0.5 00.5 -01 1_0 inf 9007199254740993"
VALUES = st.sampled_from([True, False, 0, 1, -0.0, 1.5, 2, 100000, 1000, *WORDS.split()])
AS_CELLS = st.sampled_from(
    [*WORDS.split(), *"1e+05 TRUE -0 00 1,000 1000 0,5".split(), "", "1 000", 0, 1, 1000, 1.5, 1e5]
)


@given(one=VALUES, other=VALUES, cell=AS_CELLS | st.booleans())
def test_two_values_that_a_cell_could_mean_are_known_to_agree(one, other, cell):
    cells = Cells(tidy(pl.DataFrame({"x": [cell]}))["x"])
    if cells.means(one).all() and cells.means(other).all():
        assert agree(one, other)


def test_a_cell_that_two_categories_could_mean_is_the_first_of_them():
    feature = {"name": "cp", "type": "categorical", "categories": [1000, "1,000"]}  # by a point, or by a comma
    assert_array_equal(column(feature, ["1,000", "1000"]).x, [[1, 0, 0], [1, 0, 0]])
    assert target({"name": "y", "classes": {"a": [1000], "b": ["1,000"]}}, ["1,000"]).y == [0]


def test_classes_may_be_true_and_false():
    place = schema(AGE, target={"name": "y", "classes": [True, False]}).target
    assert list(place.classes) == ["true", "false"]  # type: ignore[union-attr]  # it has classes


@pytest.mark.parametrize("marker", [-999, -999.0, "-999", "-999.0"])
@pytest.mark.parametrize("cell", ["-999", "-999.0", "-9.99e2", -999, -999.0])
def test_a_marker_is_a_marker_however_it_is_spelled(marker, cell):
    encoded = column(AGE | {"missing": [marker]}, ["60", cell] if isinstance(cell, str) else [60, cell])
    assert_array_equal(encoded.x, [[0, 0], [0, 1]])
    assert encoded.report.clamped == {}


@pytest.mark.parametrize("cells", [[60.0, math.nan], [60.0, None], ["60", "nan"], ["60", "NaN"], ["60", ""]], ids=str)
def test_nan_is_a_number_that_is_missing(cells):
    assert_array_equal(column(AGE | {"optional": True}, cells).x, [[0, 0], [0, 1]])
    feature = {"name": "g", "type": "categorical", "categories": [60], "optional": True}
    encoded = column(feature, cells)
    assert_array_equal(encoded.x, [[1, 0], [0, 0]])
    assert (encoded.report.missing, encoded.report.other) == ({"g": 1}, {})


def test_nan_is_a_word_where_the_schema_lists_it_as_one():
    feature = {"name": "who", "type": "categorical", "categories": ["Ann", "nan"], "optional": True}
    assert_array_equal(column(feature, ["Ann", "nan", "NaN"]).x, [[1, 0, 0], [0, 1, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    "cell, number",
    [("1,234", 1234), ("1,234.5", 1234.5), ("-12,345,678", -12345678), ("1 234", 1234), ("1'234.5", 1234.5)],
)
def test_groups_of_digits_are_one_number(cell, number):
    encoded = column(AGE | {"bounds": [-2e8, 2e8]}, [cell])
    assert encoded.x[0, 0] == np.float32(number / 2e8)


@pytest.mark.parametrize("cell", ["1,5", "12,34", "1,2345", ",5", "1,234,5", "1,23,456", "1.5.2", "0,5"])
def test_a_comma_that_groups_no_three_digits_is_no_number_where_a_point_is_the_mark(cell):
    with pytest.raises(DataError, match=f"expected a number, found '{re.escape(cell)}'") as caught:
        column(AGE, [cell])
    assert ("is that a decimal comma? `decimal:" in str(caught.value)) == (cell.count(",") == 1)


def test_every_input_is_written_whatever_was_in_memory(monkeypatch):
    monkeypatch.setattr("common.data.encoding.np.empty", lambda shape, dtype: np.full(shape, 7, dtype))
    chol = CHOL | {"missing": ["?"]}  # columns that are all numbers go another way
    frame = pl.DataFrame({"age": [60, 20], "chol": [5, 10], "cp": [1, 2], "sick": [0, 1]})
    assert_array_equal(encode(frame, schema(AGE, chol, CP)).x, [[0, 0, 0, 1, 0, 0, 0], [-1, 1, 0, 0, 1, 0, 0]])
    absent = encode(frame.drop("chol", "cp"), schema(AGE, chol | {"optional": True}, CP | {"optional": True}))
    assert_array_equal(absent.x, [[0, 0, 1, 0, 0, 0, 0], [-1, 0, 1, 0, 0, 0, 0]])


def test_classes_are_indices_in_the_order_of_the_schema():
    encoded = target(SICK, ["0", "2", "1", "0"])
    assert encoded.y.dtype == np.int64
    assert_array_equal(encoded.y, [0, 1, 1, 0])
    assert encoded.report.classes == {"no": 2, "yes": 2}


def test_a_numeric_target_is_scaled_to_zero_and_one_and_clamped():
    encoded = target(COST, [100, 150, 300, 400, 0])
    assert encoded.y.dtype == np.float32
    assert_array_equal(encoded.y, np.float32([0, 0.25, 1, 1, 0]))
    assert (encoded.report.targets_clamped, encoded.report.clamped) == (2, {})
    assert encoded.report.lines() == [
        "2 of 5 targets are outside their bounds and are clamped: to train on, and where an error is measured"
    ]


def test_a_table_of_one_class_is_accepted_and_said():
    encoded = target(SICK, [1, 2, 1])
    assert_array_equal(encoded.y, [1, 1, 1])
    assert "all rows are of one class: yes" in encoded.report.lines()


def test_an_absent_optional_column_is_missing_everywhere():
    chol, cp = CHOL | {"optional": True, "missing": []}, CP | {"optional": True}
    encoded = encode(pl.DataFrame({"age": [60, 60], "sick": [0, 1]}), schema(chol, AGE, cp))
    assert_array_equal(encoded.x, [[0, 1, 0, 0, 0, 0, 0]] * 2)
    assert encoded.report.absent == ["chol", "cp"]
    assert "column chol is absent; it is optional and counts as missing" in encoded.report.lines()


def test_an_absent_column_encodes_as_an_empty_one():
    features = [CHOL | {"optional": True}, CP | {"optional": True}, AGE]
    rest = pl.DataFrame({"age": [60], "sick": [0]})
    empty = rest.with_columns(chol=pl.lit(None, pl.String), cp=pl.lit(""))
    assert_array_equal(encode(rest, schema(*features)).x, encode(empty, schema(*features)).x)


def test_absent_columns_are_all_named_with_the_nearest_that_is_there():
    frame = pl.DataFrame({"Age": [1], "chool": ["?"], "sick": [0]})
    with pytest.raises(
        DataError, match=r"^t.csv: the table lacks chol \(did you mean chool\?\), cp; it has Age, chool"
    ):
        encode(frame, schema(CHOL, CP, AGE | {"optional": True}), source="t.csv")


def test_columns_the_schema_does_not_name_and_their_order_do_not_count():
    frame = pl.DataFrame({"age": [60, 70], "cp": [1, 2], "sick": [0, 1]})
    more = frame.select("sick", pl.lit("x").alias("note"), "cp", "age")
    assert_array_equal(encode(frame, schema(AGE, CP)).x, encode(more, schema(AGE, CP)).x)


@pytest.mark.parametrize("cell", ["old", "inf", "-inf", "1e999", "1_000", "1,5", "0x10", math.inf])
def test_what_is_no_finite_number_does_not_fit_a_numeric_column(cell):
    with pytest.raises(DataError, match="1 cell does not fit the schema:\n  line 2: age: expected a number, found '"):
        encode(pl.DataFrame({"age": [cell], "sick": [0]}, strict=False), schema(AGE), first_line=2)
    with pytest.raises(DataError, match="line 1: cost: expected a number, found"):
        target(COST, [cell])


@pytest.mark.parametrize("feature", [AGE, {"name": "cp", "type": "categorical", "categories": [1]}])
@pytest.mark.parametrize("cell", ["", "  ", None, "nan", "NaN", math.nan])
def test_an_empty_cell_needs_a_column_that_may_be_missing(feature, cell):
    with pytest.raises(DataError, match=f"line 1: {feature['name']}: is empty, and the schema gives this column no"):
        column(feature, [cell])


def test_an_unknown_class_is_quoted_beside_the_known_ones():
    with pytest.raises(DataError, match="line 2: sick: unknown class '3'; the schema knows 0, 1, 2"):
        target(SICK, ["0", "3"])


@pytest.mark.parametrize("declared", [SICK, COST])
def test_an_empty_target_does_not_fit(declared):
    with pytest.raises(
        DataError, match=f"1 cell does not fit the schema:\n  line 1: {declared['name']}: the target is"
    ):
        target(declared, [""])


def test_a_table_without_rows_is_refused():
    with pytest.raises(DataError, match=r"^t.csv: the table has no rows$"):
        encode(pl.DataFrame({"age": [], "sick": []}), schema(AGE), source="t.csv")


@pytest.mark.parametrize("cell", [[1], {"a": 1}, b"\xff", timedelta(1)])
def test_a_column_of_lists_bytes_or_durations_is_refused(cell):
    with pytest.raises(DataError, match=r"t.parquet: column age holds .*, not text, numbers or truth values"):
        encode(pl.DataFrame({"age": [cell], "sick": [0]}), schema(AGE), source="t.parquet")


def test_the_first_ten_offending_cells_are_told_in_the_order_of_the_file():
    # Line 2 is row 0. Ages are bad on every third line, targets on every second: 10 + 15 of 30 rows.
    frame = pl.DataFrame(
        {
            "age": ["x" if i % 3 == 0 else "50" for i in range(30)],
            "sick": ["9" if i % 2 == 0 else "0" for i in range(30)],
        }
    )
    with pytest.raises(DataError, match="25 cells do not fit the schema") as caught:
        encode(frame, schema(AGE), first_line=2)
    _, *shown, more = str(caught.value).splitlines()
    places = [line.split(":")[:2] for line in shown]
    assert [place[0] for place in places] == [f"  line {n}" for n in (2, 2, 4, 5, 6, 8, 8, 10, 11, 12)]
    assert [place[1] for place in places] == [
        f" {name}" for name in "age sick sick age sick age sick sick age sick".split()
    ]
    assert more == "  and 15 more"


def test_line_numbers_count_the_lines_inside_quoted_cells():
    frame = pl.DataFrame({"age": ["50", "old", "x"], "note": ["two\nlines", "a\nb\nc", ""], "sick": ["0"] * 3})
    # The first row takes lines 2 and 3, the second 4 to 6, the third stands on 7.
    with pytest.raises(DataError, match=r"\n  line 4: age: .*'old'\n  line 7: age: .*'x'"):
        encode(frame, schema(AGE), first_line=2)


def test_rows_of_a_typed_table_are_numbered_whatever_their_text_holds():
    frame = pl.DataFrame({"age": [50, 60], "note": ["two\nlines", ""], "sick": [0, 9]})
    with pytest.raises(DataError, match="\n  line 2: sick: unknown class '9'"):
        encode(frame, schema(AGE))


def test_the_report_says_what_was_met():
    frame = pl.DataFrame({"age": ["1", "50"], "chol": ["?", "5"], "cp": ["7", "1"], "sick": ["0", "2"]})
    assert encode(frame, schema(AGE, CHOL, CP)).report.lines() == [
        "cells outside their bounds, clamped: age 1",
        "cells outside their categories, counted as other: cp 1",
        "cells missing: chol 1",
        "classes: no 1, yes 1",
    ]


def test_a_column_that_is_mostly_not_what_the_schema_says_is_a_warning():
    frame = pl.DataFrame(
        {"age": [1, 2, 60, 61], "chol": [5, 50, 50, 50], "cp": ["1", "a", "b", "c"], "cost": [1, 2, 3, 200]}
    )
    report = encode(frame, schema(AGE, CHOL, CP, target=COST)).report
    assert report.warnings(of="t") == [
        "warning: t: column chol: 3 of 4 cells are outside its bounds, and are clamped; does the schema mean another "
        "unit?",
        "warning: t: column cp: 3 of 4 cells are none of its categories, and count as other; are they spelled in "
        "another way?",
        "warning: t: 3 of 4 targets are outside their bounds and are clamped: to train on, and where an error is "
        "measured",
    ]
    assert report.lines(of="t")[:3] == report.warnings(of="t")
    assert report.lines(of="t")[3] == "t: cells outside their bounds, clamped: age 2"


@pytest.mark.parametrize(
    "feature, cells, wrong",
    [
        (CP, [1, 2], False),  # none cannot be in it, but 1 and 2 can
        (CP | {"categories": ["a", "b"]}, [1, 2], True),
        (CP | {"categories": ["a", "2"]}, [1, 2], False),
        (CP | {"categories": ["01", "02"]}, [1, 2], True),
        (CP | {"categories": [1.5, 2.5]}, [1, 2], True),
        (CP | {"categories": [1.5, 2.5]}, [1.0, 2.0], False),
        (CP | {"categories": ["yes", "no"]}, [True, False], True),
        (CP | {"categories": ["True", "no"]}, [True, False], False),
        (CP | {"categories": [2, 3]}, [True, False], True),
        (CP | {"categories": ["a", "b"]}, ["1", "2"], False),  # text may be anything
        (CP | {"categories": [1, 2]}, [date(2026, 1, 1)] * 2, True),
        (CP | {"categories": ["2026-01-01"]}, [date(2026, 1, 1)] * 2, False),
    ],
)
def test_categories_of_which_none_can_be_in_a_typed_column_are_found(feature, cells, wrong):
    place = tables.of_frame(pl.DataFrame({"cp": cells, "sick": [0, 1]}), source="t.parquet")
    if not wrong:
        check_values(place, schema(feature))
        return
    with pytest.raises(
        DataError, match=r"^t\.parquet: column cp holds \w+, so no category can be in it \(the schema li"
    ):
        check_values(place, schema(feature))


def test_a_class_of_which_no_value_can_be_in_a_typed_column_is_found():
    place = tables.of_frame(pl.DataFrame({"age": [50], "sick": [1]}), source="t.parquet")
    check_values(place, schema(AGE, target={"name": "sick", "classes": {"no": [0, "well"], "yes": [1, "ill"]}}))
    with pytest.raises(
        DataError, match=r"column sick holds Int64, so no value of class no can be in it \(.* lists well\)"
    ):
        check_values(place, schema(AGE, target={"name": "sick", "classes": {"no": ["well"], "yes": [1, "ill"]}}))


CELLS = st.fixed_dictionaries(
    {
        "age": st.floats(-1e3, 1e3) | st.integers(0, 200),
        "chol": st.none() | st.sampled_from([0.0, 5.0, 11.0]) | st.floats(-20, 20),
        "cp": st.sampled_from([1.0, 2.0, 3.0]) | st.none(),
        "word": st.sampled_from(["red", "green", "blue", " red", "", "1", "nan", "two\nlines", 'a "b"', "x,y;z"]),
        "sick": st.sampled_from([0, 1, 2]),
    }
)
WORD = {"name": "word", "type": "categorical", "categories": ["red", "green", 1, "two\nlines"], "optional": True}
WIDE = schema(AGE, CHOL, CP, WORD)
TYPES = {"age": pl.Float64, "chol": pl.Float64, "cp": pl.Float64, "word": pl.String, "sick": pl.Int64}


@given(rows=st.lists(CELLS, min_size=1, max_size=12), data=st.data())
def test_encoding_some_rows_is_some_rows_of_the_encoding(rows, data):
    frame = pl.DataFrame(rows, schema=TYPES)
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=20))
    whole, some = encode(frame, WIDE), encode(frame[index], WIDE)
    assert_array_equal(some.x, whole.x[index])
    assert_array_equal(some.y, whole.y[index])


@given(rows=st.lists(CELLS, min_size=1, max_size=12))
def test_an_encoding_is_as_wide_as_declared_and_bounded(rows):
    encoded = encode(pl.DataFrame(rows, schema=TYPES), WIDE)
    # age 1, chol 2 (it may be missing), cp 3 + 1, word 4 + 1.
    assert encoded.x.shape == (len(rows), 12) and WIDE.inputs == 12 and encoded.x.dtype == np.float32
    assert np.abs(encoded.x).max() <= 1
    for block in (encoded.x[:, 3:7], encoded.x[:, 7:12]):
        assert set(block.sum(axis=1)) <= {0, 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@given(rows=st.lists(CELLS, min_size=1, max_size=12), narrow=st.booleans())
def test_one_table_means_the_same_as_csv_and_as_parquet(folder, rows, narrow):
    frame = pl.DataFrame(rows, schema=TYPES)
    if narrow:  # 0.1 as float32 is not 0.1 as float64, but both are written 0.1
        frame = frame.with_columns(pl.col(pl.Float64).cast(pl.Float32), pl.col(pl.Int64).cast(pl.Int8))
    frame.write_csv(folder / "t.csv")
    frame.write_parquet(folder / "t.parquet")
    text, typed = (
        encode(read.frame, WIDE)
        for read in (tables.read(folder / "t.csv", WIDE), tables.read(folder / "t.parquet", WIDE))
    )
    assert_array_equal(text.x, typed.x)
    assert_array_equal(text.y, typed.y)
    assert text.report == typed.report


@pytest.mark.parametrize(
    "features, more, expected",
    [
        ([AGE, AGE], {}, "features[1].name stands twice (got age)"),
        ([AGE | {"bounds": [5, 5]}], {}, "features[0].bounds must rise, as in [0, 100]"),
        ([AGE | {"bounds": [9, 5]}], {}, "features[0].bounds must rise, as in [0, 100]"),
        ([AGE | {"bounds": [-1e308, 1e308]}], {}, "features[0].bounds must rise, as in [0, 100], and be a finite"),
        ([CP | {"categories": [1, 1.0]}], {}, "features[0].categories must all differ; 1 and 1.0 mean the same cells"),
        ([CP | {"categories": [1, "1.0"]}], {}, "features[0].categories must all differ; 1 and 1.0 mean the same"),
        ([CP | {"categories": ["1", "1.0"]}], {}, "features[0].categories must all differ; 1 and 1.0 mean the same"),
        ([CP | {"categories": ["1e5", "100000"]}], {}, "features[0].categories must all differ; 1e5 and 100000 mean"),
        ([CP | {"categories": [1, "01"]}], {}, "features[0].categories must all differ; 1 and 01 mean the same"),
        ([CP | {"categories": [True, 1]}], {}, "features[0].categories must all differ; true and 1 mean the same"),
        ([CP | {"categories": ["True", "true"]}], {}, "features[0].categories must all differ; True and true mean"),
        ([CP | {"categories": []}], {}, "features[0].categories must have 1 or more entries"),
        (
            [AGE],
            {"target": SICK | {"classes": {"a": [0], "b": [0.0]}}},
            "target.classes.b shares the value 0.0 with cl",
        ),
        ([AGE], {"target": SICK | {"classes": {"a": [0], "b": []}}}, "target.classes.b needs at least one value"),
        ([AGE], {"target": SICK | {"classes": [0, 0, 1]}}, "target.classes must all differ (got [0, 0, 1])"),
        ([AGE], {"target": COST | {"bounds": [1, 0]}}, "target.bounds must rise"),
        ([AGE], {"columns": ["age", "age", "sick"]}, "columns must all differ"),
        ([AGE], {"columns": ["sick"]}, "columns lacks age"),
        ([AGE], {"validation_fraction": 1}, "validation_fraction must be less than 1 (got 1)"),
    ],
)
def test_a_schema_that_contradicts_itself_is_refused(features, more, expected):
    contents: dict[str, Any] = {"features": features, "target": SICK, **more}
    with pytest.raises(documents.Mistakes, match="^" + re.escape(expected)):
        documents.validate(contents, Schema)


def test_rows_that_do_not_fit_are_left_out_where_that_is_asked():
    frame = pl.DataFrame({"age": ["60", "old", "40", "50"], "sick": ["0", "1", "9", "1"]})
    encoded = encode(frame, schema(AGE), first_line=2, leave_out=True)
    assert encoded.kept.tolist() == [0, 3]
    assert_array_equal(encoded.x, encode(frame[[0, 3]], schema(AGE)).x)
    assert_array_equal(encoded.y, [0, 1])
    assert encoded.report.left_out == 2
    assert encoded.report.unfit[0] == "line 3: age: expected a number, found 'old'"
    assert encoded.report.lines()[0].startswith("left out: 2 rows that do not fit the schema: line 3: age")


def test_what_is_kept_of_a_row_does_not_depend_on_the_others():
    frame = pl.DataFrame({"age": ["60", "old", "40", "50"], "sick": ["0", "1", "9", "1"]})
    for some in ([0], [1], [1, 2], [2, 3], []):
        encoded = encode(frame[some], schema(AGE), leave_out=True)
        assert [some[i] for i in encoded.kept] == [i for i in some if i in (0, 3)]


def groups_of(declared: dict[str, Any], cells: list[Any], *features: dict[str, Any]) -> list[int]:
    """The group of each row by a column of these cells, which is a feature if one is given by its name."""
    frame = {declared["name"]: cells, "sick": [i % 2 for i in range(len(cells))]}
    frame |= {"other": [0] * len(cells)}
    other = {"name": "other", "type": "numeric", "bounds": [0, 1]}
    encoded = encode(pl.DataFrame(frame, strict=False), schema(other, *features, group=declared))
    assert encoded.group is not None and encoded.group.dtype == np.int64
    return encoded.group.tolist()


def test_a_row_is_in_the_group_that_its_cell_means_or_in_the_last():
    sex = {"name": "sex", "groups": {"women": [0, "f"], "men": [1, "m"]}}
    assert groups_of(sex, ["0", "m", "1.0", "f", "", "x", None, "F"]) == [0, 1, 1, 0, 2, 2, 2, 2]
    assert groups_of({"name": "sex", "groups": ["f", "m"]}, ["m", "f", "?"]) == [1, 0, 2]


def test_numbers_are_in_groups_by_where_they_are_cut():
    cells = [-1, 39.9, 40, 60.4, 60.5, 1e9, None, "x", "inf"]
    assert groups_of({"name": "years", "cuts": [40, 60.5]}, cells) == [0, 0, 1, 1, 2, 2, 3, 3, 3]


def test_groups_between_numbers_that_are_almost_equal_have_names_of_their_own():
    group = schema(AGE, group={"name": "years", "cuts": [1000000.25, 1000000.5, 2e9]}).group
    assert group is not None and len(set(group.labels)) == 5 and group.labels[2] == "1000000.5 to below 2000000000"


def test_what_a_feature_calls_missing_is_in_no_group_unless_it_is_listed():
    assert groups_of({"name": "chol", "cuts": [5]}, ["0", "?", "", "4", "6"], CHOL) == [2, 2, 2, 0, 1]
    listed = {"name": "chol", "groups": {"none": [0], "some": ["?"]}}
    assert groups_of(listed, ["0", "?", "", "4"], CHOL) == [0, 1, 2, 2]


def test_the_column_of_groups_must_be_there_unless_it_is_an_optional_feature():
    frame = pl.DataFrame({"age": [30], "sick": [0]})
    with pytest.raises(DataError, match="the table lacks sex"):
        encode(frame, schema(AGE, group={"name": "sex", "groups": ["f", "m"]}))
    optional = {"name": "sex", "type": "categorical", "categories": ["f", "m"], "optional": True}
    encoded = encode(frame, schema(AGE, optional, group={"name": "sex", "groups": ["f", "m"]}))
    assert encoded.group is not None and encoded.group.tolist() == [2]


def test_groups_of_rows_that_are_left_out_are_left_out_too():
    frame = pl.DataFrame({"age": ["30", "x", "50"], "sick": [0, 1, 1], "sex": ["f", "f", "m"]})
    encoded = encode(frame, schema(AGE, group={"name": "sex", "groups": ["f", "m"]}), leave_out=True)
    assert encoded.group is not None and encoded.group.tolist() == [0, 1]


def test_a_group_of_which_no_value_can_be_in_a_typed_column_is_found():
    frame = pl.DataFrame({"age": [30], "sick": [0], "sex": [1]})
    with pytest.raises(DataError, match=r"column sex holds Int64, so no value of group women can be in it \(.*f\)"):
        check_values(tables.of_frame(frame), schema(AGE, group={"name": "sex", "groups": {"women": ["f"], "men": [1]}}))


@pytest.mark.parametrize(
    "group, said",
    [
        ({"name": "sex"}, r"group.groups or cuts: give exactly one"),
        ({"name": "sex", "groups": ["f"], "cuts": [1]}, r"group.groups or cuts: give exactly one"),
        ({"name": "sex", "groups": []}, r"group.groups"),
        ({"name": "sex", "groups": ["f", "f"]}, r"group.groups must all differ"),
        ({"name": "sex", "groups": {"f": []}}, r"group.groups.f needs at least one value"),
        ({"name": "sex", "groups": {"f": [1], "m": ["1"]}}, r"group.groups.m shares the value 1 with group f"),
        ({"name": "sex", "groups": ["(other)"]}, r"is what rows are called that are in none of the groups"),
        ({"name": "age", "cuts": [60, 40]}, r"group.cuts must be rising numbers \(got \[60.0, 40.0\]\)"),
        ({"name": "age", "cuts": list(range(50))}, r"group.cuts make more than 50 groups"),
        ({"name": "sick", "groups": [0, 1]}, r"group.name is a target \(got sick\)"),
    ],
)
def test_groups_that_make_no_sense_are_refused(group, said):
    with pytest.raises(documents.Mistakes, match=said):
        schema(AGE, group=group)


def test_groups_need_rows_to_evaluate_on_and_a_place_in_a_table_without_a_header():
    group = {"name": "sex", "groups": ["f", "m"]}
    with pytest.raises(documents.Mistakes, match="group is for evaluations, and validation_fraction is 0"):
        schema(AGE, group=group, validation_fraction=0.0)
    with pytest.raises(documents.Mistakes, match="columns lacks sex"):
        schema(AGE, group=group, columns=["age", "sick"])
    assert schema(AGE, group=group).names == ("age", "sick", "sex")
    assert schema(AGE, group={"name": "age", "cuts": [50]}).names == ("age", "sick")
    assert schema(AGE).model_dump_json() == schema(AGE, group=None).model_dump_json()
    assert "group" not in schema(AGE).model_dump_json()


KIND = {"name": "kind", "classes": {"p": [1], "q": [2, "q"]}, "missing": ["?"], "optional": True}
SIZE = {"name": "size", "bounds": [0, 10], "missing": [-9]}


def test_several_targets_stand_side_by_side_and_what_a_row_lacks_is_nan():
    frame = pl.DataFrame(
        {
            "age": [30] * 5,
            "sick": [0, 1, 2, 0, 1],
            "kind": ["1", "q", "?", "", "2"],
            "size": ["5", "-9", "20", "0", "-9.0"],
        }
    )
    encoded = encode(frame, schema(AGE, also=[KIND, SIZE]))
    nan = math.nan
    assert encoded.y.dtype == np.float32
    assert_array_equal(encoded.y, [[0, 0, 0.5], [1, 1, nan], [1, nan, 1], [0, nan, 0], [1, 1, nan]])
    assert encoded.report.missing == {"kind": 2, "size": 2} and encoded.report.classes == {"no": 2, "yes": 3}


def test_an_optional_target_beside_others_may_be_absent_as_a_column():
    frame = pl.DataFrame({"age": [30, 40], "sick": [0, 1], "size": [5, 10]})
    encoded = encode(frame, schema(AGE, also=[KIND, SIZE]))
    assert_array_equal(encoded.y, [[0, math.nan, 0.5], [1, math.nan, 1]])
    with pytest.raises(DataError, match="the table lacks size"):
        encode(frame.drop("size"), schema(AGE, also=[KIND, SIZE]))


@pytest.mark.parametrize(
    "column, cell, message",
    [
        ("size", "", "size: the target is empty|size: expected a number"),
        ("size", "large", "size: expected a number, found 'large'"),
        ("kind", "z", "kind: unknown class 'z'; the schema knows 1, 2, q"),
        ("sick", "", "sick: the target is empty"),
    ],
)
def test_a_cell_of_any_target_that_does_not_fit_is_told(column, cell, message):
    strict = {**SIZE, "missing": []}
    row = {"age": "30", "sick": "0", "kind": "1", "size": "5"} | {column: cell}
    with pytest.raises(DataError, match=message):
        encode(pl.DataFrame([row]), schema(AGE, also=[KIND, strict]))


def test_a_row_that_lacks_its_only_target_is_left_out_where_it_may():
    frame = pl.DataFrame({"age": [30, 40, 50], "kind": ["1", "?", "q"]})
    encoded = encode(frame, schema(AGE, target=KIND))
    assert encoded.y.tolist() == [0, 1] and encoded.kept.tolist() == [0, 2]
    assert encoded.report.missing == {"kind": 1}
    number = encode(pl.DataFrame({"age": [30, 40], "size": ["-9", "5"]}), schema(AGE, target=SIZE))
    assert number.y.tolist() == [0.5] and number.kept.tolist() == [1]


def test_targets_and_groups_that_no_row_has_are_warned_of():
    frame = pl.DataFrame({"age": [30] * 4, "sick": [0, 1, 0, 1], "size": ["-9"] * 4, "sex": [7, 7, 7, 1]})
    place = schema(AGE, also=[KIND, SIZE], group={"name": "sex", "groups": [0, 1]})
    said = encode(frame, place).report.lines()
    assert "warning: target kind: no row has one, so its head will learn nothing here" in said
    assert "warning: target size: no row has one, so its head will learn nothing here" in said
    assert any("3 of 4 rows are in none of the groups of schema.group" in line for line in said)
    assert "column kind is absent; it is optional and counts as missing" in said
    few = encode(frame.with_columns(sex=pl.Series([0, 1, 1, 7]), size=pl.Series(["1", "2", "-9", "4"])), place)
    assert "rows in none of the groups: 1" in few.report.lines()
    assert not any("size: no row" in line for line in few.report.lines())
