"""One table means one thing, however it is spelled; and tables that others made are encoded as numpy reads them."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from numpy.testing import assert_array_equal

from common.data import drafting, tables
from common.data.encoding import encode_table
from common.data.tables import FileFormat
from common.document import documents
from common.document.schema import Schema
from common.errors import DataError

ROWS = 12
A = [0.5, -1.25, 3.0, None, 1234.5, -0.001, 7.0, 0.0, 2.5, None, 100.0, -99.75]  # a measurement, sometimes missing
N = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]  # a count
S = [True, False, False, True, True, True, False, False, True, False, True, False]  # yes or no
C = ["red", "green", None, "red", "blue", "pale blue", "green", "red", None, "green", "red", "blue"]  # a colour
K = [1, 2, 1, 2, 3, 3, 1, 2, 9, 1, 2, 3]  # a code; 9 is none that is known
Y = [0, 1, 1, 0, 1, 0, 1, 1, 0, 0, 1, 0]
FEATURES: list[dict[str, Any]] = [
    {"name": "a", "type": "numeric", "bounds": [-100, 2000], "missing": ["?", -999]},
    {"name": "n", "type": "numeric", "bounds": [0, 10]},
    {"name": "s", "type": "categorical", "categories": [True, False]},
    {"name": "c", "type": "categorical", "categories": ["red", "green", "pale blue"], "missing": [""]},
    {"name": "k", "type": "categorical", "categories": ["1", 2, "3"]},
]
COLUMNS = ["a", "n", "s", "c", "k", "y"]


def schema(**more: Any) -> Schema:
    return documents.validate({"features": FEATURES, "target": {"name": "y", "classes": [0, 1]}, **more}, Schema)


def expected() -> np.ndarray[Any, np.dtype[np.float32]]:
    """The inputs, worked out from the lists above."""
    rows = []
    for a, n, s, c, k in zip(A, N, S, C, K, strict=True):
        number = [0.0, 1.0] if a is None else [2 * ((a + 100) / 2100) - 1, 0.0]
        count = [2 * (min(n, 10) / 10) - 1]
        truth = [float(s), float(not s), 0.0]
        colour = [float(c == name) for name in ("red", "green", "pale blue")] + [float(c == "blue")]
        code = [float(k == value) for value in (1, 2, 3)] + [float(k == 9)]
        rows.append(number + count + truth + colour + code)
    return np.array(rows, np.float32)


Spelling = Callable[[Any], str]


def plain(value: Any) -> str:
    return "" if value is None else str(value)


def text(
    separator: str = ",",
    *,
    end: str = "\n",
    header: bool = True,
    number: Spelling = plain,
    count: Spelling = plain,
    truth: Spelling = plain,
    colour: Spelling = plain,
    code: Spelling = plain,
    cell: Spelling = str,
    order: list[str] = COLUMNS,
) -> str:
    """The table as CSV, each kind of cell in a spelling."""
    how = {"a": number, "n": count, "s": truth, "c": colour, "k": code, "y": count}
    columns = dict(zip(COLUMNS, (A, N, S, C, K, Y), strict=True))
    lines = [order] if header else []
    lines += [[how[name](columns[name][row]) for name in order] for row in range(ROWS)]
    return "".join(separator.join(map(cell, line)) + end for line in lines)


def comma(value: Any) -> str:
    return plain(value).replace(".", ",")


def grouped(value: Any) -> str:
    return "" if value is None else f"{value:,}".replace(",", "_").replace(".", ",").replace("_", ".")


def instead(nothing: str) -> Spelling:
    return lambda value: nothing if value is None else str(value)


SPELLINGS: dict[str, str | bytes] = {
    "commas": text(),
    "semicolons": text(";"),
    "tabs": text("\t"),
    "pipes": text("|"),
    "carriage return and line feed": text(end="\r\n"),
    "carriage returns": text(end="\r"),
    "no last line end": text().rstrip("\n"),
    "UTF-8 with its mark": b"\xef\xbb\xbf" + text().encode(),
    "UTF-16 with its mark": text("\t").encode("utf-16"),
    "UTF-16, high byte first": b"\xfe\xff" + text(";").encode("utf-16-be"),
    "quotes around all": text(cell=lambda value: f'"{value}"'),
    "blanks around all": text(cell=lambda value: f" {value}  "),
    "blanks before quotes": text(cell=lambda value: f' "{value}"'),
    "a first line that names the separator": "sep=;\r\n" + text(";", end="\r\n"),
    "blank lines": "\n\n" + text().replace("\n", "\n\n"),
    "empty columns and rows at the end": text(";", end=";;;\n") + ";" * 8 + "\n" + ";" * 8 + "\n\n",
    "empty columns for some rows only": text(";", end=";;;\n").replace("\n2.5;9;True;;9;9;;;", "\n2.5;9;True;;9;9"),
    "no header": text(header=False),
    "no header, semicolons": text(";", header=False),
    "columns in another order": text(order=["y", "k", "c", "s", "n", "a"]),
    "decimal commas": text(";", number=comma),
    "decimal commas and points between digits": text(";", number=grouped),
    "decimal commas in UTF-16": text(";", number=comma, end="\r\n").encode("utf-16"),
    "numbers with exponents": text(number=lambda v: "" if v is None else f"{v:.10E}", count=lambda v: f"{v:e}"),
    "numbers with signs and zeros": text(
        number=lambda v: "" if v is None else f"{v:+09.4f}", count=lambda v: f"{v:.3f}"
    ),
    "whole numbers as 1.0": text(count=lambda v: f"{v}.0", code=lambda v: f"{v}.0"),
    "digits in groups": text(number=lambda v: "" if v is None else f'"{v:,}"'),
    "TRUE and FALSE": text(truth=lambda v: str(v).upper()),
    "true and false": text(truth=lambda v: str(v).lower()),
    "1 and 0": text(truth=lambda v: str(int(v))),
    "1.0 and 0.0": text(truth=lambda v: str(float(v))),
    "nan for nothing": text(number=instead("nan"), colour=instead("nan")),
    "NaN for nothing": text(number=instead("NaN"), colour=instead("NaN")),
    "a marker for nothing": text(number=instead("?")),
    "another marker for nothing": text(number=instead("-999.0")),
    "columns that nobody asked for": "\n".join(
        f"{line},{'note,note,,5' if i == 0 else f'5{chr(34)} pipe {i},,{i},'}"
        for i, line in enumerate(text().splitlines())
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_in_csv_encodes_to_the_same_bits(tmp_path, name):
    content = SPELLINGS[name]
    (tmp_path / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    place = schema(columns=COLUMNS) if name.startswith("no header") else schema()
    encoded = encode_table(tables.read(tmp_path / "t.csv", place), place)
    assert_array_equal(encoded.x, expected(), strict=True)
    assert_array_equal(encoded.y, Y)
    assert (encoded.report.missing, encoded.report.other) == ({"a": 2, "c": 2}, {"c": 2, "k": 1})
    assert (encoded.report.clamped, encoded.report.left_out) == ({"n": 2}, 0)


@pytest.mark.parametrize(
    "form, content",
    [
        (
            FileFormat(encoding="windows-1252"),
            text(";").replace("y\n", "größe;y\n", 1).replace(";0\n", ";é;0\n").replace(";1\n", ";é;1\n"),
        ),
        (FileFormat(encoding="utf-16-le"), text(";")),
        (FileFormat(decimal=","), text(";", number=comma)),
        (FileFormat(decimal=","), text("\t", number=grouped)),
        (FileFormat(decimal="."), text(";", number=lambda v: "" if v is None else f"{v:,}")),
    ],
    ids=["windows-1252", "utf-16", "comma", "comma and groups", "point and groups beside semicolons"],
)
def test_every_declared_spelling_encodes_to_the_same_bits(tmp_path, form, content):
    (tmp_path / "t.csv").write_bytes(content.encode(form.encoding or "utf-8"))
    encoded = encode_table(tables.read(tmp_path / "t.csv", schema(), form), schema())
    assert_array_equal(encoded.x, expected(), strict=True)
    assert_array_equal(encoded.y, Y)


FRAME = pl.DataFrame(dict(zip(COLUMNS, (A, N, S, C, K, Y), strict=True)))
TYPED: dict[str, pl.DataFrame] = {
    "as it is": FRAME,
    "text": FRAME.with_columns(pl.col("s").cast(pl.Int8)).cast(pl.String),
    "text with blanks": FRAME.cast(pl.String).with_columns(pl.all() + "  "),
    "NaN for nothing": FRAME.with_columns(pl.col("a").fill_null(float("nan"))),
    "small types": FRAME.with_columns(pl.col("n", "k", "y").cast(pl.Int8)),
    "unsigned": FRAME.with_columns(pl.col("n", "k", "y").cast(pl.UInt64)),
    "all numbers as floats": FRAME.with_columns(pl.col("n", "k", "y", "s").cast(pl.Float64)),
    "floats of 32 bits": FRAME.with_columns(pl.col("a").cast(pl.Float32)),
    "decimals": FRAME.with_columns(pl.col("a").cast(pl.Decimal(12, 3))),
    "truth values as 0 and 1": FRAME.with_columns(pl.col("s").cast(pl.Int64)),
    "truth values as target": FRAME.with_columns(pl.col("y").cast(pl.Boolean)),
    "categories": FRAME.with_columns(pl.col("c").cast(pl.Categorical)),
    "an enumeration": FRAME.with_columns(pl.col("c").cast(pl.Enum(["blue", "green", "pale blue", "red"]))),
    "columns of other types that nobody asked for": FRAME.with_columns(
        stay=pl.duration(days=pl.col("n")),
        codes=pl.concat_list("n", "k"),
        raw=pl.lit(b"\xff"),
        when=pl.date(2026, 1, "n"),
    ),
}


@pytest.mark.parametrize("name", TYPED)
def test_every_typed_table_encodes_to_the_same_bits(tmp_path, name):
    TYPED[name].write_parquet(tmp_path / "t.parquet")
    encoded = encode_table(tables.read(tmp_path / "t.parquet", schema()), schema())
    assert_array_equal(encoded.x, expected(), strict=True)
    assert_array_equal(encoded.y, Y)
    assert (encoded.report.missing, encoded.report.other) == ({"a": 2, "c": 2}, {"c": 2, "k": 1})


# Tables that others made: what scikit-learn brings, read by numpy as well.

DATA = files("sklearn.datasets.data")


def made_by_others(name: str) -> tuple[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """A table's text under a header of our own, and its numbers by numpy."""
    raw = DATA.joinpath(name).read_bytes()
    lines = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode().splitlines()
    first = 0 if name.endswith(".gz") else 1  # the others begin with a line of their own
    separator = "," if "," in lines[first] else " "
    numbers = np.loadtxt(lines[first:], delimiter="," if separator == "," else None, ndmin=2)
    header = separator.join(f"f{i}" for i in range(numbers.shape[1]))
    return "\n".join([header, *lines[first:], ""]), numbers


@pytest.mark.parametrize(
    "name",
    [
        "breast_cancer.csv",
        "iris.csv",
        "wine_data.csv",
        "linnerud_exercise.csv",
        "linnerud_physiological.csv",
        "digits.csv.gz",
        "diabetes_data_raw.csv.gz",
    ],
)
def test_a_table_of_others_is_drafted_and_encoded_as_numpy_reads_it(tmp_path, name):
    content, numbers = made_by_others(name)
    (tmp_path / "t.csv").write_text(content)
    target = f"f{numbers.shape[1] - 1}"
    draft = yaml.safe_load(drafting.draft(tmp_path / "t.csv", target=target))["schema"]
    place = documents.validate(draft, Schema)
    encoded = encode_table(tables.read(tmp_path / "t.csv", place), place)
    assert (encoded.report.rows, encoded.report.left_out, encoded.report.clamped) == (len(numbers), 0, {})
    at = 0
    for feature in draft["features"]:
        column = numbers[:, int(feature["name"][1:])]
        if feature["type"] == "numeric":
            low, high = feature["bounds"]
            assert low <= column.min() and column.max() <= high
            assert_array_equal(encoded.x[:, at], (2 * ((column - low) / (high - low)) - 1).astype(np.float32))
            at += 1
        else:
            for i, category in enumerate(feature["categories"]):
                assert_array_equal(encoded.x[:, at + i], column == category)
            at += len(feature["categories"]) + 1
    assert at == encoded.x.shape[1]


@pytest.mark.parametrize("name", ["iris.csv", "wine_data.csv", "breast_cancer.csv"])
def test_a_first_line_that_is_neither_names_nor_a_row_is_told(tmp_path, name):
    (tmp_path / "t.csv").write_bytes(DATA.joinpath(name).read_bytes())
    width = len((tmp_path / "t.csv").read_text().splitlines()[1].split(","))
    columns = [f"f{i}" for i in range(width)]
    features = [{"name": column, "type": "numeric", "bounds": [0, 5000]} for column in columns[:-1]]
    place = documents.validate(
        {"features": features, "target": {"name": columns[-1], "classes": [0, 1, 2]}, "columns": columns}, Schema
    )
    wrong = "line 1: f2: expected a number, found 'setosa'" if name == "iris.csv" else "the first line neither names f0"
    with pytest.raises(DataError, match=rf"^t\.csv: (.|\n)*{wrong}"):
        encode_table(tables.read(tmp_path / "t.csv", place), place)
