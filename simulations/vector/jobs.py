"""What is trained together: the clients of a chunk, with one model's shape, one way to train, and rows of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.training.recipe import Recipe
from client.training.row_draws import RowIds
from simulations.noise import SimulationNoise

Index = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One client's round of training. `index` is which rows of a table are the client's; tables may be shared."""

    node: int
    recipe: Recipe
    x: Tensor  # float32 [rows of the table, inputs]
    y: Tensor  # [rows of the table], or of several targets [rows of the table, targets]
    index: Index  # [rows of the client]
    ids: RowIds | None  # of the client's rows, for dropout and augmentation under privacy
    noise: SimulationNoise

    @property
    def rows(self) -> int:
        return len(self.index)


class Rows:
    """The rows of a chunk's clients, by client and by their place at that client."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        shared = all(job.x is jobs[0].x for job in jobs)
        self._x = jobs[0].x if shared else torch.cat([job.x for job in jobs])
        self._y = jobs[0].y if shared else torch.cat([job.y for job in jobs])
        starts = [0] * len(jobs) if shared else np.cumsum([0, *(len(job.y) for job in jobs[:-1])]).tolist()
        self._rows = np.concatenate([job.index + start for job, start in zip(jobs, starts, strict=True)])
        self._first = np.cumsum([0, *(job.rows for job in jobs[:-1])])[:, None]
        self.device, self.dtype, self.inputs = self._x.device, self._x.dtype, self._x.shape[1]

    def take(self, places: Index, out: Tensor) -> tuple[Tensor, Tensor]:
        """[clients, n] -> x [clients, n, inputs], in `out`, and y [clients, n], or [clients, n, targets]. A place of -1
        is for no row: what stands there is some row."""
        rows = self._rows.take(np.maximum(places, 0) + self._first, mode="clip")
        index = torch.from_numpy(rows.reshape(-1)).to(self.device)
        torch.index_select(self._x, 0, index, out=out.view(-1, self.inputs))
        return out, self._y[index].view(*places.shape, *self._y.shape[1:])
