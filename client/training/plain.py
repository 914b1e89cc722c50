"""Local training without privacy, and what private training shares with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from common.document.federation import Training
from common.model import objective
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
    learning_rate: Callable[[int], float] | None = None,
) -> float:
    """Trains `model` in place without privacy, on shuffled batches, and returns the mean loss of a row.

    `learning_rate` is that of each step, from 0; by default always the document's.
    """
    start = copies(model)
    model.train()
    optimizer = make_optimizer(model.parameters(), training)
    total, rows = 0.0, 0
    with torch_seed(noise.integer(), x.device):
        batches = _batches(len(y), training.batch_size, noise)
        for step in range(steps):
            index = torch.from_numpy(next(batches)).to(x.device)
            if learning_rate is not None:
                set_rate(optimizer, learning_rate(step))
            optimizer.zero_grad(set_to_none=True)
            losses = objective.row_losses(model(x[index]), y[index], training.loss)
            losses.mean().backward()  # type: ignore[no-untyped-call]  # torch gives it none
            add_proximal_term(model, start, proximal_mu)
            optimizer.step()
            total += losses.detach().sum().item()
            rows += len(index)
    return total / rows


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
    """The parameters as they are now."""
    return [p.detach().clone() for p in model.parameters()]


def add_proximal_term(model: nn.Module, start: list[Tensor], mu: float) -> None:
    """Adds mu (w - w_start), the gradient of FedProx' term (Li et al. 2020, arXiv:1812.06127, equation 2).

    Under privacy it comes after the noise: it is a function of what was released, and costs nothing.
    """
    if mu:
        for parameter, before in zip(model.parameters(), start, strict=True):
            assert parameter.grad is not None
            parameter.grad.add_(parameter.detach() - before, alpha=mu)


@contextmanager
def torch_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's own generator, which only dropout uses, and restores it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
