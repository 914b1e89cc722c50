"""Randomness of rows, for dropout's masks and for augmentation: what a row draws follows from that row alone.

A mask by a row's place in the batch would change the masks of others when a row is added. Here it is AES of the row's
digest and of which copy of equal rows it is, under a key drawn afresh for each step: nobody can tell it from a fair
coin for each unit, and a row that comes or goes leaves the others' as they were.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

KEY = 32  # bytes
LANES = 4  # units of 32 bits that a block of AES decides

RowIds = NDArray[np.uint64]  # [rows, 2]: a row's digest, and which copy it is of the rows with that digest


def row_ids(digests: NDArray[np.uint64]) -> RowIds:
    """[rows] -> [rows, 2]. Copies are numbered from 0 in the table's order, which is all that tells them apart."""
    order = np.argsort(digests, kind="stable")
    sorted_ = digests[order]
    new = np.append(True, sorted_[1:] != sorted_[:-1])[: len(digests)]
    starts = np.maximum.accumulate(np.where(new, np.arange(len(digests)), 0))
    copies = np.empty(len(digests), np.uint64)
    copies[order] = (np.arange(len(digests)) - starts).astype(np.uint64)
    return np.stack([digests, copies], axis=1)


def masks(ids: RowIds, widths: Sequence[int], *, rate: float, key: bytes, copies: int = 1) -> list[Tensor]:
    """What each hidden layer's activations are multiplied by, float64 [rows x copies, width]: 0 with probability
    `rate`, to 2^-32, else 1 / (1 - rate). A row's copies stand one after another."""
    lanes = draws(ids, copies * sum(widths), key=key).reshape(len(ids) * copies, sum(widths))
    kept = torch.from_numpy(np.where(lanes < round(rate * 2**32), 0.0, 1.0 / (1.0 - rate)))
    return list(torch.split(kept, list(widths), dim=1))


def draws(ids: RowIds, count: int, *, key: bytes, first: int = 0) -> NDArray[np.uint32]:
    """[rows, count] uniform numbers of each row, from the block `first` of its stream on."""
    blocks = -(-count // LANES)
    plain = np.empty((len(ids), blocks, LANES), np.uint32)
    plain[..., :2] = ids[:, :1].copy().view(np.uint32)[:, None]
    plain[..., 2] = ids[:, 1:].astype(np.uint32)
    plain[..., 3] = np.arange(first, first + blocks)
    drawn = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(plain.tobytes())
    return np.frombuffer(drawn, np.uint32).reshape(len(ids), blocks * LANES)[:, :count]
