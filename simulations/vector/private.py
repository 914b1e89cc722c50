"""DP-SGD of many clients at once, in exact arithmetic: bit for bit what client/training/dpsgd.py makes of each.

Sums of clipped gradients are the same whole numbers in any batch (client/training/kernel.py), and all that follows is
done number by number, by the same operations. So it matters neither which clients share a chunk nor how many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from client.training.augment import Augmenter, Lanes
from client.training.kernel import BITS, ExactMLP, Room, sensitivity
from client.training.row_draws import RowIds, masks
from common.document.federation import Federation
from simulations.vector.batches import poisson_batches
from simulations.vector.jobs import Index, Job, Rows
from simulations.vector.models import Models

MOST_TAU = 2.0**49  # noise and sums stay within the 2^53 that a float64 holds


@torch.no_grad()
def train_privately(federation: Federation, start: Tensor, jobs: Sequence[Job], room: Room) -> Tensor:
    """Trains every job's client from `start`, float32 [parameters]. Returns [jobs, parameters], which the next call
    with this `room` overwrites."""
    training, sizes, rate = federation.training, federation.layer_sizes, federation.model.dropout
    plans = [job.recipe.private for job in jobs]
    clip, batch = (next(getattr(plan, name) for plan in plans if plan) for name in ("clip", "expected_batch_size"))
    augmenter, copies = Augmenter.of(federation), training.copies
    trained = federation.trained_layers
    most = sensitivity(sizes, copies=copies, trained=trained)
    taus = [math.nextafter(plan.noise_multiplier * most, math.inf) for plan in plans if plan]
    steps = [plan.steps for plan in plans if plan]
    rows, models = Rows(jobs), Models(federation, start, jobs, room)
    shapes = [(len(jobs), weight.shape[1], weight.shape[2] + 1) for weight, _ in (models.layers[i] for i in trained)]
    sums = [room(f"sum {i}", shape, start) for i, shape in enumerate(shapes)]
    numbers = [shape[1] * shape[2] for shape in shapes]
    noise = room("noise", (len(jobs), sum(numbers)), torch.empty(0), torch.float32).zero_()
    for step, (places, keys) in enumerate(poisson_batches(jobs, keys=bool(rate) or augmenter is not None)):
        repeated = np.repeat(places, copies, axis=1) if copies > 1 else places
        x, y = rows.take(repeated, room("x", (*repeated.shape, rows.inputs), start, torch.float32))
        if augmenter is not None:
            x = augmenter.apply(x, _lanes(augmenter, jobs, places, keys))
        for i, job in enumerate(jobs):
            if step < steps[i]:
                job.noise.fill_with_normals(noise[i], taus[i])
        noise.round_()
        for total, of_layer in zip(sums, torch.split(noise, numbers, 1), strict=True):
            total.copy_(of_layer.view(total.shape))
        net = ExactMLP(
            models.layers, activation=federation.model.activation, loss=federation.loss, room=room, trained=trained
        )
        net.add_clipped_sum(
            sums,
            x,
            y,
            clip=clip,
            masks=_masks(jobs, places, keys, sizes[1:-1], rate, start.device, copies) if rate else (),
            present=torch.from_numpy(repeated >= 0).to(start.device),
            copies=copies,
        )
        for total, layer in zip(sums, trained, strict=True):
            weight, bias = models.gradients[layer]
            weight.copy_(total[..., :-1])
            bias.copy_(total[..., -1])
        models.step(clip / 4.0**BITS / batch)  # from units of clip / 2^30
        models.note_step()
    return models.done


def _masks(
    jobs: Sequence[Job],
    places: Index,
    keys: list[bytes],
    widths: Sequence[int],
    rate: float,
    device: torch.device,
    copies: int,
) -> list[Tensor]:
    """Dropout's masks of each client's rows, float64 [clients, n x copies, width]; 1 where there is no row."""
    clients, n = places.shape
    together = [torch.ones(clients, n * copies, width, dtype=torch.float64) for width in widths]
    for i, ids, key in _ids(jobs, places, keys):
        own = masks(ids, widths, rate=rate, key=key, copies=copies)
        for mask, part in zip(together, own, strict=True):
            mask[i, : len(part)] = part
    return [mask.to(device) for mask in together]


def _lanes(augmenter: Augmenter, jobs: Sequence[Job], places: Index, keys: list[bytes]) -> Lanes:
    """What each client's rows draw to be changed, [clients, n x copies, lanes]; 0 where there is no row."""
    clients, n = places.shape
    together = np.zeros((clients, n * augmenter.copies, augmenter.lanes), np.uint32)
    for i, ids, key in _ids(jobs, places, keys):
        own = augmenter.draw(ids, key)
        together[i, : len(own)] = own
    return together


def _ids(jobs: Sequence[Job], places: Index, keys: list[bytes]) -> Iterator[tuple[int, RowIds, bytes]]:
    """Each client's number, the ids of the rows it takes, and its key; of those that take any."""
    for i, (job, key) in enumerate(zip(jobs, keys, strict=True)):
        mine = places[i][places[i] >= 0]
        if len(mine):
            assert job.ids is not None, "rows draw by their ids"
            yield i, job.ids[mine], key
