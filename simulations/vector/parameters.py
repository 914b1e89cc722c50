"""The parameters of many models in one tensor, [models, parameters], and views of it as layers.

A model begins at a multiple of 64 bytes, behind some numbers that are always 0: a product's last bits depend on where
in a cache line its factors begin, and a model's must not depend on how many stand before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from common.model.weights import Weights

Layers = list[tuple[Tensor, Tensor]]  # weight [models, out, in] and bias [models, out] of each


LINE = 64  # bytes


def flat_of(weights: Weights) -> Tensor:
    """[parameters], in the order of the arrays, which is that of the layers, with zeros behind them."""
    flat = np.concatenate([array.reshape(-1) for array in weights.values()])
    return torch.from_numpy(np.pad(flat, (0, -len(flat) % (LINE // flat.itemsize))))


def layers_of(flat: Tensor, sizes: Sequence[int]) -> Layers:
    """[models, parameters] as layers, which share its memory."""
    layers, at = [], 0
    for fan_in, out in pairwise(sizes):
        weight = flat[:, at : at + out * fan_in].view(-1, out, fan_in)
        at += out * fan_in
        layers.append((weight, flat[:, at : at + out]))
        at += out
    return layers
