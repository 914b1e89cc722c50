"""Rows changed at random before a step takes them (`training.augmentation`).

Under privacy each number of a changed row follows from the row and its own draws (row_draws.py) by single additions,
comparisons and moves, so that, as kernel.py asks, it depends on nothing else, to the last bit. Noise is looked up in a
table of the normal distribution's quantiles: a library's logarithm may differ with a number's place in a batch.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.training.row_draws import RowIds, draws
from common.document.augmentation import Augmentation
from common.document.federation import Federation
from common.document.schema import Numeric, Schema

FIRST = 2**31  # block of a row's stream; masks come before
TABLE_BITS = 16  # of the quantiles that noise is taken from
LOWEST = -1.0  # what a column's lower bound is encoded as

Lanes = NDArray[np.uint32]


class Augmenter:
    """Changes rows of one federation's schema as its document says."""

    def __init__(self, augmentation: Augmentation, schema: Schema) -> None:
        self.copies, self.mixup = augmentation.copies, augmentation.mixup
        self._jitter, self._drop, self._image = augmentation.jitter, augmentation.drop, schema.image
        self._shift, self._flip = augmentation.shift, augmentation.flip
        numbers, flags, blank, column = [], [], np.zeros(schema.inputs, np.float32), []
        start = 0
        for place, feature in enumerate(schema.features):
            if schema.image is not None and feature.name == schema.image.first:
                self._pixels = slice(start, start + schema.image.pixels)
            if isinstance(feature, Numeric):
                numbers.append(start)
                flags.append(start + 1 if feature.may_be_missing else -1)
                if feature.may_be_missing:
                    blank[start + 1] = 1.0
            column += [place] * feature.inputs
            start += feature.inputs
        self._numbers, self._flags = torch.tensor(numbers, dtype=torch.int64), torch.tensor(flags, dtype=torch.int64)
        self._column, self._blank = torch.tensor(column), torch.from_numpy(blank)
        moved = 3 if self._shift or self._flip else 0  # down, right, mirrored
        self._parts = [moved, len(numbers) if self._jitter else 0, len(schema.features) if self._drop else 0]

    @classmethod
    def of(cls, federation: Federation) -> Augmenter | None:
        """None if rows are taken as they are."""
        augmentation = federation.training.augmentation
        return None if augmentation is None else cls(augmentation, federation.data_schema)

    @property
    def lanes(self) -> int:
        """How many numbers each copy of a row draws."""
        return sum(self._parts)

    def draw(self, ids: RowIds, key: bytes) -> Lanes:
        """[rows x copies, lanes] of what `apply` needs; a row's copies stand one after another."""
        return draws(ids, self.copies * self.lanes, key=key, first=FIRST).reshape(len(ids) * self.copies, self.lanes)

    def rows(self, x: Tensor, y: Tensor, ids: RowIds, key: bytes) -> tuple[Tensor, Tensor]:
        """[n, inputs], [n] -> [n x copies, inputs], [n x copies]."""
        repeated = x.repeat_interleave(self.copies, 0)
        return self.apply(repeated, self.draw(ids, key)), y.repeat_interleave(self.copies, 0)

    def apply(self, x: Tensor, lanes: Lanes) -> Tensor:
        """[..., n, inputs] and [..., n, lanes] -> the rows, changed."""
        if not self.lanes:
            return x
        drawn = torch.from_numpy(lanes.astype(np.int64)).to(x.device)
        moved, jittered, dropped = torch.split(drawn, self._parts, -1)
        x = x.clone()
        if self._parts[0]:
            x[..., self._pixels] = self._moved(x[..., self._pixels], moved)
        if self._parts[1]:
            self._add_noise(x, jittered)
        if self._parts[2]:
            gone = dropped < round(self._drop * 2**32)
            x = torch.where(gone[..., self._column.to(x.device)], self._blank.to(x), x)
        return x

    def _add_noise(self, x: Tensor, drawn: Tensor) -> None:
        numbers, flags = self._numbers.to(x.device), self._flags.to(x.device)
        noise = _normals(self._jitter).to(x)[drawn >> 32 - TABLE_BITS]
        before = x[..., numbers]
        is_there = (flags < 0) | (x[..., flags.clamp(min=0)] == 0)
        x[..., numbers] = torch.where(is_there, (before + noise).clamp_(-1.0, 1.0), before)

    def _moved(self, pixels: Tensor, drawn: Tensor) -> Tensor:
        """Images moved by up to `shift` pixels down and right, or up and left, and mirrored."""
        image, shift = self._image, self._shift
        assert image is not None
        flat = pixels.reshape(-1, image.channels, image.height, image.width)
        padded = torch.nn.functional.pad(flat, (shift,) * 4, value=LOWEST)
        by = drawn.reshape(-1, 3)
        places = 2 * shift + 1
        down, right = (by[:, :2] * places >> 32).unbind(-1)
        rows = torch.arange(image.height, device=flat.device) + down[:, None]
        columns = torch.arange(image.width, device=flat.device) + right[:, None]
        if self._flip:
            columns = torch.where(by[:, 2:] < 2**31, columns.flip(-1), columns)
        which = torch.arange(len(flat), device=flat.device)[:, None, None, None]
        channels = torch.arange(image.channels, device=flat.device)[:, None, None]
        return padded[which, channels, rows[:, None, :, None], columns[:, None, None, :]].reshape(pixels.shape)


@lru_cache(maxsize=8)
def _normals(deviation: float) -> Tensor:
    """Quantiles of N(0, deviation^2), equally likely, float32 [2^TABLE_BITS]."""
    size, normal = 2**TABLE_BITS, NormalDist()
    quantiles = np.array([normal.inv_cdf((i + 0.5) / size) for i in range(size)])
    return torch.from_numpy((deviation * quantiles).astype(np.float32))


class PlainAugmenter:
    """The changes of one client's round without privacy, from one seed: rows are told apart by their place."""

    def __init__(self, augmenter: Augmenter, seed: int) -> None:
        self._augmenter, self._seed = augmenter, seed
        self._key = hashlib.sha256(f"{seed}".encode()).digest()

    def draw(self, places: NDArray[np.int64], step: int) -> Lanes:
        """As `Augmenter.draw`, for the rows at these places [rows] of the client's."""
        ids = np.stack([places.astype(np.uint64), np.full(len(places), step, np.uint64)], axis=1)
        return self._augmenter.draw(ids, self._key)

    def mix(self, rows: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """With which other of `rows` rows each is mixed, and how much of it stays (Zhang et al. 2018,
        arXiv:1710.09412, with a share of its own for each row)."""
        rng = np.random.default_rng([self._seed, step])
        partner = rng.permutation(rows)
        return partner, rng.beta(self._augmenter.mixup, self._augmenter.mixup, rows).astype(np.float32)
