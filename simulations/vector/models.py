"""The parameters of many models in one tensor, [models, parameters], and views of it as layers.

A model begins at a multiple of 64 bytes, behind some numbers that are always 0: a product's last bits depend on where
in a cache line its factors begin, and should not depend on how many models stand before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from client.training.kernel import Room
from client.training.plain import make_optimizer, set_rate
from common.document.federation import Federation
from common.model.weights import Weights
from common.model.weights import flat_of as weights_in_a_row
from simulations.vector.jobs import Job

Layers = list[tuple[Tensor, Tensor]]  # weight [models, out, in] and bias [models, out] of each


LINE = 64  # bytes


def flat_of(weights: Weights) -> Tensor:
    """[parameters], in the order of the arrays, which is that of the layers, with zeros behind them."""
    flat = weights_in_a_row(weights)
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


class Models:
    """The models of a chunk's clients, which all begin alike, their gradients and their optimizer."""

    def __init__(
        self, federation: Federation, start: Tensor, jobs: Sequence[Job], room: Room, *, fused: bool = False
    ) -> None:
        """`start` is [parameters] as `flat_of` has them; `fused` is `make_optimizer`'s."""
        self._recipe = jobs[0].recipe  # in what all share: a step's learning rate, and mu
        self._start, self._sizes, self._mu = start, federation.layer_sizes, self._recipe.proximal_mu
        self._last = [job.recipe.steps for job in jobs]
        ends = np.cumsum([0, *((fan_in + 1) * out for fan_in, out in pairwise(self._sizes))]).tolist()
        trained = federation.trained_layers
        self._frozen = [slice(*ends[i : i + 2]) for i in range(len(ends) - 1) if i not in trained]
        shape, names = (len(jobs), len(start)), ("flat", "gradient", "done", "moved")
        self._flat, self._gradient, self.done, self._moved = (room(name, shape, start, start.dtype) for name in names)
        self._flat.copy_(start)
        self.layers = layers_of(self._flat, self._sizes)
        self._optimizer = make_optimizer([self._flat], federation.training, fused=fused)
        self._steps = 0

    @cached_property
    def gradients(self) -> Layers:
        """Where a step's gradients are written."""
        self._flat.grad = self._gradient.zero_()
        return layers_of(self._gradient, self._sizes)

    @property
    def learning_rate(self) -> float:
        """The next step's."""
        return self._recipe.learning_rate(self._steps)

    def step(self, scale: float = 1.0) -> None:
        """A step of the optimizer by `scale` times what was written."""
        if scale != 1.0:
            self._gradient.mul_(scale)
        if self._mu:
            self._gradient.add_(torch.sub(self._flat, self._start, out=self._moved), alpha=self._mu)
        set_rate(self._optimizer, self.learning_rate)
        self._optimizer.step()
        for part in self._frozen:  # no gradient, but perhaps weight decay
            self._flat[:, part] = self._start[part]

    def note_step(self) -> None:
        """After each step: whose last one it was keeps the model of now, in `done`."""
        self._steps += 1
        for i, last in enumerate(self._last):
            if self._steps == last:
                self.done[i] = self._flat[i]
