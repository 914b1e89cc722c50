from __future__ import annotations

import hashlib
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client import data
from client.account.entries import deal
from client.data import Dataset, Rows
from common.data import text_files
from common.document.schema import Schema
from common.errors import DataError
from tests.support import federation, table

CPU = torch.device("cpu")
KEY = b"the owner's secret"
NAMED = table(120).with_columns(row=pl.int_range(120))  # a column of its own tells the rows apart


def schema(fraction: float = 0.25) -> Schema:
    return federation(schema__validation_fraction=fraction).data_schema


def encoded(frame: pl.DataFrame, *, key: bytes = KEY) -> Rows:
    return data.encode_rows(frame, schema(), key=key)


def split(frame: pl.DataFrame, *, key: bytes = KEY, fraction: float = 0.25) -> Dataset:
    return data.split(encoded(frame, key=key), schema(fraction), key=key, device=CPU)


def rows_of(x: torch.Tensor, y: torch.Tensor) -> list[tuple[float, ...]]:
    return sorted((*row.tolist(), float(target)) for row, target in zip(x, y, strict=True))


def parts(frame: pl.DataFrame, **how: Any) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    dataset = split(frame, **how)
    return rows_of(dataset.x, dataset.y), rows_of(dataset.validation_x, dataset.validation_y)


def test_every_row_is_in_exactly_one_part():
    whole = encoded(NAMED)
    train, validation = parts(NAMED)
    assert train and validation
    assert sorted(train + validation) == rows_of(torch.from_numpy(whole.x), torch.from_numpy(whole.y))


@given(st.permutations(range(120)))
def test_the_order_of_rows_moves_none_of_them(order):
    assert parts(NAMED[list(order)]) == parts(NAMED)


@given(st.sets(st.integers(0, 119), min_size=20, max_size=119))
def test_removing_or_adding_rows_moves_none_of_the_others(kept):
    # Read backwards, the rows that are not kept are added.
    few, all_of_them = parts(NAMED[sorted(kept)]), parts(NAMED)
    for some, every in zip(few, all_of_them, strict=True):
        assert set(some) <= set(every)
    assert sum(map(len, few)) == len(kept)


@given(st.integers(0, 119))
def test_removing_one_row_changes_one_part_by_that_row(gone):
    with_it, without = parts(NAMED), parts(NAMED.filter(pl.col("row") != gone))
    sizes = sorted(len(a) - len(b) for a, b in zip(with_it, without, strict=True))
    assert sizes == [0, 1]


def test_equal_rows_are_dealt_one_by_one():
    rows = pl.DataFrame({"a": [0.5], "b": [0.0], "c": ["red"], "y": [1]})
    dataset = split(pl.concat([rows] * 4000))
    assert abs(len(dataset.validation_y) / 4000 - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5


FEW = st.lists(st.sampled_from(["red", "green", "blue"]), min_size=1, max_size=40)


@given(cells=FEW, more=st.sampled_from(["red", "green", "blue"]), at=st.integers(0, 40))
def test_one_row_more_changes_one_part_by_that_row_and_moves_no_copy_of_any(cells, more, at):
    def both(cells: list[str]) -> list[Counter[tuple[float, ...]]]:
        frame = pl.DataFrame({"a": 0.0, "b": 0.0, "c": cells, "y": 1})
        dataset = data.split(encoded(frame), schema(0.5), key=KEY, device=CPU)
        return [Counter(map(tuple, part.tolist())) for part in (dataset.x, dataset.validation_x)]

    before, after = both(cells), both([*cells[:at], more, *cells[at:]])
    grown = [new - old for old, new in zip(before, after, strict=True)]
    assert sorted(part.total() for part in grown) == [0, 1]
    assert [old - new for old, new in zip(before, after, strict=True)] == [Counter(), Counter()]


def test_the_training_part_may_take_the_memory_of_the_whole(monkeypatch):
    monkeypatch.setattr(data, "MOVED_ROWS", 7)
    kept, used = encoded(NAMED), encoded(NAMED)
    plain = data.split(kept, schema(), key=KEY, device=CPU)
    moved = data.split(used, schema(), key=KEY, device=CPU, use_up=True)
    for field in ("x", "y", "validation_x", "validation_y"):
        assert torch.equal(getattr(plain, field), getattr(moved, field))
    assert np.array_equal(plain.ids, moved.ids) and (plain.content, plain.split) == (moved.content, moved.split)
    assert np.shares_memory(used.x, moved.x.numpy())
    assert not np.shares_memory(kept.x, plain.x.numpy())


def test_another_key_deals_the_rows_in_another_way():
    # Two keys agree on a row with probability 0.25^2 + 0.75^2 = 0.625.
    mine, other = split(NAMED, key=b"a"), split(NAMED, key=b"b")
    assert rows_of(mine.x, mine.y) != rows_of(other.x, other.y)
    a, b = ({tuple(row) for row in part.validation_x.tolist()} for part in (mine, other))
    assert 0.45 < 1 - len(a ^ b) / 120 < 0.8


@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.9])
def test_the_validation_part_has_about_its_fraction(fraction):
    frame = table(4000)
    share = len(split(frame, fraction=fraction).validation_y) / 4000
    assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / 4000) ** 0.5


def test_a_fraction_of_0_trains_on_all_rows():
    dataset = split(NAMED, fraction=0.0)
    assert (len(dataset.y), len(dataset.validation_y)) == (120, 0)
    assert dataset.validation_x.shape == (0, dataset.x.shape[1])


def test_features_stay_with_their_targets_and_on_the_device_as_declared():
    dataset = split(NAMED)
    assert (dataset.x.dtype, dataset.y.dtype) == (torch.float32, torch.int64)
    assert dataset.x.device == dataset.validation_y.device == CPU
    target = {tuple(row): int(y) for row, y in zip(encoded(NAMED).x.tolist(), NAMED["y"], strict=True)}
    assert all(target[tuple(row)] == y for row, y in zip(dataset.x.tolist(), dataset.y.tolist(), strict=True))


# Fingerprints


def test_groups_stay_with_their_rows():
    place = federation(schema__group={"name": "a", "cuts": [0]}, schema__validation_fraction=0.25).data_schema
    rows = data.encode_rows(table(400), place, key=KEY)
    for use_up in (False, True):  # which may change the arrays of `rows`
        dataset = data.split(rows.take(np.arange(400)), place, key=KEY, device=CPU, use_up=use_up)
        assert dataset.validation_group is not None
        assert torch.equal(dataset.validation_group, (dataset.validation_x[:, 0] >= 0).long())
    some = rows.take(np.array([5, 3]))
    assert some.group is not None and rows.group is not None and list(some.group) == list(rows.group[[5, 3]])


def change(cell: Any) -> pl.DataFrame:
    return NAMED.with_columns(c=pl.when(pl.col("row") == 60).then(pl.lit(cell)).otherwise(pl.col("c")))


OTHER_CELL = change("blue")
SAME = {"of the same table": NAMED.clone(), "of cells with other spaces": NAMED.with_columns(c=pl.col("c") + "  ")}


@pytest.mark.parametrize("same", SAME.values(), ids=SAME)
def test_both_fingerprints_stay(same):
    before, after = split(NAMED), split(same)
    assert (before.content, before.split) == (after.content, after.split)


@pytest.mark.parametrize(
    "changed",
    [OTHER_CELL, NAMED[:-1], pl.concat([NAMED, NAMED[:1]]), NAMED[::-1]],
    ids=["cell", "less", "more", "order"],
)
def test_another_cell_row_or_order_changes_the_content_and_not_the_split(changed):
    before, after = split(NAMED), split(changed)
    assert before.content != after.content
    assert before.split == after.split


@pytest.mark.parametrize(
    "other",
    [
        lambda: split(NAMED, fraction=0.2),
        lambda: split(NAMED, key=b"another"),
        lambda: split(NAMED.drop("row")),
        lambda: split(NAMED.rename({"row": "number"})),
        lambda: split(NAMED.select(NAMED.columns[::-1])),
        lambda: split(NAMED.with_columns(pl.col("y").cast(pl.Float64))),
    ],
    ids=["fraction", "key", "column gone", "column renamed", "columns in another order", "1 became 1.0"],
)
def test_whatever_could_deal_a_row_to_the_other_part_changes_the_split(other):
    assert split(NAMED).split != other().split


# Rows dealt by whom they are about


VISITS = NAMED.with_columns(patient=pl.int_range(120) // 3, name=pl.format("n{}", pl.int_range(120)))


def by_patient(frame: pl.DataFrame, *, fraction: float = 0.25) -> tuple[Dataset, set[int], set[int]]:
    """The dataset, and the patients of its two parts."""
    rows = data.encode_rows(frame, schema(fraction), key=KEY, person="patient")
    dataset = data.split(rows, schema(fraction), key=KEY, device=CPU)
    people = dict(zip(map(tuple, rows.x.tolist()), frame["patient"].to_list(), strict=True))
    train, validation = ({people[tuple(x)] for x in part.tolist()} for part in (dataset.x, dataset.validation_x))
    return dataset, train, validation


def test_all_rows_of_one_person_are_in_one_part():
    _, train, validation = by_patient(VISITS)
    assert train | validation == set(range(40))
    assert train & validation == set()
    assert min(len(train), len(validation)) > 2


def test_a_person_stays_where_it_is_whatever_becomes_of_its_cells_and_of_the_table():
    before, *where = by_patient(VISITS)
    others = VISITS.with_columns(a=-pl.col("a"), c=pl.lit("red"))[::-1][5:].with_columns(note=pl.lit("new"))
    after, *then = by_patient(others)
    assert all(now <= earlier for now, earlier in zip(then, where, strict=True))
    assert (before.split, before.content) != (after.split, after.content)
    assert deal(before.split, before.content) == deal(after.split, after.content)


@pytest.mark.parametrize(
    "other",
    [
        lambda: by_patient(VISITS, fraction=0.2)[0],
        lambda: split(VISITS),  # by cells
        # A document may name the columns of a file without a header: another one is called patient then.
        lambda: by_patient(VISITS.rename({"patient": "row", "row": "patient"}))[0],
        lambda: by_patient(VISITS.with_columns(pl.col("patient").cast(pl.Float64)))[0],  # 1 became 1.0
    ],
    ids=["fraction", "by cells", "another column", "another type"],
)
def test_whatever_could_deal_a_person_to_the_other_part_is_another_deal(other):
    here, there = by_patient(VISITS)[0], other()
    assert deal(here.split, here.content) != deal(there.split, there.content)


def test_a_row_that_names_nobody_is_told_to_the_owner_and_dealt_with_the_others_like_it():
    frame = VISITS.with_columns(patient=pl.when(pl.int_range(120) % 4 == 0).then(None).otherwise(pl.col("patient")))
    rows = data.encode_rows(frame, schema(), key=KEY, person="patient")
    assert rows.people is not None
    assert len(set(rows.people[::4].tolist())) == 1
    assert "rows whose data.id is empty: 30; they are dealt as one person's" in rows.report.lines()


def test_rows_that_name_nobody_are_counted_over_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "PIECE", 100)
    VISITS.with_columns(patient=pl.when(pl.int_range(120) % 4 == 0).then(None).otherwise("patient")).write_csv(
        tmp_path / "t.csv"
    )
    rows = data.read(tmp_path / "t.csv", schema(), key=KEY, person="patient")
    assert rows.report.nobody == 30


def test_a_split_is_another_than_that_of_an_older_rule():
    # Then rows were dealt by their digests alone, and equal ones together: both parts' costs are added from there on.
    columns = [f"{name} {dtype}" for name, dtype in NAMED.schema.items()]
    older = "\x1f".join([hashlib.sha256(KEY).hexdigest(), "0.25", *columns])
    assert split(NAMED).split != hashlib.sha256(older.encode()).hexdigest()[:16]


def test_a_table_without_the_column_that_names_people_is_refused():
    with pytest.raises(
        DataError, match=r"the table lacks the column patient, which data\.id names; it has a, b, c, y, row$"
    ):
        data.encode_rows(NAMED, schema(), key=KEY, person="patient")


def test_the_content_says_nothing_to_who_lacks_the_key():
    # A plain hash of a small table could be guessed row by row.
    assert split(NAMED, key=b"a").content != split(NAMED, key=b"b").content


# Files


def test_a_file_and_a_frame_with_its_cells_are_the_same_rows(tmp_path: Path):
    path = tmp_path / "t.csv"
    NAMED.write_csv(path)
    from_file = data.read(path, schema(), key=KEY)
    as_text = encoded(NAMED.cast(pl.String))
    assert np.array_equal(from_file.x, as_text.x)
    assert np.array_equal(from_file.y, as_text.y)
    assert np.array_equal(from_file.digests, as_text.digests)


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere\.csv: no such file"):
        data.read(tmp_path / "nowhere.csv", schema(), key=KEY)


@pytest.mark.parametrize(
    "cells", [[[1, 2]] * 120, [b"\xff"] * 120, [timedelta(1)] * 120], ids=["lists", "bytes", "durations"]
)
def test_a_column_that_holds_no_cells_deals_no_row(cells):
    odd = encoded(NAMED.with_columns(odd=pl.Series(cells)))
    assert np.array_equal(odd.digests, encoded(NAMED).digests)


def test_taking_rows_keeps_cells_targets_and_digests_together():
    rows = encoded(NAMED)
    some = rows.take(np.array([5, 3, 119]))
    assert np.array_equal(some.x, rows.x[[5, 3, 119]])
    assert some.y.tolist() == [rows.y[5], rows.y[3], rows.y[119]]
    assert some.digests.tolist() == [rows.digests[5], rows.digests[3], rows.digests[119]]
    assert some.columns == rows.columns
    people = data.encode_rows(VISITS, schema(), key=KEY, person="patient").take(np.array([5, 3, 119])).people
    assert people is not None
    assert people[0] == people[1] != people[2] and len(people) == 3
