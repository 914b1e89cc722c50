"""Trains the clients of a round, chunk by chunk, as client/training/train.py would train each of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from client.training.kernel import Room, most_rows, sensitivity
from client.training.recipe import Recipe
from common.document.federation import Federation
from common.model.update import Updates
from common.model.weights import Weights
from simulations.vector.jobs import Job
from simulations.vector.models import flat_of
from simulations.vector.plain import train_plainly
from simulations.vector.private import MOST_TAU, train_privately

# Of a chunk, on a CPU. Larger ones leave the cache, at smaller ones calls take longer than the work they do; measured
# at 200 to 500,000 parameters a model, where half or twice as much cost 1 to 10 %.
CHUNK_PARAMETERS = 1_500_000
CHUNK_CLIENTS = 50
CHUNKS = 8  # of a round, where they are not too small for that: for so many workers
CHUNK_BYTES = 2**30  # about, of a chunk's models and batches, on any device
BYTES_A_PARAMETER = 40  # of one client in a chunk
BYTES_A_UNIT = 64  # ... and of one row, for each unit of the layers
GPU_CLIENTS = 1000


def unfit(recipe: Recipe, rows: int) -> str:
    """Why a client's training cannot be one of many; "" if it can."""
    if rows == 0:
        return "it has no rows"
    if (private := recipe.private) is None:
        return ""
    if private.arithmetic != "exact":
        return f"its arithmetic is {private.arithmetic}"
    copies = recipe.federation.training.copies
    if rows > most_rows(copies):
        return f"it has more than {most_rows(copies)} rows"
    federation = recipe.federation
    most = sensitivity(federation.layer_sizes, copies=copies, trained=federation.trained_layers)
    if private.noise_multiplier * most > MOST_TAU:
        return "its noise is too large for sums in float64"
    return ""


def chunks_of(
    jobs: Sequence[Job], federation: Federation, *, width: int, device: torch.device, workers: int
) -> list[list[Job]]:
    """Cuts a round's jobs, each of which fits (`unfit`), into chunks, each for one call of `Trainer.train`.

    Without privacy they are the same whatever the number of workers: a product's last bits can depend on how many
    clients are multiplied at once and on which stand before.
    """
    if not jobs:
        return []
    # Clients of one size are together, since a chunk takes as many steps as its longest.
    order = sorted(jobs, key=lambda job: (job.recipe.steps, job.rows), reverse=True)
    size = _chunk_size(len(jobs), federation, width=width, device=device, workers=workers)
    ends = np.linspace(0, len(order), math.ceil(len(order) / size) + 1).round().astype(int).tolist()
    return [order[start:end] for start, end in pairwise(ends)]


def _chunk_size(clients: int, federation: Federation, *, width: int, device: torch.device, workers: int) -> int:
    private = federation.privacy.row is not None
    units = sum(federation.layer_sizes) * width * federation.training.copies * (2 if private else 1)
    each = federation.parameters * BYTES_A_PARAMETER + units * BYTES_A_UNIT
    fit = max(CHUNK_BYTES // each, 1)
    if device.type != "cpu":
        return min(fit, GPU_CLIENTS)
    cached = max(CHUNK_PARAMETERS // federation.parameters, 1)
    most = min(fit, cached, CHUNK_CLIENTS)
    if private:
        return min(most, math.ceil(clients / workers))
    return min(most, max(cached // 4, math.ceil(clients / CHUNKS)))


class Trainer:
    """Trains clients of one federation together. What it makes of one does not depend on the others; without
    privacy, but for the last bits of floats."""

    def __init__(self, federation: Federation, *, width: int) -> None:
        """`width` is as many rows as the largest batch of any client of the federation has."""
        self._federation, self._width, self._room = federation, width, Room()

    def train(self, weights: Weights, jobs: Sequence[Job]) -> Updates:
        """The updates of a chunk's clients (`chunks_of`). Its arrays hold until the next call."""
        start = flat_of(weights).to(jobs[0].x.device)
        losses = None
        if jobs[0].recipe.private is not None:
            flat = train_privately(self._federation, start, jobs, self._room)
        else:
            flat, losses = train_plainly(self._federation, start, jobs, self._room, width=self._width)
        return Updates(
            flat=flat[:, : self._federation.parameters].cpu().numpy(),
            weights=np.array([job.recipe.weight for job in jobs]),
            losses=None if losses is None else losses.numpy(),
            like=weights,
        )
