"""A keyed hash of each row of a table, whatever a schema makes of it.

A row is a set of blocks of 128 bits: 64 bits of a cell, the column's number, the place of these bits in the cell, and
how the cell goes on. The set determines the row's cells: numbers, dates and truth values are one block, text is its
bytes, eight to a block. The hash is AES of the exclusive or of AES, under another key, of all blocks; 64 bits are kept.
Of many rows at once it is a few operations on arrays, and no loop.

It is as good as a random function of the row. Let AES under each key be a random permutation. Two rows that differ have
different sets of blocks, and none stands twice in one, since it names its column and place. So the exclusive or of both
sums is that of the images of one or more different blocks. One of them is a block alone: its image is as good as
uniform whatever the others' are, so the sums are equal with probability of about 2^-128 (Bellare, Guerin, Rogaway 1995,
"XOR MACs", theorem 3.1). Under the second key, different sums have images as good as independent and uniform.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import polars as pl
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

BATCH_CELLS = 1 << 16
WORD = 8  # bytes of text in a block
NOTHING, MORE, TYPED = 0, 9, 16  # how a cell goes on; 1 to 8 is the length of the end of a text
LENGTHS = np.array([0, *(2 ** (8 * n) - 1 for n in range(1, WORD + 1))], np.uint64)  # masks

Digests = NDArray[np.uint64]


class RowHash:
    """Hashes under one key of at most 64 bytes. A row's hash is the same whatever the rows around it."""

    def __init__(self, key: bytes) -> None:
        keys = hashlib.blake2b(b"cloister/rows/2", key=key, digest_size=64).digest()
        self._blocks, self._rows = (
            Cipher(algorithms.AES(half), modes.ECB()).encryptor() for half in (keys[:32], keys[32:])
        )

    def __call__(self, frame: pl.DataFrame) -> Digests:
        """[rows] of a tidy frame (common/data/cells.py)."""
        total = np.zeros((frame.height, 2), np.uint64)
        if not frame.height:
            return total[:, 0]
        for kind, blocks_of in (("text", _blocks_of_texts), ("float", _blocks_of_floats), ("whole", _blocks_of_wholes)):
            for columns in self._batches(frame, kind):
                blocks, first = blocks_of(frame, columns)
                images = _encrypted(self._blocks, blocks)
                cells = images if first is None else np.bitwise_xor.reduceat(images, first, axis=0)
                total ^= np.bitwise_xor.reduce(cells.reshape(len(columns), frame.height, 2), axis=0)
        return _encrypted(self._rows, total)[:, 0].copy()

    def _batches(self, frame: pl.DataFrame, kind: str) -> Iterator[list[int]]:
        """The columns of a kind, so many at a time that their cells fit a processor's cache."""
        columns = [number for number, dtype in enumerate(frame.dtypes) if _kind(dtype) == kind]
        step = max(1, BATCH_CELLS // frame.height)
        for start in range(0, len(columns), step):
            yield columns[start : start + step]


Blocks = tuple[NDArray[np.uint64], NDArray[np.int64] | None]  # and where each cell's begin; None if each has one


def _kind(dtype: pl.DataType) -> str:
    if dtype == pl.String:
        return "text"
    return "float" if dtype.is_float() else "whole"


def _numbers(columns: list[int], height: int) -> NDArray[np.uint64]:
    """The column's number for each cell, one column after another, at its place in a block."""
    return np.repeat(np.array(columns, np.uint64) << np.uint64(40), height)


def _blocks_of_floats(frame: pl.DataFrame, columns: list[int]) -> Blocks:
    values = frame[:, columns].to_numpy(order="fortran").T.reshape(-1) + 0.0  # which turns -0.0 into 0.0
    return _blocks_of_typed(values.view(np.uint64), np.isnan(values), _numbers(columns, frame.height)), None


def _blocks_of_wholes(frame: pl.DataFrame, columns: list[int]) -> Blocks:
    """Integers, dates, times and truth values, by the bits of an integer of 64."""
    some = frame[:, columns]
    whole = some.select(_as_int64(pl.col(name), dtype) for name, dtype in some.schema.items())
    values = whole.to_numpy(order="fortran").T.reshape(-1).view(np.uint64)
    nothing = some.select(pl.all().is_null()).to_numpy(order="fortran").T.reshape(-1)
    return _blocks_of_typed(values, nothing, _numbers(columns, frame.height)), None


def _as_int64(column: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    column = column.to_physical().fill_null(False if dtype == pl.Boolean else 0)
    return column.reinterpret(signed=True) if dtype == pl.UInt64 else column.cast(pl.Int64)


def _blocks_of_typed(
    values: NDArray[np.uint64], nothing: NDArray[np.bool_], numbers: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    blocks = np.empty((len(values), 2), np.uint64)
    blocks[:, 0] = np.where(nothing, np.uint64(0), values)
    blocks[:, 1] = numbers | np.where(nothing, NOTHING, TYPED).astype(np.uint64)
    return blocks


def _blocks_of_texts(frame: pl.DataFrame, columns: list[int]) -> Blocks:
    text = pl.concat([frame.to_series(number) for number in columns])
    size = text.str.len_bytes().fill_null(0).to_numpy().astype(np.int64)
    data = text.str.join("").item().encode() + bytes(WORD)
    words = np.ndarray(len(data) - WORD + 1, np.dtype("<u8"), data, strides=(1,))  # at every byte
    start, numbers = np.cumsum(size) - size, _numbers(columns, frame.height)
    if size.max() <= WORD:
        blocks = np.empty((len(size), 2), np.uint64)
        blocks[:, 0] = words[start] & LENGTHS[size]
        blocks[:, 1] = numbers | size.astype(np.uint64)
        return blocks, None
    count = np.maximum(1, -(-size // WORD))
    first = np.cumsum(count) - count
    cell = np.repeat(np.arange(len(size)), count)
    place = np.arange(len(cell)) - first[cell]
    left = size[cell] - WORD * place
    blocks = np.empty((len(cell), 2), np.uint64)
    blocks[:, 0] = words[start[cell] + WORD * place] & LENGTHS[np.minimum(left, WORD)]
    goes_on = np.where(left > WORD, MORE, left).astype(np.uint64)
    blocks[:, 1] = numbers[cell] | (place << 8).astype(np.uint64) | goes_on
    return blocks, first


def positions(ids: NDArray[np.uint64], key: bytes) -> NDArray[np.float64]:
    """[rows, 2] -> [rows]: a number in [0, 1] for each pair, as good as uniform and independent without the key."""
    secret = hashlib.blake2b(b"cloister/deal/2", key=key, digest_size=32).digest()
    if not len(ids):
        return np.zeros(0)
    return _encrypted(Cipher(algorithms.AES(secret), modes.ECB()).encryptor(), ids)[:, 0] / 2.0**64


def _encrypted(cipher: CipherContext, blocks: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """AES of each block of 128 bits."""
    return np.frombuffer(
        cipher.update(np.ascontiguousarray(blocks).reshape(-1).view(np.uint8).data), np.uint64
    ).reshape(-1, 2)
