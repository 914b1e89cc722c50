"""Local training without privacy, and what private training shares with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from client.training.augment import Augmenter, PlainAugmenter
from common.document.federation import Training
from common.document.heads import Loss
from common.model import objective
from common.model.mlp import trained_of
from common.privacy.noise import NoiseSource


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    training: Training,
    steps: int,
    noise: NoiseSource,
    proximal_mu: float,
    loss: Loss | None = None,
    learning_rate: Callable[[int], float] | None = None,
    augmenter: Augmenter | None = None,
    start: list[Tensor] | None = None,
) -> float:
    """Trains `model` in place without privacy, on shuffled batches, and returns the mean loss of a row.

    Args:
        loss: that of several targets; by default the document's one.
        learning_rate: of each step, from 0; by default always the document's.
        augmenter: changes the rows of each step, if they are to be changed.
        start: what the proximal term pulls to; by default the model as it is.
    """
    start, loss = copies(model) if start is None else start, loss or training.loss
    model.train()
    optimizer = make_optimizer(trained_of(model), training)
    total, rows = 0.0, 0
    with torch_seed(noise.integer(), x.device):
        changes = None if augmenter is None else PlainAugmenter(augmenter, noise.integer())
        batches = _batches(len(y), training.batch_size, noise)
        for step in range(steps):
            places = next(batches)
            index = torch.from_numpy(places).to(x.device)
            if learning_rate is not None:
                set_rate(optimizer, learning_rate(step))
            optimizer.zero_grad(set_to_none=True)
            if augmenter is None or changes is None:
                losses = objective.row_losses(model(x[index]), y[index], loss)
            else:
                index = index.repeat_interleave(augmenter.copies)
                changed = augmenter.apply(x[index], changes.draw(places, step))
                losses = _mixed_losses(model, changed, y[index], loss, augmenter, changes, step)
            losses.mean().backward()  # type: ignore[no-untyped-call]  # torch gives it none
            add_proximal_term(model, start, proximal_mu)
            optimizer.step()
            total += losses.detach().sum().item()
            rows += len(index)
    return total / rows


def _mixed_losses(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss, augmenter: Augmenter, changes: PlainAugmenter, step: int
) -> Tensor:
    """The losses of changed rows, mixed two by two if they are to be."""
    if not augmenter.mixup:
        return objective.row_losses(model(x), y, loss)
    partner, drawn = changes.mix(len(y), step)
    other, share = torch.from_numpy(partner).to(x.device), torch.from_numpy(drawn).to(x)
    out = model(mixed(x, x[other], share[:, None]))
    return mixed(objective.row_losses(out, y, loss), objective.row_losses(out, y[other], loss), share)


def mixed(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """So much of one, and the rest of the other."""
    return one * share + other * (1.0 - share)


def make_optimizer(parameters: Iterable[Tensor], training: Training, *, fused: bool = False) -> torch.optim.Optimizer:
    """The document's optimizer over a model's parameters; `fused` in one pass over them, with other last bits.

    Raises `ValueError` for one that is not known.
    """
    rate, decay = training.learning_rate, training.weight_decay
    if training.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=rate, weight_decay=decay, fused=fused)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=fused)
    if training.optimizer == "sgd":
        momentum, nesterov = training.momentum, training.nesterov
        return torch.optim.SGD(
            parameters, lr=rate, momentum=momentum, nesterov=nesterov, weight_decay=decay, fused=fused
        )
    raise ValueError(f"optimizer must be sgd, adam or adamw, got {training.optimizer!r}")


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Changes the learning rate of the steps to come. Torch's schedulers count the steps of one optimizer, and ours
    begins anew each round."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def _batches(rows: int, size: int, noise: NoiseSource) -> Iterator[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    while True:
        order = noise.permutation(rows)
        for start in range(0, rows, size):
            yield order[start : start + size]


def copies(model: nn.Module) -> list[Tensor]:
    """The trained parameters as they are now."""
    return [p.detach().clone() for p in trained_of(model)]


def add_proximal_term(model: nn.Module, start: list[Tensor], mu: float) -> None:
    """Adds mu (w - w_start), the gradient of FedProx' term (Li et al. 2020, arXiv:1812.06127, equation 2).

    Under privacy it comes after the noise: it is a function of what was released, and costs nothing.
    """
    if mu:
        for parameter, before in zip(trained_of(model), start, strict=True):
            assert parameter.grad is not None
            parameter.grad.add_(parameter.detach() - before, alpha=mu)


@contextmanager
def torch_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's own generator, which only dropout uses, and restores it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
