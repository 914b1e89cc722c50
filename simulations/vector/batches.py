"""Which rows each client's step takes, for many clients at once: the same that each would take by itself.

A batch is [clients, n] places of rows at their client, -1 where a client has fewer than the largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from client.training.row_draws import KEY
from simulations.vector.jobs import Index, Job

WORDS = 2**21  # drawn at a time: the samples of so many rows and steps


def poisson_batches(jobs: Sequence[Job], *, keys: bool) -> Iterator[tuple[Index, list[bytes]]]:
    """The batches of private training, step by step, and each client's key for dropout if `keys`.

    A client that has taken all its steps has batches of no rows, and no key.
    """
    steps = [_steps(job) for job in jobs]
    most = max(job.rows for job in jobs)
    block = max(1, WORDS // (len(jobs) * (most + KEY)))
    for start in range(0, max(steps), block):
        chosen = np.zeros((min(block, max(steps) - start), len(jobs), most), np.bool_)
        drawn: list[list[bytes]] = []
        for i, job in enumerate(jobs):
            left = min(max(steps[i] - start, 0), block)
            assert job.recipe.private is not None
            width = job.rows + (KEY // 8 if keys else 0)
            words = job.noise.words(left * width).reshape(left, width)
            # A row comes if its uniform number, (1 + its upper 53 bits) x 2^-53, is at most the rate.
            limit = np.uint64(math.floor(math.ldexp(job.recipe.private.sampling_rate, 53)))
            chosen[:left, i, : job.rows] = (words[:, : job.rows] >> np.uint64(11)) < limit
            drawn.append([row.tobytes() for row in words[:, job.rows :]] if keys else [])
        for step, of_clients in enumerate(chosen):
            yield _places(of_clients), [key[step] if step < len(key) else b"" for key in drawn]


def _steps(job: Job) -> int:
    assert job.recipe.private is not None
    return job.recipe.private.steps


def _places(chosen: np.ndarray[tuple[int, int], np.dtype[np.bool_]]) -> Index:
    """bool [clients, rows] -> [clients, n]: the places of those that are chosen, in order, then -1."""
    client, place = np.nonzero(chosen)
    counts = np.bincount(client, minlength=len(chosen))
    at = np.arange(len(client)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = np.full((len(chosen), max(int(counts.max(initial=0)), 1)), -1, np.int64)
    places[client, at] = place
    return places


def shuffled_batches(jobs: Sequence[Job], size: int, *, width: int) -> Iterator[Index]:
    """The batches of training without privacy, step by step: each client's rows in one random order after another, cut
    into batches of `size`, the last of which may be smaller. Every one has `width` places, of which there are enough
    for each client, so that products have one shape whoever else is in a chunk."""
    steps = max(job.recipe.steps for job in jobs)
    places = np.full((len(jobs), steps, width), -1, np.int64)
    for i, job in enumerate(jobs):
        epoch = math.ceil(job.rows / size)
        for start in range(0, job.recipe.steps, epoch):
            left = min(epoch, job.recipe.steps - start)
            order = np.full(epoch * size, -1, np.int64)
            order[: job.rows] = job.noise.permutation(job.rows)
            places[i, start : start + left, : min(size, width)] = order.reshape(epoch, size)[:left, :width]
    yield from np.ascontiguousarray(places.swapaxes(0, 1))
