"""Hashes of many rows at once are those of each row by itself, worked out block by block."""

from __future__ import annotations

import hashlib
import struct
from datetime import date, datetime, time
from functools import reduce
from typing import Any

import numpy as np
import polars as pl
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from client import row_hash
from client.row_hash import RowHash, positions
from common.data.cells import tidy

KEY = b"an owner's key"


def aes(key: bytes, block: bytes) -> int:
    return int.from_bytes(Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(block), "little")


def blocks(column: int, value: Any) -> list[bytes]:
    """The blocks of a cell, by the words of the module."""

    def block(data: bytes, place: int, goes_on: int) -> bytes:
        return data.ljust(8, b"\0") + struct.pack("<Q", column << 40 | place << 8 | goes_on)

    if value is None or value == "" or value != value:
        return [block(b"", 0, 0)]
    if isinstance(value, float):
        return [block(struct.pack("<d", value + 0.0), 0, 16)]
    if isinstance(value, int):
        return [block(struct.pack("<q", value), 0, 16)]
    data = value.encode()
    pieces = [data[i : i + 8] for i in range(0, len(data), 8)]
    return [block(piece, i, 9 if i + 1 < len(pieces) else len(piece)) for i, piece in enumerate(pieces)]


def slowly(frame: pl.DataFrame) -> list[int]:
    keys = hashlib.blake2b(b"cloister/rows/2", key=KEY, digest_size=64).digest()
    found = []
    for row in frame.rows():
        images = [aes(keys[:32], block) for column, value in enumerate(row) for block in blocks(column, value)]
        total = reduce(lambda a, b: a ^ b, images)
        found.append(aes(keys[32:], total.to_bytes(16, "little")) % 2**64)
    return found


TEXT = st.none() | st.text(st.sampled_from("ab é\x1f\0,"), max_size=20).map(str.strip)
FLOAT = st.none() | st.floats(allow_infinity=False) | st.sampled_from([0.0, -0.0, 1.5])
WHOLE = st.none() | st.integers(-(2**63), 2**63 - 1)
ROWS = st.lists(st.tuples(TEXT, FLOAT, WHOLE, st.none() | st.booleans(), TEXT), min_size=1, max_size=8)
TYPES = {"t": pl.String, "f": pl.Float64, "w": pl.Int64, "b": pl.Boolean, "u": pl.String}


@given(rows=ROWS, batch=st.sampled_from([1, 3, 1 << 16]))
def test_many_rows_at_once_have_the_hashes_of_each_by_itself(rows, batch):
    frame = pl.DataFrame(rows, schema=TYPES, orient="row")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_hash, "BATCH_CELLS", batch)
        assert RowHash(KEY)(frame).tolist() == slowly(frame)


@given(rows=ROWS)
def test_rows_have_equal_hashes_if_and_only_if_their_cells_are_equal(rows):
    frame = pl.DataFrame(rows, schema=TYPES, orient="row")
    different = {tuple(block for c, value in enumerate(row) for block in blocks(c, value)) for row in frame.rows()}
    assert len(set(RowHash(KEY)(frame).tolist())) == len(different)


DIFFERENT = {
    "text": ["", "a", "b", "ab", "a" * 8, "a" * 9, "a" * 16, "a" * 17, "a\0", "\0", "é"],
    "floats": [None, 0.0, 1.0, -1.0, 5e-324, 1e300],
    "whole numbers": [None, 0, 1, -1, 2**63 - 1, -(2**63)],
    "unsigned": pl.Series([None, 0, 1, 2**63, 2**64 - 1], dtype=pl.UInt64),
    "truth values": [None, True, False],
    "dates": [None, date(1970, 1, 1), date(2026, 1, 1), date(1969, 12, 31)],
    "moments": [None, datetime(1970, 1, 1), datetime(2026, 1, 1, 10), datetime(2026, 1, 1, 10, 0, 0, 1)],
    "times": [None, time(0), time(10), time(10, 0, 0, 1)],
    "large numbers": pl.Series([None, 0, 2**64, 2**100], dtype=pl.Int128),
}


@pytest.mark.parametrize("values", DIFFERENT.values(), ids=DIFFERENT)
def test_different_cells_have_different_hashes(values):
    frame = tidy(pl.DataFrame({"x": values}))
    assert len(set(RowHash(KEY)(frame).tolist())) == len(values)


def test_where_a_cell_stands_counts():
    frame = pl.DataFrame({"x": ["a", "", "ab", "b"], "y": ["", "a", "", "a"]})
    assert len(set(RowHash(KEY)(frame).tolist())) == 4


def test_null_and_empty_text_and_both_zeros_are_the_same():
    assert len(set(RowHash(KEY)(pl.DataFrame({"x": ["", None]})).tolist())) == 1
    assert len(set(RowHash(KEY)(pl.DataFrame({"x": [0.0, -0.0]})).tolist())) == 1
    assert len(set(RowHash(KEY)(pl.DataFrame({"x": [None, float("nan")]})).tolist())) == 1


def test_no_sum_of_hashes_tells_another():
    # The sums of blocks of these four cancel; hashes that did would deal the fourth row by the other three.
    frame = pl.DataFrame({"x": ["a", "a", "b", "b"], "y": ["c", "d", "c", "d"]})
    assert np.bitwise_xor.reduce(RowHash(KEY)(frame)) != 0


def test_another_key_has_other_hashes_and_other_places():
    frame = pl.DataFrame({"x": ["a", "b"]})
    assert not set(RowHash(KEY)(frame).tolist()) & set(RowHash(b"another")(frame).tolist())
    ids = np.arange(20, dtype=np.uint64).reshape(-1, 2)
    assert not np.isin(positions(ids, KEY), positions(ids, b"another")).any()


def test_places_are_uniform_and_those_of_copies_independent():
    ids = np.stack(np.meshgrid(np.arange(100), np.arange(100)), axis=-1).reshape(-1, 2).astype(np.uint64)
    place = positions(ids, KEY)
    assert place.min() >= 0 and place.max() <= 1 and len(set(place.tolist())) == 10_000
    counts = np.histogram(place, bins=20, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 44  # chi squared of 19 degrees: beyond with probability 0.001
    square = place.reshape(100, 100)
    assert abs(np.corrcoef(square[:-1].ravel(), square[1:].ravel())[0, 1]) < 0.04  # 4 / sqrt(9900)


def test_no_rows_have_no_hashes():
    assert RowHash(KEY)(pl.DataFrame({"x": [], "y": []}, schema={"x": pl.String, "y": pl.Int64})).shape == (0,)
    assert positions(np.zeros((0, 2), np.uint64), KEY).shape == (0,)
