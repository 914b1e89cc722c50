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

import numpy as np
import polars as pl
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

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
        """[rows] of a tidy frame (common/cells.py)."""
        total = np.zeros((frame.height, 2), np.uint64)
        if not frame.height:
            return total[:, 0]
        for number, column in enumerate(frame.iter_columns()):
            add = self._text if column.dtype == pl.String else self._typed
            add(column, np.uint64(number << 40), total)
        return _encrypted(self._rows, total)[:, 0].copy()

    def _typed(self, column: pl.Series, number: np.uint64, total: NDArray[np.uint64]) -> None:
        column = column.fill_nan(None) if column.dtype.is_float() else column
        values = column.to_physical().fill_null(0).to_numpy()
        if values.dtype.kind != "f":
            values = values.astype(np.uint64 if values.dtype.kind == "u" else np.int64)
        blocks = np.empty((len(column), 2), np.uint64)
        blocks[:, 0] = (values + 0).view(np.uint64)  # + 0 turns -0.0 into 0.0
        blocks[:, 1] = number | np.where(column.is_null().to_numpy(), NOTHING, TYPED).astype(np.uint64)
        total ^= _encrypted(self._blocks, blocks)

    def _text(self, column: pl.Series, number: np.uint64, total: NDArray[np.uint64]) -> None:
        size = column.str.len_bytes().fill_null(0).to_numpy().astype(np.int64)
        data = column.str.join("").item().encode() + bytes(WORD)
        words = np.ndarray(len(data) - WORD + 1, np.dtype("<u8"), data, strides=(1,))  # at every byte
        start = np.cumsum(size) - size
        if size.max() <= WORD:
            blocks = np.empty((len(size), 2), np.uint64)
            blocks[:, 0] = words[start] & LENGTHS[size]
            blocks[:, 1] = number | size.astype(np.uint64)
            total ^= _encrypted(self._blocks, blocks)
            return
        count = np.maximum(1, -(-size // WORD))
        first = np.cumsum(count) - count
        row = np.repeat(np.arange(len(size)), count)
        place = np.arange(len(row)) - first[row]
        left = size[row] - WORD * place
        blocks = np.empty((len(row), 2), np.uint64)
        blocks[:, 0] = words[start[row] + WORD * place] & LENGTHS[np.minimum(left, WORD)]
        blocks[:, 1] = number | (place << 8).astype(np.uint64) | np.where(left > WORD, MORE, left).astype(np.uint64)
        total ^= np.bitwise_xor.reduceat(_encrypted(self._blocks, blocks), first, axis=0)


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
