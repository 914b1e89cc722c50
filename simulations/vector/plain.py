"""SGD of many clients at once, without privacy and without autograd: what client/training/plain.py makes of each, but
for the last bits of floats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from client.training.augment import Augmenter, Lanes, PlainAugmenter
from client.training.kernel import Room
from client.training.plain import mixed
from common.document.federation import Federation
from common.document.heads import Loss
from common.model.objective import parts_of
from simulations.vector.batches import shuffled_batches
from simulations.vector.jobs import Index, Job, Rows
from simulations.vector.models import Layers, Models

SMALL = 20_000  # numbers in a matrix; of smaller ones a call for each costs more than a pass over all of them


@torch.no_grad()
def train_plainly(
    federation: Federation, start: Tensor, jobs: Sequence[Job], room: Room, *, width: int
) -> tuple[Tensor, Tensor]:
    """Trains every job's client from `start`, [parameters]; `width` is that of `shuffled_batches`.

    Returns:
        [jobs, parameters], which the next call with this `room` overwrites, and the mean loss of each job's rows.
    """
    training, sizes, rate = federation.training, federation.layer_sizes, federation.model.dropout
    rows, models = Rows(jobs), Models(federation, start, jobs, room, fused=True)
    pulled = training.momentum or training.weight_decay or jobs[0].recipe.proximal_mu
    step_at_once = training.optimizer == "sgd" and not pulled
    net = _Net(models.layers, federation.model.activation, federation.loss, room, trained=federation.trained_layers)
    augmenter, copies = Augmenter.of(federation), training.copies
    seeds = [(job.noise.integer(), job.noise.integer()) for job in jobs] if rate or augmenter is not None else []
    dropout = [torch.Generator().manual_seed(seed) for seed, _ in seeds]
    changes = [] if augmenter is None else [PlainAugmenter(augmenter, seed) for _, seed in seeds]
    losses, taken = torch.zeros(len(jobs), dtype=torch.float64), torch.zeros(len(jobs), dtype=torch.int64)
    for step, taken_places in enumerate(shuffled_batches(jobs, training.batch_size, width=width)):
        places = np.repeat(taken_places, copies, axis=1) if copies > 1 else taken_places
        present = torch.from_numpy(places >= 0)
        counts = present.sum(1)
        x, y = rows.take(places, room("x", (*places.shape, rows.inputs), start, rows.dtype))
        share = (present.to(start.dtype) / counts[:, None].clamp(min=1)).to(start.device)  # of a row in the mean
        mix = None
        if augmenter is not None:
            x = augmenter.apply(x, _lanes(augmenter, changes, taken_places, step))
            if augmenter.mixup:
                mix = _mix(changes, places, step, y)
                x = mixed(x, x.gather(1, mix.partner[..., None].expand_as(x)), mix.share[..., None].to(x))
        net.forward(x.to(start.dtype), _masks(places, sizes[1:-1], rate, dropout, start) if rate else ())
        told = net.losses(y)
        if mix is not None:
            told = mixed(told, net.losses(mix.y), mix.share.to(told))
        losses += torch.where(present, told.cpu(), 0.0).sum(1)
        taken += counts
        if step_at_once:
            net.descend(y, share, models.learning_rate, mix)
        else:
            net.gradient(y, share, models.gradients, mix)
            models.step()
        models.note_step()
    return models.done, losses / taken


@dataclass(frozen=True)
class _Mix:
    """Rows mixed two by two: with which each is, that one's target, and how much of the row itself stays."""

    partner: Tensor  # [clients, n]
    y: Tensor  # [clients, n]
    share: Tensor  # [clients, n]


def _mix(changes: Sequence[PlainAugmenter], places: Index, step: int, y: Tensor) -> _Mix:
    partner = np.tile(np.arange(places.shape[1]), (len(places), 1))
    share = np.ones(places.shape, np.float32)
    for i, own in enumerate(changes):
        rows = int((places[i] >= 0).sum())
        partner[i, :rows], share[i, :rows] = own.mix(rows, step)
    found = torch.from_numpy(partner).to(y.device)
    return _Mix(found, y.gather(1, found), torch.from_numpy(share).to(y.device))


def _lanes(augmenter: Augmenter, changes: Sequence[PlainAugmenter], places: Index, step: int) -> Lanes:
    """What each client's rows draw to be changed, [clients, n x copies, lanes]; 0 where there is no row."""
    clients, n = places.shape
    together = np.zeros((clients, n * augmenter.copies, augmenter.lanes), np.uint32)
    for i, own in enumerate(changes):
        drawn = own.draw(places[i][places[i] >= 0], step)
        together[i, : len(drawn)] = drawn
    return together


def _masks(
    places: np.ndarray[tuple[int, int], np.dtype[np.int64]],
    widths: Sequence[int],
    rate: float,
    generators: Sequence[torch.Generator],
    like: Tensor,
) -> list[Tensor]:
    """What torch's dropout draws for each client's batch by itself, [clients, n, width] for each hidden layer."""
    together = [torch.ones(*places.shape, width, dtype=like.dtype) for width in widths]
    for i, generator in enumerate(generators):
        rows = int((places[i] >= 0).sum())
        for mask in together if rows else ():
            drawn = torch.empty(rows, mask.shape[2], dtype=like.dtype).bernoulli_(1.0 - rate, generator=generator)
            mask[i, :rows] = drawn.div_(1.0 - rate)
    return [mask.to(like.device) for mask in together]


class _Net:
    """Forward and backward passes of many perceptrons, in memory that is kept."""

    def __init__(self, layers: Layers, activation: str, loss: Loss, room: Room, *, trained: Sequence[int]) -> None:
        """`trained` are the layers that have gradients, from 0."""
        self._layers, self._activation, self._loss, self._room = layers, activation, loss, room
        self._trained, self._lowest = set(trained), min(trained)
        self._inputs: list[Tensor] = []
        self._active: list[Tensor] = []
        self._errors: list[Tensor] = []  # by the logits, of the heads of several targets
        self._masks: Sequence[Tensor] = ()

    def forward(self, x: Tensor, masks: Sequence[Tensor] = ()) -> None:
        """`x` [models, n, inputs], and dropout's masks for each hidden layer."""
        self._inputs, self._active, self._masks = [], [], masks
        value = x
        for i, (weight, bias) in enumerate(self._layers):
            self._inputs.append(value)
            out = self._room(f"outputs {i}", (*value.shape[:2], weight.shape[1]), value, value.dtype)
            value = torch.baddbmm(bias[:, None, :], value, weight.mT, out=out)
            if i < len(self._layers) - 1:
                _activate(value, self._activation)
                self._active.append(value)
                if masks:
                    value = value * masks[i]
        self._out = value

    def losses(self, y: Tensor) -> Tensor:
        """[models, n]: the loss of each row, of the last forward pass; a backward pass comes after it."""
        if isinstance(self._loss, str):
            return self._losses_of_one(y)
        total, self._errors = torch.zeros_like(self._out[..., 0]), []
        for head, out, own, is_there in parts_of(self._out, y, self._loss):
            loss, error = _of_head(out, own, head.loss)
            total += torch.where(is_there, loss, 0.0) * head.weight
            self._errors.append(torch.where(is_there[..., None], error, 0.0) * head.weight)
        return total

    def _losses_of_one(self, y: Tensor) -> Tensor:
        out = self._out
        if self._loss == "cross_entropy":
            self._log_share = torch.log_softmax(out, -1, out=self._room("shares", out.shape, out, out.dtype))
            return self._log_share.gather(-1, y[..., None])[..., 0].neg_()
        if self._loss == "binary_cross_entropy":
            return functional.binary_cross_entropy_with_logits(out[..., 0], y.to(out.dtype), reduction="none")
        return functional.mse_loss(out[..., 0], y.to(out.dtype), reduction="none")

    def descend(self, y: Tensor, share: Tensor, rate: float, mix: _Mix | None) -> None:
        """A step of plain SGD on the mean of the losses, of which each row has its `share` [models, n]."""
        error = self._error(y, share, mix)
        for i in range(len(self._layers) - 1, self._lowest - 1, -1):
            weight, bias = self._layers[i]
            before = self._back(error, i) if i > self._lowest else error
            if i not in self._trained:
                error = before
                continue
            if weight.shape[1] * weight.shape[2] > SMALL:
                weight.baddbmm_(error.mT, self._inputs[i], alpha=-rate)
            else:  # into a view torch multiplies matrix by matrix
                found = self._room(f"gradient {i}", weight.shape, weight, weight.dtype)
                weight.add_(torch.bmm(error.mT, self._inputs[i], out=found), alpha=-rate)
            bias.add_(error.sum(1), alpha=-rate)
            error = before

    def gradient(self, y: Tensor, share: Tensor, onto: Layers, mix: _Mix | None) -> None:
        """Writes the mean's gradient."""
        error = self._error(y, share, mix)
        for i in range(len(self._layers) - 1, self._lowest - 1, -1):
            if i in self._trained:
                weight, bias = onto[i]
                # Into a view torch multiplies matrix by matrix.
                found = self._room(f"gradient {i}", weight.shape, weight, weight.dtype)
                weight.copy_(torch.bmm(error.mT, self._inputs[i], out=found))
                torch.sum(error, 1, out=bias)
            error = self._back(error, i) if i > self._lowest else error

    def _error(self, y: Tensor, share: Tensor, mix: _Mix | None) -> Tensor:
        """The derivative by the logits, which are overwritten. Of a row without a share it is 0, whatever the row."""
        out, loss = self._out, self._loss
        if not isinstance(loss, str):
            error = torch.cat(self._errors, -1)
            return error.mul_(share[..., None]).masked_fill_(share[..., None] == 0.0, 0.0)
        if loss == "cross_entropy":
            error = self._log_share.exp_()
            own = error.new_full((1,), 1.0).expand_as(y) if mix is None else mix.share.to(error)
            error.scatter_add_(-1, y[..., None], -own[..., None])
            if mix is not None:
                error.scatter_add_(-1, mix.y[..., None], (own - 1.0)[..., None])
            return error.mul_(share[..., None]).masked_fill_(share[..., None] == 0.0, 0.0)
        if mix is not None:  # these losses' derivatives are linear in the target
            y = mixed(y.to(out.dtype), mix.y.to(out.dtype), mix.share.to(out.dtype))
        error = torch.sigmoid(out) - y[..., None] if loss == "binary_cross_entropy" else (out - y[..., None]).mul_(2.0)
        return error.mul_(share[..., None]).masked_fill_(share[..., None] == 0.0, 0.0)

    def _back(self, error: Tensor, i: int) -> Tensor:
        """The error of layer i - 1's outputs from that of layer i's."""
        weight, active = self._layers[i][0], self._active[i - 1]
        out = self._room(f"back {i}", active.shape, active, active.dtype)
        before = torch.bmm(error, weight, out=out)
        if self._masks:
            before *= self._masks[i - 1]
        if self._activation == "relu":
            torch.ops.aten.threshold_backward.grad_input(before, active, 0.0, grad_input=before)
            return before
        slope = active * (1.0 - active) if self._activation == "sigmoid" else 1.0 - active * active
        return before.mul_(slope)


def _of_head(out: Tensor, y: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """Of one of several targets: the loss of each row [models, n], and its derivative [models, n, width]."""
    if loss == "cross_entropy":
        log_share = torch.log_softmax(out, -1)
        error = log_share.exp().scatter_add_(-1, y[..., None], out.new_full((1, 1, 1), -1.0).expand(*y.shape, 1))
        return -log_share.gather(-1, y[..., None])[..., 0], error
    own = y.to(out.dtype)
    if loss == "binary_cross_entropy":
        losses = functional.binary_cross_entropy_with_logits(out[..., 0], own, reduction="none")
        return losses, torch.sigmoid(out) - own[..., None]
    return functional.mse_loss(out[..., 0], own, reduction="none"), (out - own[..., None]).mul_(2.0)


def _activate(value: Tensor, activation: str) -> None:
    if activation == "relu":
        value.relu_()
    elif activation == "sigmoid":
        value.sigmoid_()
    else:
        value.tanh_()
