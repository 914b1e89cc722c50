"""Trains the clients of a round, chunk by chunk, as client/training/train.py would train each of them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np

from client.training.kernel import ROWS, Room, sensitivity
from client.training.recipe import Recipe
from common.document.federation import Federation
from common.model.update import Updates
from common.model.weights import Weights
from simulations.vector.jobs import Job
from simulations.vector.models import flat_of
from simulations.vector.plain import train_plainly
from simulations.vector.private import MOST_TAU, train_privately

CHUNKS = (1, 2, 5, 10, 20, 50, 100, 200)  # clients; which is fastest depends on the model and on the machine's caches
TRIES = 3
CHUNK_BYTES = 2**30  # of the largest chunk that is tried
BYTES_A_PARAMETER = 40  # of one client in a chunk
BYTES_A_UNIT = 64  # ... and of one row, for each unit of the layers


def unfit(recipe: Recipe, rows: int) -> str:
    """Why a client's training cannot be one of many; "" if it can."""
    if rows == 0:
        return "it has no rows"
    if (private := recipe.private) is None:
        return ""
    if private.arithmetic != "exact":
        return f"its arithmetic is {private.arithmetic}"
    if rows > ROWS:
        return f"it has more than {ROWS} rows"
    if private.noise_multiplier * sensitivity(recipe.federation.layer_sizes) > MOST_TAU:
        return "its noise is too large for sums in float64"
    return ""


class Trainer:
    """Trains clients of one federation together. What it makes of one does not depend on the others; without
    privacy, but for the last bits of floats, by where a small matrix begins in memory."""

    def __init__(self, federation: Federation, *, width: int, chunk: int | None = None) -> None:
        """`width` is as many rows as the largest batch of any client of the federation has; `chunk` so many clients
        are trained at once, by default as many as turn out to be fastest."""
        self._federation, self._width, self._room = federation, width, Room()
        self._paces: dict[int, list[float]] = {}  # seconds a client, by the size of a chunk
        self._sizes = [chunk] if chunk else _sizes_to_try(federation, width)

    def train(self, weights: Weights, jobs: Sequence[Job]) -> Iterator[tuple[list[int], Updates]]:
        """The updates of all `jobs`, each of which fits (`unfit`), in chunks with their places among them. A chunk's
        arrays hold until the next one is asked for."""
        start = flat_of(weights).to(jobs[0].x.device)
        # Clients of one size are together, since a chunk takes as many steps as its longest.
        order = sorted(range(len(jobs)), key=lambda i: (jobs[i].recipe.steps, jobs[i].rows), reverse=True)
        while order:
            size = self._size(len(order))
            places, order = order[:size], order[size:]
            chunk, began = [jobs[i] for i in places], time.perf_counter()
            losses = None
            if chunk[0].recipe.private is not None:
                flat = train_privately(self._federation, start, chunk, self._room)
            else:
                flat, losses = train_plainly(self._federation, start, chunk, self._room, width=self._width)
            together = flat[:, : self._federation.parameters].cpu().numpy()
            self._paces.setdefault(len(chunk), []).append((time.perf_counter() - began) / len(chunk))
            yield (
                places,
                Updates(
                    flat=together,
                    weights=np.array([job.recipe.weight for job in chunk]),
                    losses=None if losses is None else losses.numpy(),
                    like=weights,
                ),
            )

    def _size(self, left: int) -> int:
        """How many clients come next: each size is tried a few times, where there are enough clients, and then the
        fastest taken, or a little less so that no small chunk is left over."""
        for size in self._sizes:
            if size <= left and len(self._paces.get(size, ())) < TRIES:
                return size
        tried = [size for size in self._sizes if size in self._paces]
        if not tried:
            return left
        # Each by its best time: another process may have slowed down any other.
        fastest = min(tried, key=lambda size: min(self._paces[size]))
        return math.ceil(left / math.ceil(left / fastest))


def _sizes_to_try(federation: Federation, width: int) -> list[int]:
    """Whose chunks are not too large for memory, from small to large."""
    units = sum(federation.layer_sizes) * (width if federation.privacy.row is None else 2 * width)
    each = federation.parameters * BYTES_A_PARAMETER + units * BYTES_A_UNIT
    return [size for size in CHUNKS if size == 1 or size * each <= CHUNK_BYTES]
